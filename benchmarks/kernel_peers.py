"""Counts what other people's attention kernels compile to for sm_90, beside ours, on a machine without a GPU.

    python benchmarks/kernel_peers.py [--fla FOLDER] [--tritonbench FOLDER]

--fla: where `pip install --no-deps --target FOLDER fla-core flash-linear-attention einops` put fla.
--tritonbench: a checkout of pytorch-labs/tritonbench, which keeps a copy of the Triton tutorial's kernels.

FlexAttention's template comes with PyTorch. Bfloat16, causal, head dimension 128, 8 query heads over 2 key
heads where the peer has groups. Tiles are equal (128 x 64 forward and dQ, 64 x 128 dK/dV, 8 warps) unless
said otherwise; stages are each peer's own. Counts are not speed, and a peer gets one configuration where ours
was chosen among several: read them as what a program looks like to the hardware, no more.
"""

import argparse
import importlib.util
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import compile_only
import jinja2
import torch
import triton

B, T, H, KV, D = 2, 1024, 8, 2, 128
TILES = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_M1": 64, "BLOCK_N1": 128, "BLOCK_M2": 128, "BLOCK_N2": 64}


def report(name: str, kernel: triton.JITFunction) -> None:
    """Print a row of the table for each specialisation of a kernel: its loops that use the tensor cores."""
    while not hasattr(kernel, "device_caches"):
        kernel = kernel.fn  # inside autotuning and heuristics
    for binary in compile_only.compiled(kernel):
        sass = compile_only.inspect_sass(binary)
        loops = [loop for loop in sass.loops if compile_only.tensor_core_instructions(loop)]
        cells = [f"{loop.total()} ({loop['LDL']}/{loop['STL']}), {loop['HGMMA']} HGMMA" for loop in loops]
        spills = f"{sass.opcodes['LDL']}/{sass.opcodes['STL']}"
        shape = f"{binary.metadata.num_warps} warps, {binary.metadata.num_stages} stages"
        print(f"| {name} | {shape} | {sass.registers} | {spills} | {'; '.join(cells)} |", flush=True)


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def ours() -> None:
    for name, kernel in compile_only.attention_kernels(90, D, torch.bfloat16, True, False).items():
        sass = compile_only.inspect_sass(kernel)
        loop = sass.hot_loop()
        spills = f"{sass.opcodes['LDL']}/{sass.opcodes['STL']}"
        cell = f"{loop.total()} ({loop['LDL']}/{loop['STL']}), {loop['HGMMA']} HGMMA (hot loop)"
        shape = f"{kernel.metadata.num_warps} warps, {kernel.metadata.num_stages} stages"
        print(f"| ours, {name} | {shape} | {sass.registers} | {spills} | {cell} |", flush=True)


def fla(folder: Path) -> None:
    """fla's parallel_attn, as it calls itself on a Hopper GPU."""
    sys.path.insert(0, str(folder))
    import fla.ops.attn.parallel as attn

    attn.check_shared_mem = lambda architecture, *rest: architecture == "hopper"
    q, k, v = (torch.zeros(B, T, heads, D, dtype=torch.bfloat16) for heads in (H, KV, KV))
    out, lse = attn.parallel_attn_fwd(q, k, v, None, None, 0.1, None)
    attn.parallel_attn_bwd(q, k, v, out, None, lse, torch.zeros_like(out), None, 0.1, None)
    label = f"fla-core {version('fla-core')}"
    report(f"{label}, forward", attn.parallel_attn_fwd_kernel)
    report(f"{label}, dK/dV", attn.parallel_attn_bwd_kernel_dkv)
    report(f"{label}, dQ", attn.parallel_attn_bwd_kernel_dq)


