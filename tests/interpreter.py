"""Make Triton's interpreter a strict place to test kernels in: exact bfloat16, checked addresses, fewer
seconds.

With TRITON_INTERPRET=1 a kernel runs as numpy code, block by block. Three things are mended here, all by
replacing methods of the interpreter (Triton 3.7):

- It keeps bfloat16 as bit patterns in uint16, multiplies those in `tl.dot`, and truncates float32 to
bfloat16. - It reads and writes any address. `watched` allows only those of a launch's own arguments, and no
address may be
  written by two programs of one launch: on a GPU their order is anybody's guess.
- It looks through the whole language again for things to replace at each call of one device function by
another.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """Exact: a bfloat16 is the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round to nearest, ties to even, as the hardware and PyTorch do."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def _is_bfloat16(dtype: tl.dtype) -> bool:
    return dtype.scalar == tl.bfloat16


def install() -> None:
    """Mend bfloat16 and the repeated search, for the rest of this process."""
    dot, cast, convert = Builder.create_dot, Builder.cast_impl, Builder.create_fp_to_fp
    run = interpreter.GridExecutor.__call__

    def exact(handle: Handle) -> Handle:
        if _is_bfloat16(handle.dtype):
            return Handle(bfloat16_to_float32(handle.data), tl.float32)
        return handle

    def create_dot(self, a, b, *rest):
        return dot(self, exact(a), exact(b), *rest)

    def cast_impl(self, source, target):
        if _is_bfloat16(target) and not _is_bfloat16(source.dtype):
            return Handle(float32_to_bfloat16(source.data.astype(np.float32)), tl.bfloat16)
        return cast(self, source if _is_bfloat16(target) else exact(source), target)

    def create_fp_to_fp(self, source, target, rounding):
        if _is_bfloat16(source.dtype) or _is_bfloat16(target):
            return cast_impl(self, source, target)
        return convert(self, source, target, rounding)

    prepared: set[int] = set()  # modules whose view of the language is replaced, in the present launch

    def launch(self, *arguments, **keywords):
        prepared.clear()
        return run(self, *arguments, **keywords)

    def call_device_function(self, *arguments, **keywords):
        if id(self.fn.__globals__) not in prepared:
            interpreter._patch_lang(self.fn)
            prepared.add(id(self.fn.__globals__))
        return self.rewrite()(*arguments, **keywords)

    Builder.create_dot, Builder.cast_impl, Builder.create_fp_to_fp = create_dot, cast_impl, create_fp_to_fp
    interpreter.GridExecutor.__call__, interpreter.InterpretedFunction.__call__ = launch, call_device_function


@contextmanager
def watched() -> Iterator[list[str]]:
    """Yields a list that collects what kernels do wrong meanwhile: empty means clean."""
    faults: list[str] = []
    writers: dict[int, tuple] = {}  # address -> the program that wrote it, in the present launch
    load, store, call = (
        Builder.create_masked_load,
        Builder.create_masked_store,
        interpreter.GridExecutor.__call__,
    )
    ranges: list[tuple[int, int]] = []

    def active(pointers: Handle, mask: Handle) -> np.ndarray:
        addresses, chosen = np.broadcast_arrays(pointers.data, mask.data)
        addresses = addresses[chosen.astype(bool)].astype(np.int64)
        size = pointers.get_element_ty().primitive_bitwidth // 8
        inside = np.zeros(addresses.shape, dtype=bool)
        for begin, end in ranges:
            inside |= (addresses >= begin) & (addresses + size <= end)
        if not inside.all():
            faults.append(f"{(~inside).sum()} addresses outside every tensor")
        return addresses

    def create_masked_load(self, pointers, mask, *rest, **options):
        active(pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def create_masked_store(self, pointers, value, mask, *rest):
        program = tuple(int(index) for index in self.grid_idx)
        for address in active(pointers, mask).ravel().tolist():
            if writers.setdefault(address, program) != program:
                faults.append(f"programs {writers[address]} and {program} write the same address")
                break
        return store(self, pointers, value, mask, *rest)

    def launch(self, *arguments, **keywords):
        writers.clear()
        views = [getattr(argument, "base", argument) for argument in arguments]
        known = [x for x in views if isinstance(x, torch.Tensor)]
        ranges[:] = [(x.data_ptr(), x.data_ptr() + _extent(x)) for x in known]
        return call(self, *arguments, **keywords)

    Builder.create_masked_load, Builder.create_masked_store = create_masked_load, create_masked_store
    interpreter.GridExecutor.__call__ = launch
    try:
        yield faults
    finally:
        Builder.create_masked_load, Builder.create_masked_store = load, store
        interpreter.GridExecutor.__call__ = call


def _extent(x: torch.Tensor) -> int:
    """Bytes from the first element of a (strided) view to the end of its last one."""
    if x.numel() == 0:
        return 0
    return (
        sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) + 1
    ) * x.element_size()
