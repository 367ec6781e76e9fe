"""The teaching kernels against float64: RMSNorm, rotary positions, SwiGLU."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import DEVICE, error, only_interpreted, runs_kernels
from torch import Tensor

SHAPES = [(1, 16), (33, 100), (65, 128), (70, 257)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rmsnorm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def ours(name: str) -> Callable[..., Tensor]:
    from kernels import pointwise

    return {
        "rmsnorm": lambda x, weight: pointwise.RMSNorm.apply(x, weight, 1e-6),
        "rope": pointwise.Rope.apply,
        "swiglu": pointwise.SwiGLU.apply,
    }[name]


def inputs(name: str, shape: tuple[int, int], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that get a gradient, and those that do not."""
    torch.manual_seed(0)
    N, D = shape
    if name == "rope":
        angles = torch.randn(N, D // 2, device=DEVICE)
        return [torch.randn(N, 3, D // 2 * 2, device=DEVICE, dtype=dtype)], [angles.cos(), angles.sin()]
    second = (D,) if name == "rmsnorm" else (N, D)
    return [torch.randn(size, device=DEVICE, dtype=dtype) for size in ((N, D), second)], []


def run(function: Callable[..., Tensor], tensors: list[Tensor], rest: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*leaves, *rest)
    torch.manual_seed(1)
    gradient = torch.randn(out.shape, device=out.device).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, gradient)]


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name, plain", [("rmsnorm", rmsnorm), ("rope", rope), ("swiglu", swiglu)])
def test_kernel_is_as_exact_as_pytorch(
    name: str, plain: Callable[..., Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Error against float64 at most twice that of the plain expression in the inputs' precision, or one
    rounding."""
    tensors, rest = inputs(name, shape, dtype)
    exact = run(plain, [x.double() for x in tensors], [x.double() for x in rest])
    yardstick = run(plain, tensors, rest)
    results = run(ours(name), tensors, rest)
    again = run(ours(name), tensors, rest)
    for got, twice, truth, usual in zip(results, again, exact, yardstick, strict=True):
        assert torch.equal(got, twice)
        rounding = 2 * torch.finfo(dtype).eps * max(1.0, truth.abs().max().item())
        assert error(got, truth) <= max(2 * error(usual, truth), rounding)


@only_interpreted
@pytest.mark.parametrize("name", ["rmsnorm", "rope", "swiglu"])
def test_kernel_stays_inside_its_tensors(name: str) -> None:
    import interpreter

    with interpreter.watched() as faults:
        run(ours(name), *inputs(name, (33, 100), torch.float32))
    assert not faults, faults[:5]