class FlexTemplate:
    """The few functions that FlexAttention's templates call while they are rendered, for one causal case."""

    def __init__(self, sizes: dict[str, tuple[int, ...]], stages: int) -> None:
        self.sizes = sizes  # every argument's shape, contiguous
        self.constants = {
            "SM_SCALE": D**-0.5, "GQA_SHARED_HEADS": H // KV, "HAS_FULL_BLOCKS": True, "IS_DIVISIBLE": True,
            "QK_HEAD_DIM": D, "QK_HEAD_DIM_ROUNDED": D, "V_HEAD_DIM": D, "V_HEAD_DIM_ROUNDED": D,
            "SAFE_HEAD_DIM": True, "PRESCALE_QK": False, "ROWS_GUARANTEED_SAFE": False, "WRITE_DQ": True,
            "BLOCKS_ARE_CONTIGUOUS": False, "OUTPUT_LOGSUMEXP": True, "OUTPUT_MAX": False, "USE_TMA": False,
            "FLOAT32_PRECISION": "'ieee'", "INDEX_DTYPE": "tl.int32", "SPARSE_Q_BLOCK_SIZE": 128,
            "SPARSE_KV_BLOCK_SIZE": 128, **TILES,
        }  # fmt: skip
        self.stages = stages

    def stride(self, name: str, dimension: int | None = None) -> str:
        sizes, strides, step = self.sizes[name], [], 1
        for size in reversed(sizes):
            strides.insert(0, step)
            step *= size
        return ", ".join(map(str, strides)) if dimension is None else str(strides[dimension])

    def def_kernel(self, *names: str) -> str:
        self.names = (*names, "RESULT")
        head = (
            f"import triton\nimport triton.language as tl\n\n\n@triton.jit\ndef flex({self.arguments()}):\n"
        )
        return head + "".join(f"    {name} = arg_{name}\n" for name in names) + f"    {self.defines(1)}"

    def arguments(self) -> str:
        return ", ".join(f"arg_{name}" for name in self.names)

    def defines(self, levels: int = 0) -> str:
        lines = [f"{name}: tl.constexpr = {value}" for name, value in self.constants.items()]
        return ("\n" + "    " * levels).join(lines)

    def modification(self, subgraph_number: int, output_name: str | None, **names) -> str:
        """Scores and gradients as they are, and the causal mask; nothing captured has a gradient."""
        if output_name is None:
            return ""
        value = names.get("grad_score_mod") or names.get("score")
        if output_name == "mask_mod_output":
            value = f"{names['m']} >= {names['n']}"
        return f"{output_name} = {value}"

    def store_output(self, indices: tuple[str, ...], value: str, mask: str, **options) -> str:
        heads = H if "idx_hq" in indices else KV
        z, h, row, column = indices
        pointer = f"arg_RESULT + (({z} * {heads} + {h}) * {T} + {row}) * {D} + {column}"
        return f"tl.store({pointer}, {value}.to(arg_RESULT.dtype.element_ty), mask={mask})"

    def render(self, source: str) -> str:
        def indent_except_first(text: str, levels: int) -> str:
            return text.replace("\n", "\n" + "    " * levels)

        environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
        environment.filters["indent_except_first"] = indent_except_first
        return environment.from_string(source).render(
            def_kernel=self.def_kernel, size=lambda name, i: self.sizes[name][i], stride=self.stride,
            gen_argdefs=self.arguments, gen_defines=self.defines, modification=self.modification,
            store_output=self.store_output, **self.constants,
        )  # fmt: skip

    def compile(self, source: str) -> triton.JITFunction:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "flex.py"
            path.write_text(self.render(source))
            kernel = load("flex", path).flex
            tensors = [
                torch.zeros(
                    self.sizes[name],
                    dtype=torch.int32 if "BLKS" in name or "IDX" in name
                    else torch.float32 if name in ("LSE", "MAX", "DELTA") else torch.bfloat16,
                )
                for name in self.names
            ]  # fmt: skip
            kernel[(1,)](*tensors, num_warps=8, num_stages=self.stages)
        return kernel


def flex() -> None:
    """FlexAttention's templates with a causal mask; stages are PyTorch's default for an H100."""
    from torch._inductor.kernel.flex.common import load_flex_template

    query, key, row, blocks = (B, H, T, D), (B, KV, T, D), (B, H, T), T // 128
    counts, indices = (1, 1, blocks), (1, 1, blocks, blocks)
    sizes = {"Q": query, "K": key, "V": key, "LSE": row, "MAX": row, "DELTA": row, "DO": query, "DQ": query,
             "DV": key, "RESULT": query}  # fmt: skip
    for side in ("KV", "Q"):
        for kind in ("", "FULL_"):
            sizes[f"{kind}{side}_NUM_BLKS"], sizes[f"{kind}{side}_IDX"] = counts, indices
    label = f"FlexAttention's template, torch {torch.__version__.split('+')[0]}"
    shared = load_flex_template("utilities")
    forward = load_flex_template("flex_attention") + shared + load_flex_template("common")
    report(f"{label}, forward (masked, full)", FlexTemplate(sizes, stages=3).compile(forward))
    backward = load_flex_template("flex_backwards") + shared
    report(f"{label}, backward (dQ and dK/dV in one)", FlexTemplate(sizes, stages=3).compile(backward))


def tutorial(folder: Path) -> None:
    """The tutorial's kernels as tritonbench keeps them (causal, no groups); backward also as shipped."""
    sys.path.insert(0, str(folder))
    from tritonbench.kernels import triton_fused_attention as attn

    query, rows = torch.zeros(B, H, T, D, dtype=torch.bfloat16), torch.zeros(B, H, T)
    forward, strides = attn._attn_fwd_base_opt.fn, query.stride()  # without its search among configurations
    forward[(T // 128, B * H)](
        query, query, query, 0.1, rows, query, None, None, None, None, *strides, *strides, *strides, *strides,
        B, H, N_CTX=T, HEAD_DIM=D, STAGE=3, BLOCK_M=128, BLOCK_N=64, ENABLE_TMA=False, ENABLE_WS=False,
        LOOP_SCHEDULE="default", num_warps=8, num_stages=3,
    )  # fmt: skip
    report("tutorial, forward", forward)
    for label, tiles, warps, stages in (
        ("equal tiles", (64, 128, 128, 64), 8, 2),
        ("as shipped, tiles 32 x 128", (32, 128, 128, 32), 4, 5),
    ):
        compile_only.forget(attn._attn_bwd)
        sizes = dict(zip(("BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2"), tiles, strict=True))
        attn._attn_bwd[(T // 128, 1, B * H)](
            query, query, query, 0.1, query, query, query, query, rows, rows, *strides, H, T,
            BLK_SLICE_FACTOR=2, HEAD_DIM=D, **sizes, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        report(f"tutorial, backward, {label} (dK/dV and dQ in one)", attn._attn_bwd)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fla", type=Path, help="folder with fla-core, flash-linear-attention and einops")
    parser.add_argument("--tritonbench", type=Path, help="checkout of pytorch-labs/tritonbench")
    arguments = parser.parse_args()
    compile_only.pretend(90)
    torch.cuda.get_device_name = lambda device=None: "NVIDIA H100"
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    print(
        f"triton {triton.__version__}, sm_90; loops on the tensor cores: instructions (spill loads/stores)\n"
    )
    print("| kernel | shape | registers | spills | loops |")
    print("|---|---|---|---|---|")
    ours()
    flex()
    if arguments.fla:
        fla(arguments.fla)
    if arguments.tritonbench:
        tutorial(arguments.tritonbench)


if __name__ == "__main__":
    main()
