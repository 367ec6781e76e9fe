"""What the kernel tests share: where kernels can run here, inputs that betray a stray read, and the
yardstick."""

import os

import pytest
import torch
from torch import Tensor

from kernels import Bounds
from kernels.attention import INTERPRETED, visible

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
if INTERPRETED:
    import interpreter

    interpreter.install()

# Kernels run in Triton's interpreter, which must be chosen before Triton is imported, or on a GPU.
runs_kernels = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="needs the interpreter: tests/test_kernels_interpreted.py runs it in a process of its own",
)
only_interpreted = pytest.mark.skipif(not INTERPRETED, reason="examines the interpreter's addresses")
not_interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs Triton's compiler, which the interpreter replaces",
)


def guarded(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Normal numbers in a strided view of a larger tensor of NaN: whatever is read outside it spoils the
    result."""
    B, T, H, D = shape
    generator = torch.Generator().manual_seed(seed)
    surroundings = torch.full((B + 1, T + 2, H + 1, D + 16), torch.nan, dtype=dtype)
    surroundings[:B, 1 : T + 1, :H, 8 : 8 + D] = torch.randn(shape, generator=generator).to(dtype)
    return surroundings.to(DEVICE)[:B, 1 : T + 1, :H, 8 : 8 + D].requires_grad_()


def plain_attention(q: Tensor, k: Tensor, v: Tensor, bounds: Bounds | None, causal: bool) -> Tensor:
    """Attention as one would first write it in PyTorch, every step in the inputs' own precision."""
    T, S, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2).transpose(1, 2) for x in (k, v))  # [B, H, S, D]
    mask = visible(T, S, bounds, causal, q.device)[:, None]
    scores = (q.transpose(1, 2) @ k.transpose(2, 3)) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).masked_fill(~mask, 0.0)
    return (weights @ v).transpose(1, 2)


def error(result: Tensor, exact: Tensor) -> float:
    """Largest difference from the float64 result; infinite where something is not finite."""
    return (result.double() - exact).abs().nan_to_num(nan=torch.inf).max().item()
