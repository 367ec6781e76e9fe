"""Compile Triton kernels for GPUs that are not there, and read what came out.

`pretend(80)` makes Triton believe in an A100 and so on: an ordinary call of an ordinary wrapper with CPU
tensors then specialises and compiles each kernel as it would on that GPU, launches nothing, and
`compiled(kernel)` returns the results. `inspect_sass` disassembles one of them with the tools that Triton
ships.
"""

import importlib
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import ty_to_cpp
from triton.compiler.compiler import max_shared_mem
from triton.runtime import driver

from kernels import attention, make_bounds

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Bytes of shared memory that one block may use: CUDA programming guide, table of compute capabilities; CDNA3
# manual.
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376, "gfx942": 65536}


class _Utilities:
    """The part of a Triton driver that loads binaries: answers for a device, loads nothing."""

    def __init__(self, architecture: int | str) -> None:
        self.architecture = architecture

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_MEMORY[self.architecture],
            "multiprocessor_count": 132,
            "warpSize": 32,
        }

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: int
    ) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, most threads in a block


class _Driver:
    """What the Triton runtime asks of a driver, for a GPU of the given architecture."""

    def __init__(self, architecture: int | str) -> None:
        kind, warp = ("hip", 64) if isinstance(architecture, str) else ("cuda", 32)
        self.target = GPUTarget(kind, architecture, warp)
        self.utils = _Utilities(architecture)

    def launcher_cls(self, source: object, metadata: object) -> object:
        return lambda *arguments: None

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        return ty_to_cpp(name)


def pretend(architecture: int | str) -> None:
    """From now on Triton compiles for this architecture: 90 for sm_90, or an AMD name such as gfx942."""
    driver.set_active(_Driver(architecture))
    max_shared_mem.cache_clear()  # remembered by device number, and ours is always 0


def compiled(kernel: triton.JITFunction) -> list[triton.compiler.CompiledKernel]:
    """Every specialisation compiled so far, in order."""
    return list(kernel.device_caches[0][0].values())


def forget(kernel: triton.JITFunction) -> None:
    """Drop the specialisations, so that the next call compiles for the architecture now pretended."""
    kernel.device_caches.clear()


@dataclass
class Sass:
    """What the disassembly of one kernel shows."""

    registers: int
    shared: int  # bytes
    opcodes: Counter[str]  # the whole kernel: opcode without suffixes -> count
    loops: list[Counter[str]]  # the innermost loops, in order of address

    def hot_loop(self) -> Counter[str]:
        """The loop of tiles that need no mask: the shortest of those that multiply matrices.

        On the tensor cores, or in float32 by hundreds of ordinary multiply-adds.
        """
        multiplying = [loop for loop in self.loops if tensor_core_instructions(loop)]
        multiplying = multiplying or [loop for loop in self.loops if loop["FFMA"] + loop["FFMA2"] >= 100]
        return min(multiplying, key=Counter.total)


def tensor_core_instructions(opcodes: Counter[str]) -> int:
    """sm_80..89 and sm_120: HMMA; sm_90: HGMMA; sm_100: UTCHMMA."""
    return sum(opcodes[name] for name in ("HMMA", "HGMMA", "UTCHMMA"))


def spills(opcodes: Counter[str]) -> int:
    """Loads and stores of local memory: registers that did not fit."""
    return opcodes["LDL"] + opcodes["STL"]


INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")
LABEL = re.compile(r"(\.L_\w+):")
BRANCH = re.compile(r"\bBRA\b.*?(\.L_\w+)")


def inspect_sass(kernel: triton.compiler.CompiledKernel) -> Sass:
    """Disassemble a kernel compiled for an NVIDIA architecture. Needs Triton's own cuobjdump and nvdisasm."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        listing = _run("nvdisasm", "-c", file.name)
    instructions: list[tuple[int, str]] = []
    labels: dict[str, int] = {}  # name -> index of the instruction after it
    branches: list[tuple[int, str]] = []
    for line in listing.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := INSTRUCTION.match(line):
            if branch := BRANCH.search(line):
                branches.append((len(instructions), branch[1]))
            instructions.append((int(instruction[1], 16), instruction[2]))
    spans = [(labels[name], end) for end, name in branches if labels[name] < end]
    innermost = [
        (a, b) for a, b in spans if not any((a, b) != (c, d) and a <= c and d <= b for c, d in spans)
    ]
    names = [name for _, name in instructions]
    return Sass(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        shared=kernel.metadata.shared,
        opcodes=Counter(names),
        loops=[Counter(names[a : b + 1]) for a, b in sorted(innermost)],
    )


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def attention_kernels(
    architecture: int | str, head_dim: int, dtype: torch.dtype, causal: bool, bounded: bool
) -> dict[str, triton.compiler.CompiledKernel]:
    """The three attention kernels as `kernels.attention` launches them on that GPU: 8 query heads over 2 key
    heads."""
    flash = importlib.import_module("kernels.flash")
    entries = {"forward": flash.forward_kernel, "dkdv": flash.dkdv_kernel, "dq": flash.dq_kernel}
    pretend(architecture)
    for entry in entries.values():
        forget(entry)
    q, k, v = (torch.zeros(2, 1024, heads, head_dim, dtype=dtype, requires_grad=True) for heads in (8, 2, 2))
    bounds = make_bounds(1024, window=100) if bounded else None
    attention(q, k, v, bounds, causal, impl="triton").sum().backward()
    return {name: compiled(entry)[0] for name, entry in entries.items()}


def variant_name(architecture: int, head_dim: int, dtype: torch.dtype, causal: bool, bounded: bool) -> str:
    """What the tables call it: sm_90 D128 bfloat16 causal bounds."""
    words = f"sm_{architecture} D{head_dim} {str(dtype).removeprefix('torch.')}"
    return words + " causal" * causal + " bounds" * bounded
