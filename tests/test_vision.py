"""The vision encoders against transformers and timm, with every parameter random, and all weight layouts."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from core.config import UserError
from core.vision_checkpoint import (
    load_vision_encoder,
    load_vision_tower,
    resample_positions,
    save_vision_encoder,
)
from model import (
    PATCH,
    PRESETS,
    VISION_PRESETS,
    VLM,
    Config,
    VisionConfig,
    VisionEncoder,
    VisionTower,
    normalise,
)

DINO = VisionConfig(image_size=56, dim=64, depth=3, heads=1, mlp=256)
SIGLIP = VisionConfig(
    image_size=56, dim=144, depth=3, heads=2, mlp=300, class_token=False, registers=0, layer_scale=False
)


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Registers and masks start at 0 and scales at 1: a test that leaves them so sees nothing of them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.3 if parameter.ndim < 2 else 0.15, generator=generator)


def pixels(size: int = 56, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def reference(kind: str):
    """(transformers model, its keyword for the number of tokens before the patches)."""
    transformers = pytest.importorskip("transformers")
    common = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=1, patch_size=14, image_size=56)
    if kind == "siglip":
        config = transformers.SiglipVisionConfig(
            **{**common, "hidden_size": 144, "num_attention_heads": 2}, intermediate_size=300
        )
        model, prefix = transformers.SiglipVisionModel(config), 0
    elif kind == "registers":
        config = transformers.Dinov2WithRegistersConfig(**common, num_register_tokens=4)
        model, prefix = transformers.Dinov2WithRegistersModel(config), 5
    else:
        model, prefix = transformers.Dinov2Model(transformers.Dinov2Config(**common)), 1
    model.set_attn_implementation("sdpa")
    randomise(model)
    return model.eval(), prefix


def timm_model(config: VisionConfig):
    """timm's VisionTransformer of the same shape; skips where timm cannot be imported."""
    real = torch.library.register_fake
    try:  # a torchvision built for CUDA cannot register its operators on a CPU torch, and timm imports it

        def skipping(name, *arguments, **keywords):
            if isinstance(name, str) and name.startswith("torchvision::"):
                return lambda function: function
            return real(name, *arguments, **keywords)

        torch.library.register_fake = skipping
        vit = importlib.import_module("timm.models.vision_transformer")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm cannot be imported here: {error}")
    finally:
        torch.library.register_fake = real
    model = vit.VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.dim,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.mlp / config.dim,
        class_token=config.class_token,
        reg_tokens=config.registers,
        no_embed_class=True,
        init_values=1.0 if config.layer_scale else None,
        num_classes=0,
        global_pool="token" if config.class_token else "avg",
        fc_norm=False,
    )
    randomise(model)
    return model.eval()


@pytest.mark.parametrize("kind", ["registers", "plain", "siglip"])
@pytest.mark.parametrize("spelling", ["saved", "in memory"])
def test_equals_transformers(kind: str, spelling: str, tmp_path: Path) -> None:
    model, prefix = reference(kind)
    if spelling == "saved":  # version 4's names
        model.save_pretrained(tmp_path)
    else:  # version 5 renames modules in memory
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(model.config.to_json_string())
    with torch.no_grad():
        wanted = model(pixels(), output_hidden_states=True)
        encoder = load_vision_encoder(tmp_path, upto=-1)
        assert encoder.config.tanh_gelu == (kind == "siglip")
        assert (encoder(pixels(), layer=-2) - wanted.hidden_states[-2][:, prefix:]).abs().max() <= 1e-5
        assert (encoder(pixels(), layer=-1) - wanted.last_hidden_state[:, prefix:]).abs().max() <= 1e-5
        short = load_vision_encoder(tmp_path)
        assert len(short.blocks) == 2 and not hasattr(short, "norm")
        assert torch.equal(short(pixels()), encoder(pixels()))
        with pytest.raises(ValueError, match="upto=-1"):
            short(pixels(), layer=-1)
        # The test can fail: the other GELU, or unused registers, are seen.
        wrong = load_vision_encoder(tmp_path, tanh_gelu=kind != "siglip")
        assert (wrong(pixels()) - wanted.hidden_states[-2][:, prefix:]).abs().max() > 1e-4


@pytest.mark.parametrize("config", [DINO, SIGLIP], ids=["dinov2", "siglip"])
def test_equals_timm(config: VisionConfig, tmp_path: Path) -> None:
    model = timm_model(config)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    encoder = load_vision_encoder(tmp_path, heads=config.heads)
    assert replace(encoder.config, mean=config.mean, std=config.std) == config  # all read off the tensors
    with torch.no_grad():
        (wanted,) = model.get_intermediate_layers(pixels(), n={config.depth - 2})
        assert (encoder(pixels()) - wanted).abs().max() <= 1e-5


