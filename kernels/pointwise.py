"""RMSNorm, rotary positions and SwiGLU in Triton: three small kernels to learn from, not used by the model.

Each reads its inputs once and writes its result once, which is all that a kernel limited by memory can do.
That is also what torch.compile makes of the plain expressions, by fusing them with their neighbours besides,
so the model keeps the plain expressions (`docs/kernels.md` counts the bytes). Here one can see how it is done
by hand: a program for each row, a sum within it, gradients by hand, and a sum over rows without atomic
additions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

ROWS_PER_PROGRAM = 32  # rows whose weight gradients one program sums up


@triton.jit
def rmsnorm_kernel(X, WEIGHT, OUT, D, eps, BD: tl.constexpr):
    """OUT = x r w with r = 1 / sqrt(mean(x^2) + eps); X [N, D], one program a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BD)
    inside = columns < D
    x = tl.load(X + row * D + columns, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(WEIGHT + columns, mask=inside, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(x * x, 0) / D + eps)
    tl.store(OUT + row * D + columns, (x * r * weight).to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def rmsnorm_backward_kernel(
    X, WEIGHT, GRAD, GRAD_X, PARTIAL, N, D, eps, ROWS: tl.constexpr, BD: tl.constexpr
):
    """With n = x r:  dx = r (w dy - n mean(w dy n))  and  dw = sum over rows of dy n.

    One program takes ROWS rows and leaves its part of dw in its own row of PARTIAL [programs, D], float32.
    """
    program = tl.program_id(0)
    columns = tl.arange(0, BD)
    inside = columns < D
    weight = tl.load(WEIGHT + columns, mask=inside, other=0.0).to(tl.float32)
    partial = tl.zeros([BD], tl.float32)
    for index in range(program * ROWS, tl.minimum(program * ROWS + ROWS, N)):
        offsets = tl.cast(index, tl.int64) * D + columns
        x = tl.load(X + offsets, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(GRAD + offsets, mask=inside, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(x * x, 0) / D + eps)  # cheaper to compute again than to store and read
        normed = x * r
        partial += grad * normed
        grad_normed = grad * weight
        grad_x = r * (grad_normed - normed * (tl.sum(grad_normed * normed, 0) / D))
        tl.store(GRAD_X + offsets, grad_x.to(GRAD_X.dtype.element_ty), mask=inside)
    tl.store(PARTIAL + program * D + columns, partial, mask=inside)


class RMSNorm(torch.autograd.Function):
    """x [N, D], weight [D] -> x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019), computed in
    float32."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        N, D = x.shape
        rmsnorm_kernel[N,](x, weight, out, D, eps, BD=triton.next_power_of_2(D))
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        N, D = x.shape
        programs = triton.cdiv(N, ROWS_PER_PROGRAM)
        grad_x = torch.empty_like(x)
        partial = x.new_empty((programs, D), dtype=torch.float32)
        rmsnorm_backward_kernel[programs,](
            x, weight, grad.contiguous(), grad_x, partial, N, D, ctx.eps,
            ROWS=ROWS_PER_PROGRAM, BD=triton.next_power_of_2(D),
        )  # fmt: skip
        return grad_x, partial.sum(0).to(weight.dtype), None


@triton.jit
def rope_kernel(
    X, COS, SIN, OUT, HEADS, sign, HALF: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Turn each pair (a, b) = (x[i], x[i + HALF]) by its angle; X [N, HEADS, 2 HALF], one program a token.

    COS and SIN [N, HALF] are read once for all heads. sign = -1 turns back, which is the gradient.
    """
    token = tl.program_id(0).to(tl.int64)
    heads, columns = tl.arange(0, BH)[:, None], tl.arange(0, BD)[None, :]
    inside = (heads < HEADS) & (columns < HALF)
    cos = tl.load(COS + token * HALF + columns, mask=columns < HALF, other=0.0)
    sin = tl.load(SIN + token * HALF + columns, mask=columns < HALF, other=0.0) * sign
    offsets = (token * HEADS + heads) * (2 * HALF) + columns
    a = tl.load(X + offsets, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(X + offsets + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + offsets, (a * cos - b * sin).to(OUT.dtype.element_ty), mask=inside)
    tl.store(OUT + offsets + HALF, (b * cos + a * sin).to(OUT.dtype.element_ty), mask=inside)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    N, heads, D = x.shape
    x, out = x.contiguous(), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rope_kernel[N,](
        x, cos, sin, out, heads, sign,
        HALF=D // 2, BH=triton.next_power_of_2(heads), BD=triton.next_power_of_2(D // 2),
    )  # fmt: skip
    return out


class Rope(torch.autograd.Function):
    """Rotary positions (Su et al. 2021): x [N, heads, D] turned by angles whose cos and sin are [N, D /
    2]."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _turn(grad, *ctx.saved_tensors, -1.0), None, None


@triton.jit
def swiglu_kernel(GATE, UP, OUT, N, BLOCK: tl.constexpr):
    """OUT = silu(gate) up, silu(g) = g sigmoid(g); N elements."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(GATE + offsets, mask=offsets < N, other=0.0).to(tl.float32)
    up = tl.load(UP + offsets, mask=offsets < N, other=0.0).to(tl.float32)
    tl.store(OUT + offsets, (gate * tl.sigmoid(gate) * up).to(OUT.dtype.element_ty), mask=offsets < N)


@triton.jit
def swiglu_backward_kernel(GATE, UP, GRAD, GRAD_GATE, GRAD_UP, N, BLOCK: tl.constexpr):
    """With s = sigmoid(g):  dup = dy g s  and  dgate = dy up s (1 + g (1 - s))."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(GATE + offsets, mask=offsets < N, other=0.0).to(tl.float32)
    up = tl.load(UP + offsets, mask=offsets < N, other=0.0).to(tl.float32)
    grad = tl.load(GRAD + offsets, mask=offsets < N, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    grad_gate = grad * up * s * (1.0 + gate * (1.0 - s))
    tl.store(GRAD_GATE + offsets, grad_gate.to(GRAD_GATE.dtype.element_ty), mask=offsets < N)
    tl.store(GRAD_UP + offsets, (grad * gate * s).to(GRAD_UP.dtype.element_ty), mask=offsets < N)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up of two tensors of one shape (Shazeer 2020), computed in float32."""

    BLOCK = 1024

    @staticmethod
    def forward(ctx: FunctionCtx, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        N = gate.numel()
        swiglu_kernel[triton.cdiv(N, SwiGLU.BLOCK),](gate, up, out, N, BLOCK=SwiGLU.BLOCK)
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        N = gate.numel()
        swiglu_backward_kernel[triton.cdiv(N, SwiGLU.BLOCK),](
            gate, up, grad.contiguous(), grad_gate, grad_up, N, BLOCK=SwiGLU.BLOCK
        )
        return grad_gate, grad_up
