"""Attention on a GPU: time, TFLOP/s and memory of ours and of PyTorch's implementations.

    python benchmarks/attention.py               on a GPU: one table for each shape below
    python benchmarks/attention.py --interpret   without one: toy shapes in Triton's interpreter

The second compares results and times nothing: it is there so that this file cannot rot unnoticed.

Providers: math (the definition), sdpa (PyTorch's choice of kernel), varlen (torch.nn.attention.varlen), flex
(compiled FlexAttention with a block mask) and triton (ours). FLOPs are those of the visible scores: 4 H D for
each query and key that meet forward, 2.5 times that backward, as FlashAttention's authors count. A provider
that does not cover a shape prints the reason.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton

import torch
import triton
from torch import Tensor

from kernels import Bounds, attention, make_bounds
from kernels.attention import visible

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}  # dense bfloat16, SXM, from the data sheets


class Shape(NamedTuple):
    name: str
    B: int
    T: int
    heads: tuple[int, int]  # of queries, of keys
    D: int
    causal: bool = True
    window: int = 0
    document: int = 0  # length of each packed document; 0 = one


SHAPES = [
    Shape("Moxin, 4k", 4, 4096, (32, 8), 128),
    Shape("Moxin, 32k, window 4096", 1, 32768, (32, 8), 128, window=4096),
    Shape("Moxin, 16k of packed documents of 1k", 1, 16384, (32, 8), 128, document=1024),
    Shape("DINOv2, 256 patches", 32, 256, (16, 16), 64, causal=False),
    Shape("SigLIP, 729 patches", 32, 729, (16, 16), 72, causal=False),
]
TOYS = [
    Shape("causal", 1, 40, (4, 2), 16),
    Shape("window", 1, 40, (4, 2), 16, window=7),
    Shape("packed", 1, 40, (2, 2), 16, document=13),
    Shape("vision", 2, 20, (2, 2), 24, causal=False),
]
Step = Callable[[Tensor, Tensor, Tensor], Tensor]


class NotCovered(Exception):
    """This provider cannot compute this shape; the message says why."""


def documents(shape: Shape, device: str) -> Tensor:
    """The document of each position [T]."""
    return torch.arange(shape.T, device=device) // (shape.document or shape.T)


def bounds_of(shape: Shape, device: str) -> Bounds | None:
    if not shape.window and not shape.document:
        return None
    return make_bounds(shape.T, shape.window, documents(shape, device).expand(shape.B, -1))


def math(shape: Shape, device: str) -> Step:
    bounds = bounds_of(shape, device)
    if shape.B * shape.heads[0] * shape.T**2 * 4 > 24e9:
        raise NotCovered("the scores alone would take more than 24 GB")
    return lambda q, k, v: attention(q, k, v, bounds, shape.causal, impl="reference")


def sdpa(shape: Shape, device: str) -> Step:
    bounds = bounds_of(shape, device)
    return lambda q, k, v: attention(q, k, v, bounds, shape.causal, impl="sdpa")


def ours(shape: Shape, device: str) -> Step:
    bounds = bounds_of(shape, device)
    return lambda q, k, v: attention(q, k, v, bounds, shape.causal, impl="triton")


def varlen(shape: Shape, device: str) -> Step:
    if device == "cpu":
        raise NotCovered("no CPU kernel")
    from torch.nn.attention.varlen import varlen_attn

    length = shape.document or shape.T
    starts = torch.arange(0, shape.B * shape.T + 1, length, device=device, dtype=torch.int32)
    window = (shape.window - 1 if shape.window else -1, 0 if shape.causal else -1)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        grouped = shape.heads[0] != shape.heads[1]
        out = varlen_attn(*flat, starts, starts, length, length, window_size=window, enable_gqa=grouped)
        return out.view_as(q)

    return step


def flex(shape: Shape, device: str) -> Step:
    if device == "cpu":
        raise NotCovered("no backward on the CPU")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    document = documents(shape, device)

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = document[query] == document[key]
        if shape.causal:
            allowed = allowed & (key <= query)
        return allowed & (query - key < shape.window) if shape.window else allowed

    mask = create_block_mask(seen, None, None, shape.T, shape.T, device=device)
    compiled = torch.compile(flex_attention)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)

    return step


PROVIDERS = {"math": math, "sdpa": sdpa, "varlen": varlen, "flex": flex, "triton": ours}


def pairs(shape: Shape) -> int:
    """Queries and keys that meet, over the batch."""
    if not shape.causal:
        return shape.B * shape.T**2
    position = torch.arange(shape.T)
    first = make_bounds(shape.T, shape.window, documents(shape, "cpu")[None]).lo[0]
    return shape.B * int((position - first + 1).sum())


def inputs(shape: Shape, device: str, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    H, KV = shape.heads
    sizes = [(shape.B, shape.T, heads, shape.D) for heads in (H, KV, KV)]
    return [torch.randn(size, device=device, dtype=dtype, requires_grad=True) for size in sizes]


def time_on_gpu(shape: Shape) -> None:
    """Print one table: median of many runs, forward and backward apart; memory is the peak above the
    inputs."""
    name = torch.cuda.get_device_name()
    peak = next((tflops for model, tflops in PEAK_TFLOPS.items() if model in name), float("nan"))
    flops = 4 * pairs(shape) * shape.heads[0] * shape.D
    tensors = inputs(shape, "cuda", torch.bfloat16)
    exact = None
    print(f"\n### {shape.name}: B {shape.B}, T {shape.T}, heads {shape.heads}, D {shape.D}\n")
    print("| | fwd ms | TFLOP/s | of peak | bwd ms | TFLOP/s | of peak | peak MB | difference from math |")
    print("|---|---|---|---|---|---|---|---|---|")
    for label, provider in PROVIDERS.items():
        try:
            step = provider(shape, "cuda")
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            out = step(*tensors)
            gradient = torch.randn_like(out)
            out.backward(gradient, retain_graph=True)
            memory = (torch.cuda.max_memory_allocated() - before) / 1e6
            forward = triton.testing.do_bench(lambda step=step: step(*tensors), return_mode="median")
            backward = triton.testing.do_bench(
                lambda out=out, gradient=gradient: out.backward(gradient, retain_graph=True),
                grad_to_none=tensors,
                return_mode="median",
            )
        except (NotCovered, RuntimeError) as reason:  # out of memory and unsupported shapes are RuntimeErrors
            print(f"| {label} | {str(reason).splitlines()[0][:90]} |")
            continue
        exact = out if label == "math" else exact
        difference = "" if exact is None else f"{(out - exact).abs().max().item():.1e}"
        speeds = flops / forward / 1e9, 2.5 * flops / backward / 1e9
        cells = [
            f"{ms:.3f} | {s:.0f} | {s / peak:.0%}" for ms, s in zip((forward, backward), speeds, strict=True)
        ]
        print(f"| {label} | {cells[0]} | {cells[1]} | {memory:.0f} | {difference} |", flush=True)


def compare_in_interpreter(shape: Shape) -> None:
    """Print how far each provider that runs on a CPU is from the definition; raise if it is too far."""
    tensors = inputs(shape, "cpu", torch.float32)
    mask = visible(shape.T, shape.T, bounds_of(shape, "cpu"), shape.causal, torch.device("cpu"))
    assert pairs(shape) == int(mask.sum()) * shape.B // mask.shape[0]
    exact = math(shape, "cpu")(*tensors)
    for label, provider in PROVIDERS.items():
        try:
            difference = (provider(shape, "cpu")(*tensors) - exact).abs().max().item()
        except NotCovered as reason:
            print(f"{shape.name:8} {label:7} {reason}")
            continue
        print(f"{shape.name:8} {label:7} largest difference {difference:.1e}")
        if difference > 1e-5:
            raise SystemExit(f"{label} is wrong on {shape.name}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--interpret", action="store_true", help="toy shapes on the CPU, compared and not timed"
    )
    if parser.parse_args().interpret:
        for shape in TOYS:
            compare_in_interpreter(shape)
    elif torch.cuda.is_available():
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
        for shape in SHAPES:
            time_on_gpu(shape)
    else:
        raise SystemExit(
            "benchmarks/attention.py: no CUDA device here; --interpret runs toy shapes without one"
        )


if __name__ == "__main__":
    main()
