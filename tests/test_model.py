"""The decoder: published sizes, parity with transformers on random weights, masks, initialisation, memory
promise."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from kernels import make_bounds
from model import PRESETS, Config, Transformer, flops_per_token, num_parameters, rotary_tables, rotate

SMALL = Config(vocab_size=61, layers=2, dim=32, heads=4, kv_heads=2, head_dim=8, ffn_dim=40, max_seq_len=64)
CODEGEN = dataclasses.replace(
    SMALL,
    architecture="codegen",
    kv_heads=4,
    rotary_dim=4,
    norm="layer",
    parallel_block=True,
    mlp="gelu",
    head_bias=True,
)


def tokens(rows: int = 2, length: int = 17, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "published"), [("moxin-7b", 8_114_180_096), ("moss-16b", 16_717_980_160), ("small", 124_668_672)]
)
def test_parameter_counts(name: str, published: int) -> None:
    assert num_parameters(PRESETS[name]) == published


def test_flops_of_moxin_match_the_sum_over_its_matrices() -> None:
    shape, length = PRESETS["moxin-7b"], 2048
    attention = 2 * (4096 * 4096 + 4096 * 1024)
    matrices = 36 * (attention + 3 * 4096 * 14_336) + 4096 * 32_000
    norms = 73 * 4096
    assert flops_per_token(shape, length) == 6 * (matrices + norms) + 12 * 36 * 4096 * length


@pytest.mark.parametrize("config", [SMALL, CODEGEN], ids=["mistral", "codegen"])
def test_loss_and_logprobs_equal_the_definition(config: Config) -> None:
    model, x = Transformer(config), tokens()
    targets = x.roll(-1, 1)
    targets[0, :5] = -100
    logits = model(x)
    loss, count = model.loss(x, targets)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    assert count == 2 * 17 - 5 and torch.allclose(loss, expected, rtol=1e-6)
    logprobs, entropy = model.logprobs(x, targets, temperature=0.7)
    scaled = (logits / 0.7).log_softmax(-1)
    kept = targets >= 0
    picked = scaled.gather(2, targets.clamp(min=0)[..., None])[..., 0]
    assert torch.allclose(logprobs[kept], picked[kept], atol=1e-5) and not logprobs[~kept].any()
    assert torch.allclose(entropy[kept], -(scaled.exp() * scaled).sum(-1)[kept], atol=1e-5)


def test_causal_future_does_not_reach_the_past() -> None:
    model, x = Transformer(SMALL), tokens()
    changed = x.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 61
    before, after = model(x), model(changed)
    assert torch.equal(before[:, :9], after[:, :9]) and not torch.allclose(before[:, 9:], after[:, 9:])


def test_packed_documents_compute_as_if_alone() -> None:
    model, x = Transformer(SMALL), tokens(1, 20)
    documents = torch.tensor([[0] * 7 + [1] * 13])
    positions = torch.cat((torch.arange(7), torch.arange(13)))[None]
    packed = model(x, make_bounds(20, doc_ids=documents), positions)
    alone = torch.cat((model(x[:, :7]), model(x[:, 7:])), dim=1)
    assert torch.allclose(packed, alone, atol=1e-6)


def test_sliding_window_is_that_of_the_config() -> None:
    windowed = Transformer(dataclasses.replace(SMALL, sliding_window=4, layers=1))
    x = tokens(1, 12)
    changed = x.clone()
    changed[0, 3] = (changed[0, 3] + 1) % 61
    difference = (windowed(x) - windowed(changed)).abs().amax(-1)[0]
    assert (difference > 0).tolist() == [False] * 3 + [True] * 4 + [
        False
    ] * 5  # itself and three later queries


def test_rotary_scores_depend_on_distance_alone() -> None:
    config = dataclasses.replace(SMALL, rotary_dim=6)
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(i: int, j: int) -> torch.Tensor:
        place = [rotary_tables(torch.tensor([p]), config) for p in (i, j)]
        return (rotate(q, place[0]) * rotate(k, place[1])).sum()

    assert torch.allclose(score(5, 3), score(105, 103), atol=1e-5)
    assert not torch.allclose(score(5, 3), score(5, 4), atol=1e-3)


def test_initialisation_depends_on_seed_and_name_only() -> None:
    deep = Transformer(dataclasses.replace(SMALL, layers=3))
    shallow, other = Transformer(SMALL), Transformer(SMALL, seed=1)
    assert torch.equal(deep.layers[1].mlp.up.weight, shallow.layers[1].mlp.up.weight)
    assert not torch.equal(shallow.layers[0].mlp.up.weight, shallow.layers[1].mlp.up.weight)
    assert not torch.equal(shallow.layers[1].mlp.up.weight, other.layers[1].mlp.up.weight)
    assert abs(float(Transformer(PRESETS["tiny"]).embed.weight.detach().std()) - 64**-0.5) < 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 4, "kv_heads": 3}, "multiple of kv_heads"),
        ({"head_dim": 7}, "even"),
        ({"layers": 0}, "layers"),
    ],
)
def test_impossible_shapes_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)


def test_logits_equal_transformers_mistral() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MistralConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=6,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        attn_implementation="eager",
    )
    theirs = transformers.MistralForCausalLM(config).eval()
    ours = Transformer(dataclasses.replace(SMALL, sliding_window=6))
    renames = {
        "embed": "model.embed_tokens",
        "norm": "model.norm",
        "head": "lm_head",
        "layers": "model.layers",
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "attention": "self_attn",
        **{name: f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")},
    }
    state = theirs.state_dict()
    ours.load_state_dict(
        {n: state[".".join(renames.get(part, part) for part in n.split("."))] for n in ours.state_dict()}
    )
    with torch.no_grad():
        assert (ours(tokens()) - theirs(tokens()).logits).abs().max() < 1e-5