def patterned(encoder: VisionEncoder) -> VisionEncoder:
    """Weights given by a formula, so that another library's output on them can be written down as numbers."""
    with torch.no_grad():
        for i, parameter in enumerate(encoder.parameters()):
            steps = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.copy_((torch.sin(steps * 0.7 + i) * 0.12).view(parameter.shape))
    return encoder


# Features of patches 0, 7 and 15 in channels 0, 5 and 60, from timm 1.0.31 on CPU with the weights of
# `patterned`.
GOLDEN = {
    "dinov2": [
        [0.2348727, -0.0511733, -0.0269519],
        [-0.6129884, 0.5500479, 0.8110462],
        [0.1538359, 0.0229798, 0.0263461],
    ],
    "siglip": [
        [4.3509068, -1.2058318, -4.0891242],
        [4.1188726, -0.6493644, -3.7137437],
        [4.3223734, -1.0952477, -3.9420671],
    ],
}


@pytest.mark.parametrize("kind", GOLDEN)
def test_equals_what_timm_gave(kind: str) -> None:
    encoder = patterned(VisionEncoder(DINO if kind == "dinov2" else SIGLIP, upto=-1))
    wave = torch.sin(torch.arange(3 * 56 * 56, dtype=torch.float64) * 0.37).float().view(1, 3, 56, 56)
    with torch.no_grad():
        got = encoder(wave)[0, [0, 7, 15]][:, [0, 5, 60]]
    assert (got - torch.tensor(GOLDEN[kind])).abs().max() <= 2e-5


def test_other_layouts_hold_the_same_encoders(tmp_path: Path) -> None:
    dino, siglip = VisionEncoder(DINO, upto=-1), VisionEncoder(replace(SIGLIP, dim=128), upto=-1)
    for seed, encoder in enumerate((dino, siglip)):
        randomise(encoder, seed)
    fused = {"projector.fc1.weight": torch.zeros(2, 2), "language_model.model.norm.weight": torch.zeros(2)}
    nested: dict = {"projector": {"projector.0.weight": torch.zeros(2, 2)}, "vision_backbone": {}}
    for prefix, nested_prefix, encoder in (
        ("featurizer", "dino_featurizer", dino),
        ("fused_featurizer", "siglip_featurizer", siglip),
    ):
        for name, tensor in encoder.state_dict().items():
            fused[f"vision_backbone.{prefix}.{name.replace('.gamma', '.scale_factor')}"] = tensor
            nested["vision_backbone"][f"{nested_prefix}.{name}"] = tensor
    fused["vision_backbone.fused_featurizer.attn_pool.latent"] = torch.zeros(1, 1, 4)
    (tmp_path / "openvla").mkdir()
    names = sorted(fused)
    save_file(
        {name: fused[name] for name in names[::2]}, tmp_path / "openvla/model-00001-of-00002.safetensors"
    )
    save_file(
        {name: fused[name] for name in names[1::2]}, tmp_path / "openvla/model-00002-of-00002.safetensors"
    )
    torch.save({"model": nested}, tmp_path / "prismatic.pt")
    trunk = {f"visual.trunk.{name}": tensor for name, tensor in siglip.state_dict().items()}
    save_file(
        {**trunk, "text.token_embedding.weight": torch.zeros(3, 3)}, tmp_path / "open_clip_model.safetensors"
    )

    wanted = torch.cat([encoder(pixels()) for encoder in (dino, siglip)], dim=-1)
    for source in ("openvla", "prismatic.pt"):
        tower = load_vision_tower(tmp_path / source)
        got = torch.cat([encoder(pixels()) for encoder in tower.encoders], dim=-1)
        assert torch.equal(got, wanted), source
        with pytest.raises(UserError, match="holds 2 encoders"):
            load_vision_encoder(tmp_path / source)
    alone = load_vision_encoder(tmp_path / "open_clip_model.safetensors")
    assert torch.equal(alone(pixels()), siglip(pixels()))
    assert not alone.config.tanh_gelu  # open_clip's SigLIP runs through timm


def test_saved_encoders_come_back_bit_for_bit(tmp_path: Path) -> None:
    for upto in (-2, -1):
        encoder = VisionEncoder(DINO, upto=upto)
        randomise(encoder)
        save_vision_encoder(encoder, tmp_path)
        again = load_vision_encoder(tmp_path, upto=upto)
        assert again.config == encoder.config
        assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), again.parameters(), strict=True))


