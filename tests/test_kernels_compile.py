"""The compile gate: every row of the table of tiles, compiled for GPUs that are not here, and held to its
budget.

Numerical tests cannot see a kernel that spills its registers, or that no longer uses the tensor cores. The
machine code can. `kernel_budgets.json` keeps the number of instructions of each hot loop;
`benchmarks/kernel_table.py --lower` writes it, and only ever lowers a number.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kernel_cases import not_interpreted

pytest.importorskip("triton", reason="Triton is not published for this system")

import compile_only
from triton.runtime import driver

from kernels import decode_attention

pytestmark = not_interpreted
BUDGETS = json.loads((Path(__file__).parent / "kernel_budgets.json").read_text())
# What the loop had in the first version that worked (64 or 128 keys x 128 or 64 queries, sm_90, head
# dimension 128).
CEILINGS = {"forward": 352, "dkdv": 381, "dq": 295}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def real_driver_afterwards() -> Iterator[None]:
    before = driver._active
    yield
    driver._active = before


def check(architecture: int, head_dim: int, dtype: torch.dtype, causal: bool, bounded: bool) -> None:
    """Compiles (Triton itself refuses what does not fit in shared memory), no spill in a hot loop, tensor
    cores."""
    variant = compile_only.variant_name(architecture, head_dim, dtype, causal, bounded)
    for name, kernel in compile_only.attention_kernels(
        architecture, head_dim, dtype, causal, bounded
    ).items():
        sass = compile_only.inspect_sass(kernel)
        assert sass.shared <= compile_only.SHARED_MEMORY[architecture], (variant, name)
        hot = sass.hot_loop()
        assert compile_only.spills(hot) == 0, (variant, name)
        assert bool(compile_only.tensor_core_instructions(hot)) == (dtype != FP32), (variant, name)
        if variant in BUDGETS:
            assert hot.total() <= BUDGETS[variant][name], (variant, name, "see the module's docstring")


@pytest.mark.parametrize("bounded", [False, True])
def test_hopper(bounded: bool) -> None:
    check(90, 128, BF16, True, bounded)


@pytest.mark.parametrize("architecture", [80, 89, 100, 120])
def test_other_architectures(architecture: int) -> None:
    check(architecture, 128, BF16, True, True)


def test_budgets_stay_under_the_ceilings() -> None:
    for variant in ("sm_90 D128 bfloat16 causal", "sm_90 D128 bfloat16 causal bounds"):
        for name, ceiling in CEILINGS.items():
            assert BUDGETS[variant][name] <= ceiling


@pytest.mark.slow
@pytest.mark.parametrize("causal, bounded", [(True, False), (True, True), (False, False), (False, True)])
@pytest.mark.parametrize("head_dim", [16, 64, 72, 80, 96, 128])
@pytest.mark.parametrize("architecture", [80, 89, 90, 100, 120])
def test_every_row_of_the_table(architecture: int, head_dim: int, causal: bool, bounded: bool) -> None:
    check(architecture, head_dim, BF16, causal, bounded)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", [FP16, FP32])
@pytest.mark.parametrize("architecture", [80, 89, 90, 100, 120])
def test_the_other_precisions(architecture: int, head_dim: int, dtype: torch.dtype) -> None:
    check(architecture, head_dim, dtype, True, True)


@pytest.mark.slow
def test_amd_compiles() -> None:
    """For information: nobody here has run it. The limit is that of one CDNA3 workgroup."""
    for kernel in compile_only.attention_kernels("gfx942", 128, BF16, True, True).values():
        assert (
            kernel.metadata.shared <= compile_only.SHARED_MEMORY["gfx942"] and "mfma" in kernel.asm["amdgcn"]
        )


@pytest.mark.parametrize("architecture", [80, 90])
def test_decoding_compiles(architecture: int) -> None:
    from kernels import decode

    compile_only.pretend(architecture)
    for kernel in (decode.split_kernel, decode.merge_kernel):
        compile_only.forget(kernel)
    q = torch.zeros(2, 8, 128, dtype=BF16)
    cache = torch.zeros(2, 4, 4096, 128, dtype=BF16)
    lengths = torch.full((2,), 4096, dtype=torch.int32)
    decode_attention(q, cache[:, :2], cache[:, 2:], lengths, impl="triton")
    split, merge = (
        compile_only.inspect_sass(compile_only.compiled(kernel)[0])
        for kernel in (decode.split_kernel, decode.merge_kernel)
    )
    assert compile_only.spills(split.hot_loop()) == compile_only.spills(merge.opcodes) == 0
    assert (
        split.shared <= compile_only.SHARED_MEMORY[89]
    )  # the smallest in the table, so that it fits everywhere


def test_teaching_kernels_compile() -> None:
    from kernels import pointwise

    compile_only.pretend(90)
    x = torch.zeros(64, 4096, dtype=BF16, requires_grad=True)
    pointwise.RMSNorm.apply(x, torch.ones(4096, dtype=BF16), 1e-6).sum().backward()
    pointwise.SwiGLU.apply(x, x).sum().backward()
    pointwise.Rope.apply(x.view(64, 32, 128), torch.ones(64, 64), torch.zeros(64, 64)).sum().backward()
    names = (
        "rmsnorm_kernel",
        "rmsnorm_backward_kernel",
        "rope_kernel",
        "swiglu_kernel",
        "swiglu_backward_kernel",
    )
    for name in names:
        for kernel in compile_only.compiled(getattr(pointwise, name)):
            assert compile_only.spills(compile_only.inspect_sass(kernel).opcodes) == 0, name
