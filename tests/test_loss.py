"""The losses by chunks: values and gradients against the whole logits, and what they keep in memory."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import loss
from kernels.loss import IGNORE, linear_cross_entropy, linear_logprobs

FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16


def inputs(N: int, D: int, V: int, dtype: torch.dtype = FP32, ignored: float = 0.3) -> list[Tensor]:
    """hidden, weight, targets, bias; part of the targets ignored."""
    torch.manual_seed(0)
    hidden = torch.randn(N, D, dtype=dtype, requires_grad=True)
    weight = (0.3 * torch.randn(V, D, dtype=dtype)).requires_grad_()
    bias = torch.randn(V, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, V, (N,))
    return [hidden, weight, targets.masked_fill(torch.rand(N) < ignored, IGNORE), bias]


def whole_loss(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, z_loss: float) -> Tensor:
    """The definition, with all logits."""
    logits = F.linear(hidden, weight, bias)
    counted = logits[targets != IGNORE]
    return F.cross_entropy(logits, targets, reduction="sum") + z_loss * counted.logsumexp(-1).square().sum()


def whole_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    logp = (F.linear(hidden, weight, bias) / temperature).log_softmax(-1)
    counted = targets != IGNORE
    chosen = logp.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return chosen * counted, -(logp.exp() * logp).sum(-1) * counted


@pytest.mark.parametrize("N", [1, 255, 256, 600])  # a chunk is 256 rows
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_cross_entropy_equals_the_whole(N: int, with_bias: bool, z_loss: float) -> None:
    hidden, weight, targets, bias = inputs(N, 24, 1003)
    targets[0] = 5
    leaves = [hidden, weight, bias] if with_bias else [hidden, weight]
    bias = bias if with_bias else None
    loss_sum, count = linear_cross_entropy(hidden, weight, targets, bias, z_loss)
    expected = whole_loss(hidden, weight, targets, bias, z_loss)
    assert loss_sum.dtype == FP32 and count == (targets != IGNORE).sum() and not count.requires_grad
    torch.testing.assert_close(loss_sum, expected, rtol=1e-6, atol=1e-6)
    for got, whole in zip(
        *(torch.autograd.grad(x / count, leaves) for x in (loss_sum, expected)), strict=True
    ):
        assert (got - whole).abs().max() <= 1e-6


def test_cross_entropy_agrees_with_pytorchs_own() -> None:
    hidden, weight, targets, bias = inputs(300, 16, 777)
    own = F.linear_cross_entropy(hidden, weight, targets, linear_bias=bias, reduction="sum")
    torch.testing.assert_close(
        linear_cross_entropy(hidden, weight, targets, bias)[0], own, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_the_whole(temperature: float) -> None:
    hidden, weight, targets, bias = inputs(300, 8, 101, FP64)
    got = linear_logprobs(hidden, weight, targets, bias, temperature)
    expected = whole_logprobs(hidden, weight, targets, bias, temperature)
    torch.testing.assert_close(got, expected)
    weights = torch.randn(2, 300, dtype=FP64)
    gradients = [
        torch.autograd.grad((x * weights[0] + y * weights[1]).sum(), (hidden, weight, bias))
        for x, y in (got, expected)
    ]
    torch.testing.assert_close(*gradients)
    assert not got[0][targets == IGNORE].any() and not got[1][targets == IGNORE].any()


def test_logprobs_are_float32_of_the_loss() -> None:
    hidden, weight, targets, _ = inputs(300, 16, 500)
    logprobs, entropy = linear_logprobs(hidden, weight, targets)
    assert logprobs.dtype == entropy.dtype == FP32
    torch.testing.assert_close(-logprobs.sum(), linear_cross_entropy(hidden, weight, targets)[0])


def test_gradients_by_finite_differences() -> None:
    hidden, weight, targets, bias = inputs(5, 3, 7, FP64)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_cross_entropy(h, w, targets, b, 0.1)[0], (hidden, weight, bias)
    )
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logprobs(h, w, targets, b, 0.7), (hidden, weight, bias)
    )


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_logprobs])
def test_nothing_counted_is_zero_with_zero_gradients(function: Callable) -> None:
    hidden, weight, targets, bias = inputs(300, 8, 50)
    value = function(hidden, weight, torch.full_like(targets, IGNORE), bias)[0].sum()
    assert value == 0
    for gradient in torch.autograd.grad(value, (hidden, weight, bias)):
        assert not gradient.any()


@pytest.mark.parametrize("frozen", ["hidden", "weight", "all", "no_grad"])
def test_only_the_gradients_asked_for_are_made(frozen: str) -> None:
    hidden, weight, targets, _ = inputs(300, 8, 50)
    hidden.requires_grad_(frozen not in ("hidden", "all"))
    weight.requires_grad_(frozen not in ("weight", "all"))
    with torch.set_grad_enabled(frozen != "no_grad"):
        loss_sum, _ = linear_cross_entropy(hidden, weight, targets)
    assert loss_sum.requires_grad == (frozen in ("hidden", "weight"))
    if loss_sum.requires_grad:
        loss_sum.backward()
        assert (hidden.grad is None) == (frozen == "hidden") and (weight.grad is None) == (frozen == "weight")


def test_bfloat16_is_as_exact_as_plain_bfloat16() -> None:
    hidden, weight, targets, _ = inputs(600, 64, 1000, BF16)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = torch.autograd.grad(whole_loss(*wide, targets, None, 0.0), wide)
    plain = torch.autograd.grad(whole_loss(hidden, weight, targets, None, 0.0), (hidden, weight))
    ours = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets)[0], (hidden, weight))
    for got, yardstick, truth in zip(ours, plain, exact, strict=True):
        assert got.dtype == BF16
        assert (got - truth).abs().max() <= 2 * (yardstick - truth).abs().max()


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_logprobs])
def test_ignored_rows_dropped_or_kept_make_no_difference(
    function: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU keeps them, the CPU drops them: the GPU's way, on the CPU."""
    arguments = inputs(600, 16, 200)
    leaves = [arguments[0], arguments[1], arguments[3]]
    dropped = function(*arguments)[0]
    monkeypatch.setattr(loss, "_drop_ignored", lambda hidden, targets: (hidden, targets))
    kept = function(*arguments)[0]
    torch.testing.assert_close(dropped, kept)
    gradients = [torch.autograd.grad(x.sum(), leaves) for x in (dropped, kept)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


def memory_of(kind: str, N: int, V: int, D: int) -> None:
    """Print by how many bytes the forward and backward pass of one loss raise this process's peak."""
    hidden = torch.randn(N, D, requires_grad=True)
    weight = (0.02 * torch.randn(V, D)).requires_grad_()
    targets = torch.randint(0, V, (N,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if kind == "whole":
        loss_sum = F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum")
    else:
        loss_sum, _ = linear_cross_entropy(hidden, weight, targets)
    loss_sum.backward()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def measured_memory(kind: str, N: int, V: int, D: int) -> int:
    program = f"import test_loss; test_loss.memory_of({kind!r}, {N}, {V}, {D})"
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.slow
def test_memory_at_the_size_of_a_training_step() -> None:
    """B T = 8192, V = 32000, D = 512: at most 15 % of what the whole logits take."""
    assert measured_memory("chunks", 8192, 32000, 512) <= 0.15 * measured_memory("whole", 8192, 32000, 512)


def test_memory_does_not_grow_with_the_logits() -> None:
    """The same at an eighth of the size: with few rows the weight's gradient counts for more, hence 40 %."""
    assert measured_memory("chunks", 2048, 16000, 128) <= 0.4 * measured_memory("whole", 2048, 16000, 128)
