"""Weights in 8 and 4 bits: exact packing, bounded rounding, and what it costs a real model."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from core.checkpoint import load_pretrained, save_pretrained
from core.config import UserError
from core.generate import generate
from core.quantize import GROUPS, QuantizedLinear, pack, quantize, unpack
from data.tokenizer import load_tokenizer
from model import Config, Transformer

CODEGEN = Config(
    "codegen",
    50,
    2,
    64,
    4,
    4,
    16,
    96,
    norm="layer",
    parallel_block=True,
    mlp="gelu",
    head_bias=True,
    rotary_dim=8,
)


def test_packing_keeps_every_value() -> None:
    values = torch.randint(0, 16, (3, 5, 32), dtype=torch.uint8)
    assert unpack(pack(values)).equal(values)
    assert pack(values).nbytes * 2 == values.nbytes


@pytest.mark.parametrize("columns", [64, 128, 172, 300])
@pytest.mark.parametrize("bits", [4, 8])
def test_refitting_beats_plain_rounding(bits: int, columns: int) -> None:
    """In squared error of every matrix; and a row of equal weights comes back as it was."""
    torch.manual_seed(0)
    linear = nn.Linear(columns, 17)
    with torch.no_grad():
        linear.weight[3], linear.weight[4] = 0.0, 0.25
    restored, size = QuantizedLinear(linear, bits).restored, GROUPS[bits]
    assert restored.shape == linear.weight.shape
    assert torch.allclose(restored[3:5], linear.weight[3:5], atol=1e-7)
    plain = torch.empty_like(restored)
    for start in range(0, columns, size):
        part = linear.weight[:, start : start + size]
        low, step = (
            part.amin(1, keepdim=True),
            (part.amax(1, keepdim=True) - part.amin(1, keepdim=True)) / (2**bits - 1),
        )
        plain[:, start : start + size] = ((part - low) / step.clamp_min(1e-30)).round() * step + low
        # An outer weight may be moved by a refit, but by less than one step.
        assert ((part - restored[:, start : start + size]).abs() <= step + 1e-7).all()
    assert (restored - linear.weight).square().sum() <= (plain - linear.weight).square().sum()


@pytest.mark.parametrize("config", [Config(vocab_size=50, layers=2), CODEGEN])
def test_only_the_layers_are_rounded(config: Config) -> None:
    model = Transformer(config)
    exact = model(torch.arange(20)[None])
    before = sum(parameter.nbytes for layer in model.layers for parameter in layer.parameters())
    quantize(model, 8)
    kinds = {
        type(module) for layer in model.layers for module in layer.modules() if not list(module.children())
    }
    assert nn.Linear not in kinds and isinstance(model.head, nn.Linear)
    held = [*model.layers.parameters(), *model.layers.buffers()]
    assert sum(tensor.nbytes for tensor in held) < 0.6 * before
    assert 0 < (model(torch.arange(20)[None]) - exact).abs().max() < 0.05
    assert len(generate(model, [[1, 2]], 5)[0][0].tokens) == 5


def test_refusals(tmp_path: Path) -> None:
    model = Transformer(Config(vocab_size=50, layers=1))
    with pytest.raises(UserError, match="4 or 8 bits, not 3"):
        quantize(model, 3)
    with pytest.raises(UserError, match="quantised"):
        save_pretrained(quantize(model, 8), tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("bits", "allowed"), [(8, 0.01), (4, 0.10)])
def test_perplexity_of_a_real_model(bits: int, allowed: float, real_data: Path) -> None:
    """On 4,096 tokens of stories that the exact model wrote."""
    folder = real_data / "stories260k"
    model = load_pretrained(folder)
    assert load_tokenizer(folder).vocab_size == model.config.vocab_size
    stories = generate(model, [[1]], 256, num_samples=16)[0]
    tokens = torch.tensor([[1, *story.tokens] for story in stories])

    def perplexity() -> float:
        with torch.no_grad():
            loss, count = model.loss(tokens[:, :-1], tokens[:, 1:])
        return math.exp(loss / count)

    exact = perplexity()
    quantize(model, bits)
    change = perplexity() / exact - 1
    print(f"int{bits}: perplexity {exact:.4f} -> {exact * (1 + change):.4f} ({change:+.2%})")
    assert abs(change) < allowed