def test_positions_are_resampled_with_antialias(tmp_path: Path) -> None:
    y, x = torch.meshgrid(torch.linspace(0, 9, 37), torch.linspace(0, 7, 37), indexing="ij")
    smooth = torch.stack([torch.sin(x + y), torch.cos(x * 1.3), torch.sin(y * 2)], dim=-1).view(1, 37 * 37, 3)
    small = resample_positions(smooth, 16)
    picture = smooth.view(1, 37, 37, 3).permute(0, 3, 1, 2)
    plain = F.interpolate(picture, size=(16, 16), mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
    assert (small - plain).pow(2).mean().sqrt() > 0.002  # antialias makes a difference ...
    # ... and these are timm 1.0.31's values (resample_abs_pos_embed, 37 -> 16).
    golden = [
        [0.3106308, 0.9776642, 0.3539386],
        [0.9543894, 0.7339376, 0.9607620],
        [-0.6611506, -0.8028058, 0.8127782],
        [0.0265843, -0.8691784, -0.9119288],
    ]
    assert torch.allclose(small[0, [0, 17, 100, 255]], torch.tensor(golden), atol=1e-6)
    assert resample_positions(smooth, 37) is smooth

    encoder = VisionEncoder(replace(DINO, image_size=98), seed=3)  # 7 x 7 patches
    save_vision_encoder(encoder, tmp_path)
    resized = load_vision_encoder(tmp_path, image_size=56)
    assert torch.equal(resized.pos_embed, resample_positions(encoder.pos_embed, 4))
    assert resized(pixels(56)).shape == (2, 16, 64)


def test_published_parameter_counts() -> None:
    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    def pooling(dim: int, mlp: int) -> int:  # SigLIP's attention pool: one query, q, kv, proj, norm, MLP
        return dim + 4 * (dim * dim + dim) + 2 * dim + 2 * dim * mlp + mlp + dim

    with torch.device("meta"):
        dino = VisionEncoder(VISION_PRESETS["dinov2-large"], upto=-1)
        siglip = VisionEncoder(VISION_PRESETS["siglip-so400m-224"], upto=-1)
        larger = VisionEncoder(VISION_PRESETS["siglip-so400m-384"], upto=-1)
        used = [VisionEncoder(VISION_PRESETS[name]) for name in ("dinov2-large", "siglip-so400m-224")]
        tower = VisionTower(used)
        vlm = VLM(replace(PRESETS["moxin-7b"], vocab_size=32_064), tower.dim)
    assert round((count(dino) + (37**2 - 16**2) * 1024) / 1e6, 1) == 304.4  # published for 37 x 37 patches
    assert round((count(siglip) + pooling(1152, 4304)) / 1e6, 1) == 427.7
    assert round((count(larger) + pooling(1152, 4304)) / 1e6, 1) == 428.2
    assert round((count(dino) - count(used[0])) / 1e6, 1) == 12.6
    assert round((count(siglip) - count(used[1])) / 1e6, 1) == 15.2
    assert (tower.dim, tower.tokens) == (2176, 256)
    assert [tuple(vlm.projector.get_submodule(f"fc{i}").weight.shape) for i in (1, 2, 3)] == [
        (8704, 2176),
        (4096, 8704),
        (4096, 4096),
    ]
    assert count(vlm.projector) == 71_385_600
    assert round((count(vlm) - count(vlm.projector)) / 1e9, 3) == 8.115


def test_broken_weights_are_one_clear_line(tmp_path: Path) -> None:
    encoder = VisionEncoder(DINO, upto=-1)
    state = dict(encoder.state_dict())

    def message(source: Path, **changes) -> str:
        with pytest.raises(UserError) as caught:
            load_vision_encoder(source, **changes)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no such file" in message(tmp_path / "nothing")
    assert "no .safetensors" in message(tmp_path)
    for name, content, expected in (
        ("empty", {"x": torch.zeros(1)}, "no vision encoder"),
        (
            "missing",
            {k: v for k, v in state.items() if k != "blocks.1.norm2.bias"},
            "'blocks.1.norm2.bias' is missing",
        ),
        ("extra", {**state, "blocks.0.attn.q_norm.weight": torch.zeros(64)}, "unexpected tensor"),
        ("gated", {k: v for k, v in state.items() if ".mlp." not in k}, "gated MLP"),
        ("shape", {**state, "cls_token": torch.zeros(1, 1, 32)}, "cls_token"),
        ("oblong", {**state, "pos_embed": torch.zeros(1, 15, 64)}, "15 positions"),
    ):
        save_file(content, tmp_path / f"{name}.safetensors")
        assert expected in message(tmp_path / f"{name}.safetensors"), name
    whole = (tmp_path / "extra.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "not a readable weights file" in message(tmp_path / "cut.safetensors")
    torch.save({"model": tmp_path}, tmp_path / "object.pt")
    assert "refused" in message(tmp_path / "object.pt")
    save_file(state, tmp_path / "good.safetensors")
    assert "colour" in message(tmp_path / "good.safetensors", colour=3)


def tiny_vlm(seed: int = 0) -> tuple[VLM, VisionTower]:
    tower = VisionTower(
        [VisionEncoder(VISION_PRESETS[name], seed=seed) for name in ("dino-tiny", "siglip-tiny")]
    )
    config = Config(vocab_size=100, layers=2, dim=32, heads=2, kv_heads=1, head_dim=16, ffn_dim=64)
    return VLM(config, tower.dim, seed=seed), tower


def test_features_join_dino_then_siglip() -> None:
    _, tower = tiny_vlm()
    pictures = torch.randint(0, 256, (3, 2, 3, 48, 48), dtype=torch.uint8)
    features = tower(pictures)
    assert features.shape == (3, 36, 128) and not features.requires_grad
    for i, part in enumerate((features[..., :64], features[..., 64:])):
        encoder = tower.encoders[i]
        assert torch.equal(part, encoder(normalise(pictures[:, i], encoder.config)))
    with pytest.raises(ValueError, match="one size and one grid"):
        VisionTower([VisionEncoder(DINO), VisionEncoder(VISION_PRESETS["dino-tiny"])])


def test_pictures_go_where_the_tokens_say() -> None:
    vlm, _ = tiny_vlm()
    features = torch.randn(2, 4, 128)
    tokens = torch.tensor([[1, *[PATCH] * 4, 5, 6, 0], [7, 8, *[PATCH] * 4, 9, 10]])
    embeddings = vlm.splice(tokens, features)
    projected = vlm.projector(features)
    assert torch.allclose(embeddings[0, 1:5], projected[0]) and torch.allclose(
        embeddings[1, 2:6], projected[1]
    )
    text = tokens != PATCH
    assert torch.equal(embeddings[text], vlm.embed(tokens[text]))
    for wrong in (features[:1], None, torch.randn(3, 4, 128)):
        with pytest.raises(ValueError, match="places for"):
            vlm.splice(tokens, wrong)
    # Without a picture it is the language model itself.
    plain = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        assert torch.equal(vlm(plain), super(VLM, vlm).forward(plain))
    vlm.loss(plain, plain)[0].backward()
    assert all(p.grad is not None and not p.grad.any() for p in vlm.projector.parameters())


def test_a_picture_and_its_padding_do_not_touch_other_rows() -> None:
    """A text-only row, padded beside a row with a picture, has the loss that it has alone."""
    vlm, _ = tiny_vlm()
    features = torch.randn(1, 4, 128)
    with_picture = torch.tensor([1, *[PATCH] * 4, 5, 6, 2, 3])
    text = torch.tensor([1, 7, 8, 9])
    targets = [torch.tensor([-100] * 5 + [6, 2, 3, -100]), torch.tensor([7, 8, 9, -100])]
    alone = [
        vlm.loss(with_picture[None], targets[0][None], features=features)[0],
        vlm.loss(text[None], targets[1][None])[0],
    ]
    for width in (9, 14):
        for fill in (0, 55):
            batch = torch.full((2, width), fill)
            wanted = torch.full((2, width), -100)
            for i, row in enumerate((with_picture, text)):
                batch[i, : len(row)], wanted[i, : len(row)] = row, targets[i]
            loss, count = vlm.loss(batch, wanted, features=features)
            assert int(count) == 6 and torch.allclose(loss, sum(alone), rtol=1e-6)
            logprobs, _ = vlm.logprobs(batch, wanted, features=features)
            assert torch.allclose(-logprobs.sum(), loss, rtol=1e-5)


def test_preset_pixels() -> None:
    white = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    assert torch.equal(normalise(white, VISION_PRESETS["siglip-tiny"]), torch.ones(1, 3, 2, 2))
    assert torch.allclose(normalise(white, DINO)[0, :, 0, 0], torch.tensor([2.2489, 2.4286, 2.64]), atol=1e-4)
