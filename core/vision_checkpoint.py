"""Vision encoders in and out: the layouts in which DINOv2 and SigLIP are published, and our own.

Read: timm (`blocks.0.attn.qkv`), Hugging Face (`encoder.layer.0.attention.attention.query` of version 4 files
and `encoder.layer.0.attention.q_proj` of version 5 alike; SigLIP with or without `vision_model.`), OpenCLIP
(`visual.trunk.`), Prismatic's `.pt`, and the Hugging Face folders that openvla's code writes
(`vision_backbone.featurizer.`, `.fused_featurizer.`). Written: safetensors in timm's names, which are our
own.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from core.config import UserError
from model import VISION_PRESETS, VisionConfig, VisionEncoder, VisionTower

# What marks the beginning of an encoder in a file; what stands before it is the prefix of all its tensors.
SIGNATURES = {
    "timm": "patch_embed.proj.weight",
    "dinov2": "embeddings.patch_embeddings.projection.weight",
    "siglip": "embeddings.patch_embedding.weight",
}

# Name in the file -> name in VisionEncoder. q, k, v are joined afterwards.
RENAMES = {
    "timm": [(r"\.scale_factor$", ".gamma")],  # openvla avoids `gamma`, which transformers once rewrote
    "dinov2": [
        (r"^embeddings\.cls_token$", "cls_token"),
        (r"^embeddings\.register_tokens$", "reg_token"),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^encoder\.layer\.", "blocks."),
        (r"\.attention\.(?:attention\.)?(q|k|v)(?:uery|ey|alue|_proj)\.", r".attn.\1."),
        (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.layer_scale(1|2)\.lambda1$", r".ls\1.gamma"),
        (r"^layernorm\.", "norm."),
    ],
    "siglip": [
        (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
        (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
        (r"^encoder\.layers\.", "blocks."),
        (r"\.layer_norm(1|2)\.", r".norm\1."),
        (r"\.self_attn\.(q|k|v)_proj\.", r".attn.\1."),
        (r"\.self_attn\.out_proj\.", ".attn.proj."),
        (r"^post_layernorm\.", "norm."),
    ],
}
UNUSED = re.compile(
    r"^(attn_pool|head|fc_norm|embeddings\.(mask_token|position_ids))\b"
)  # never run by a VLM


class Tensors(Mapping[str, Tensor]):
    """Tensors of one or more files by name, each read when asked for."""

    def __init__(self, files: list[Path]) -> None:
        self.places: dict[str, Any] = {}
        for file in files:
            try:
                if file.suffix == ".safetensors":
                    handle = safe_open(file, framework="pt")
                    self.places.update({name: handle for name in handle.keys()})  # noqa: SIM118 (not a dict)
                else:
                    content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                    self.places.update(flatten(content))
            except (SafetensorError, OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
                raise UserError(
                    f"{file}: not a readable weights file ({' '.join(str(error).split())[:120]})"
                ) from None
            except (
                Exception
            ) as error:  # torch's restricted unpickler raises pickle.UnpicklingError and others
                raise UserError(
                    f"{file}: refused, it holds more than tensors ({type(error).__name__})"
                ) from None

    def __getitem__(self, name: str) -> Tensor:
        place = self.places[name]
        return place if isinstance(place, Tensor) else place.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def flatten(content: Any, prefix: str = "") -> dict[str, Tensor]:
    """Nested dictionaries (Prismatic: model > projector > ...) -> dotted names."""
    flat: dict[str, Tensor] = {}
    for name, value in content.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        elif isinstance(value, Tensor):
            flat[prefix + name] = value
    return flat


def open_weights(source: str | Path) -> tuple[Tensors, dict[str, Any]]:
    """(tensors, config.json or {}) of a weights file or of a folder with one, sharded or not.

    Raises UserError where there is none or it cannot be read.
    """
    path = Path(source)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_file():
        return Tensors([path]), {}
    config = path / "config.json"
    found = (
        sorted(path.glob("*.safetensors"))
        or sorted(path.glob("*.bin"))
        or sorted(path.glob("checkpoints/*.pt"))
    )
    if not found:
        raise UserError(f"{path}: no .safetensors, .bin or checkpoints/*.pt in this folder")
    try:
        return Tensors(found), json.loads(config.read_text()) if config.is_file() else {}
    except ValueError as error:
        raise UserError(f"{config}: not JSON ({error})") from None


def load_vision_encoder(source: str | Path, upto: int = -2, **changes: Any) -> VisionEncoder:
    """An encoder from a file or folder in any of the layouts above, in float32.

    Args:
        upto: -2 leaves out what the features of the second-to-last block do not need; -1 loads all blocks.
        changes: fields of VisionConfig that the file cannot tell or that should differ: `image_size`
            resamples the positions, `tanh_gelu` overrides the activation (exact for timm's layout, Hugging
            Face's own else).

    Raises:
        UserError: if the source is missing, unreadable, holds no encoder or several, or tensors that do not
        fit.
    """
    encoders = load_encoders(source, upto, **changes)
    if len(encoders) > 1:
        raise UserError(f"{source}: holds {len(encoders)} encoders; load_vision_tower takes them together")
    return encoders[0]


def load_vision_tower(
    *sources: str | Path, image_size: int | None = None, dtype: torch.dtype | None = None
) -> VisionTower:
    """The encoders of all sources, in order, as one frozen tower."""
    changes = {} if image_size is None else {"image_size": image_size}
    encoders = [encoder for source in sources for encoder in load_encoders(source, **changes)]
    return VisionTower(encoders).to(dtype or torch.float32)


def load_encoders(source: str | Path, upto: int = -2, **changes: Any) -> list[VisionEncoder]:
    """All encoders of a source, in the order of their names (featurizer before fused_featurizer: DINOv2
    first)."""
    tensors, config = open_weights(source)
    found = []
    for layout, signature in SIGNATURES.items():
        for name in tensors:
            if name.endswith(signature) and name.removesuffix(signature)[-1:] in ("", "."):
                found.append((name.removesuffix(signature), layout))
    if not found:
        raise UserError(f"{source}: no vision encoder in timm's, DINOv2's or SigLIP's layout")
    return [build(source, tensors, prefix, layout, config, upto, changes) for prefix, layout in sorted(found)]


def build(
    source: str | Path,
    tensors: Tensors,
    prefix: str,
    layout: str,
    published: dict[str, Any],
    upto: int,
    changes: dict[str, Any],
) -> VisionEncoder:
    """One encoder from the tensors under a prefix."""
    names: dict[str, str] = {}  # ours (with q, k, v apart) -> the file's
    for name in tensors:
        own = name.removeprefix(prefix)
        if not name.startswith(prefix) or UNUSED.match(own):
            continue
        for pattern, replacement in RENAMES[layout]:
            own = re.sub(pattern, replacement, own)
        names[own] = name
    shape = {own: tensors[name].shape for own, name in names.items() if own.count(".") < 3 or ".0." in own}
    config = infer_config(source, shape, names, layout, published)
    try:
        config = replace(config, **changes)
    except TypeError as error:
        raise UserError(f"load_vision_encoder: {error}") from None

    with torch.device("meta"):
        encoder = VisionEncoder(config, upto)
    state = {}
    for own in encoder.state_dict():
        parts = [own] if own in names else [own.replace(".qkv.", f".{part}.") for part in "qkv"]
        missing = [part for part in parts if part not in names]
        if missing:
            raise UserError(f"{source}: tensor {own!r} is missing")
        state[own] = (
            torch.cat([tensors[names.pop(part)].float() for part in parts])
            if len(parts) > 1
            else (tensors[names.pop(own)].float())
        )
    left = [own for own in names if not beyond(own, len(encoder.blocks), upto)]
    if left:
        raise UserError(f"{source}: unexpected tensor {names[left[0]]!r}: not a DINOv2 or SigLIP encoder")

    state["pos_embed"], class_position = split_positions(state["pos_embed"].reshape(1, -1, config.dim))
    state["pos_embed"] = resample_positions(state["pos_embed"], config.grid)
    if class_position is not None:
        state["cls_token"] = state["cls_token"] + class_position
    try:
        encoder.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise UserError(f"{source}: {' '.join(str(error).split())[:200]}") from None
    return encoder.requires_grad_(False)


def beyond(own: str, blocks: int, upto: int) -> bool:
    """Whether a tensor belongs to what is left out on purpose: blocks behind the features, and their norm."""
    block = re.match(r"blocks\.(\d+)\.", own)
    return upto < -1 and (own.startswith("norm.") or block is not None and int(block[1]) >= blocks)


def infer_config(
    source: str | Path,
    shape: dict[str, torch.Size],
    names: dict[str, str],
    layout: str,
    published: dict[str, Any],
) -> VisionConfig:
    """The encoder's shape from its tensors; what they cannot tell (heads, activation, pixels) from
    config.json."""
    if published.get("model_type") == "nanomoxin-vision":
        values = {field.name: published[field.name] for field in fields(VisionConfig)}
        return VisionConfig(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
    published = {**published, **published.get("vision_config", {}), **published.get("model_args", {})}
    pixels = published.get("pretrained_cfg", {})  # timm
    dim, _, patch, _ = shape["patch_embed.proj.weight"]
    depth = 1 + max(int(own.split(".")[1]) for own in names if own.startswith("blocks."))
    positions, _ = split_positions(torch.empty(1, shape["pos_embed"][-2], 1, device="meta"))
    side = patch * round(positions.shape[1] ** 0.5)
    stated = published.get("image_size") or pixels.get("input_size", [0])[-1]
    known = {(config.dim, config.depth): config.heads for config in VISION_PRESETS.values()}
    prefixed = "cls_token" in names
    default = VISION_PRESETS["dinov2-large" if prefixed else "siglip-so400m-224"]
    return VisionConfig(
        image_size=stated if isinstance(stated, int) and stated // patch * patch == side else side,
        patch_size=patch,
        dim=dim,
        depth=depth,
        heads=published.get("num_attention_heads")
        or published.get("num_heads")
        or known.get((dim, depth), dim // 64),
        mlp=shape["blocks.0.mlp.fc1.weight"][0] if "blocks.0.mlp.fc1.weight" in shape else refuse_mlp(source),
        class_token=prefixed,
        registers=shape["reg_token"][1] if "reg_token" in names else 0,
        layer_scale="blocks.0.ls1.gamma" in names,
        tanh_gelu=published.get("hidden_act", "gelu_pytorch_tanh" if layout == "siglip" else "gelu")
        != "gelu",
        norm_eps=published.get("layer_norm_eps", 1e-6),
        mean=tuple(pixels.get("mean", default.mean)),
        std=tuple(pixels.get("std", default.std)),
    )


def refuse_mlp(source: str | Path) -> int:
    raise UserError(f"{source}: no mlp.fc1: encoders with a gated MLP (DINOv2 giant) are not supported")


def split_positions(positions: Tensor) -> tuple[Tensor, Tensor | None]:
    """[1, N, dim] -> the patches' positions and the class token's, if there is one more than a square number.

    timm's register layout has no position for the class token: there it is already added to the token.
    """
    count = positions.shape[1]
    if round(count**0.5) ** 2 == count:
        return positions, None
    if round((count - 1) ** 0.5) ** 2 == count - 1:
        return positions[:, 1:], positions[:, :1]
    raise UserError(f"{count} positions are not those of a square picture")


def resample_positions(positions: Tensor, grid: int) -> Tensor:
    """[1, n * n, dim] -> [1, grid * grid, dim]: bicubic with antialias in float32, as timm and DINOv2's
    register code.

    Without antialias, or with the 0.1 offset of DINOv2's older code, features are off by about a tenth.
    """
    before = round(positions.shape[1] ** 0.5)
    if before == grid:
        return positions
    picture = positions.float().reshape(1, before, before, -1).permute(0, 3, 1, 2)  # [1, dim, n, n]
    picture = F.interpolate(picture, size=(grid, grid), mode="bicubic", antialias=True)
    return picture.permute(0, 2, 3, 1).flatten(1, 2)


def save_vision_encoder(encoder: VisionEncoder, folder: str | Path) -> None:
    """config.json and model.safetensors in timm's names; `load_vision_encoder` gives the same back, bit for
    bit."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    described = {"model_type": "nanomoxin-vision", **asdict(encoder.config)}
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
