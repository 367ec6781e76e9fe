"""A kernel with two faults that can be switched on, to see that the sanitizer finds them."""

import triton
import triton.language as tl


@triton.jit
def copy_kernel(X, OUT, N, OFFSET: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr):
    """OUT = X; OFFSET reads that many elements too far on; SHARED lets every program write the first
    block."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    target = tl.arange(0, BLOCK) if SHARED else index
    tl.store(OUT + target, tl.load(X + index + OFFSET), mask=index < N)
