"""Attention: the bounds, the three implementations, and the Triton kernels against float64."""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from kernel_cases import DEVICE, error, guarded, only_interpreted, plain_attention, runs_kernels
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kernels import Bounds, attention, make_bounds
from kernels.attention import INTERPRETED, choose, visible

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


# ----------------------------------------------------------------------------------------------------
# The bounds and the implementations in PyTorch.


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 1, 3, 40])
@pytest.mark.parametrize("documents", [None, "long", "single tokens"])
@pytest.mark.parametrize("lengths", [None, [0, 5, 12]])
def test_bounds_say_what_was_asked(
    causal: bool, window: int, documents: str | None, lengths: list | None
) -> None:
    T, B = 12, 3
    ids = None
    if documents is not None:
        ids = (
            torch.arange(T).expand(B, T)
            if documents == "single tokens"
            else torch.tensor([[7] * 4 + [2] * 8] * B)
        )
    bounds = make_bounds(T, window, ids, None if lengths is None else torch.tensor(lengths))
    seen = visible(T, T, bounds, causal, torch.device("cpu")).expand(B, T, T)
    for b in range(B):
        for i in range(T):
            for j in range(T):
                expected = (
                    (not causal or j <= i)
                    and (window == 0 or abs(i - j) < window)
                    and (ids is None or bool(ids[b, i] == ids[b, j]))
                    and (lengths is None or max(i, j) < lengths[b])
                )
                assert bool(seen[b, i, j]) == expected, (b, i, j)
    for array in bounds:
        assert array.dtype == torch.int32 and bool((array.diff(dim=1) >= 0).all())


def test_bounds_know_who_sees_a_key() -> None:
    """hi is lo from the other side: key j is seen by exactly the causal queries j <= i < hi[j]."""
    bounds = make_bounds(50, window=9, doc_ids=torch.tensor([[0] * 13 + [1] * 30 + [2] * 7]))
    seen = visible(50, 50, bounds, True, torch.device("cpu"))[0]
    query = torch.arange(50)
    by_key = (query[None, :] >= query[:, None]) & (query[None, :] < bounds.hi[0, :, None])  # [key, query]
    assert torch.equal(by_key.T, seen)


MASKS = {
    "none": {},
    "window": {"window": 7},
    "documents": {"doc_ids": torch.tensor([[0] * 5 + [1] * 20 + [2] * 8, [0] + [1] * 31 + [2]])},
    "padding": {"lengths": torch.tensor([0, 20]), "window": 3},
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_sdpa_equals_the_definition(causal: bool, mask: str) -> None:
    q, k, v = (torch.randn(2, 33, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    bounds = make_bounds(33, **MASKS[mask]) if MASKS[mask] else None
    outputs = [attention(q, k, v, bounds, causal, impl=impl) for impl in ("sdpa", "reference")]
    torch.testing.assert_close(*outputs)
    gradients = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in outputs]
    torch.testing.assert_close(*gradients, atol=5e-5, rtol=1e-4)
    if mask == "padding":
        assert not outputs[0][0].any() and not outputs[0][1, 20:].any() and not gradients[0][0][0].any()


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
@pytest.mark.parametrize("T", [1, 4])
def test_queries_are_the_last_positions(impl: str, T: int) -> None:
    q, k, v = torch.randn(2, 33, 4, 16), torch.randn(2, 33, 2, 16), torch.randn(2, 33, 2, 16)
    whole = attention(q, k, v, impl=impl)
    torch.testing.assert_close(attention(q[:, -T:], k, v, impl=impl), whole[:, -T:])
    bounds = make_bounds(33, window=5)
    cut = Bounds(bounds.lo[:, -T:], bounds.hi)
    torch.testing.assert_close(attention(q[:, -T:], k, v, cut, impl=impl), attention(q, k, v, bounds)[:, -T:])


def test_one_mask_serves_all_layers() -> None:
    bounds = make_bounds(8, window=3)
    q = torch.randn(1, 8, 2, 16)
    attention(q, q, q, bounds, impl="sdpa")
    mask = bounds.lo.mask
    attention(q, q, q, bounds, impl="sdpa")
    assert bounds.lo.mask is mask
    attention(q, q, q, bounds, causal=False, impl="sdpa")
    assert bounds.lo.mask is not mask


def test_shapes_that_do_not_fit_are_refused() -> None:
    q, k = torch.randn(1, 4, 3, 16), torch.randn(1, 4, 2, 16)
    with pytest.raises(ValueError, match="do not fit together"):
        attention(q, k, k)
    q, k = torch.randn(1, 5, 2, 16), torch.randn(1, 4, 2, 16)
    with pytest.raises(ValueError, match="T <= S"):
        attention(q, k, k)
    with pytest.raises(ValueError, match="bounds are for 3 queries"):
        attention(k, k, k, make_bounds(3))
    with pytest.raises(ValueError, match="head dimension"):
        attention(*3 * [torch.randn(1, 4, 2, 136)], impl="triton")


def test_the_choice_depends_on_the_shape_alone() -> None:
    kernels_run_here = INTERPRETED or DEVICE == "cuda"
    assert choose(torch.empty(1, 4, 2, 128, device=DEVICE)) == ("triton" if kernels_run_here else "sdpa")
    assert choose(torch.empty(1, 4, 2, 256, device=DEVICE)) == "sdpa"


def test_our_package_is_no_burden_to_others() -> None:
    """transformers asks any package named kernels for its version: ours has none, and does not bring in
    Triton."""
    program = (
        "import sys, kernels; assert 'triton' not in sys.modules and not hasattr(kernels, '__version__')\n"
        "from transformers import MistralForCausalLM; assert sys.modules['kernels'] is kernels"
    )
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ----------------------------------------------------------------------------------------------------
# The Triton kernels.


class Case(NamedTuple):
    S: int  # keys
    D: int
    heads: tuple[int, int] = (2, 2)  # of queries, of keys
    tiles: tuple[int, int] = (32, 32)  # queries, keys that meet at a time (in the interpreter)
    dtype: torch.dtype = FP32
    window: int = 0
    documents: tuple[int, ...] = ()  # lengths; batch row 1 has them in reverse
    lengths: tuple[int, int] | None = None
    T: int = 0  # queries, where fewer than keys
    causal: bool = True
    tma: bool = False
    gradient: str = "plain"  # or expanded, transposed


CASES = [
    Case(1, 16),
    Case(1, 64, (4, 2), (16, 16), BF16, window=1),
    Case(31, 72, (4, 1), (64, 16), FP16),
    Case(33, 128, (2, 2), (16, 32), FP32, window=7, tma=True),
    Case(33, 16, (32, 8), (64, 64), FP32),
    Case(65, 80, (4, 2), (16, 64), BF16, window=33),
    Case(65, 96, (2, 2), (64, 32), FP16, documents=(1, 33, 31), tma=True),
    Case(65, 64, (4, 2), (32, 64), FP32, lengths=(65, 20)),
    Case(65, 16, (2, 2), (64, 64), FP32, documents=(1,) * 65),
    Case(97, 64, (4, 1), (64, 16), FP32, window=200),
    Case(97, 72, (2, 2), (32, 64), FP32, causal=False, tma=True),
    Case(97, 64, (4, 2), (64, 32), BF16, documents=(40, 1, 56), window=33, tma=True, gradient="transposed"),
    Case(130, 128, (4, 2), (128, 64), BF16, tma=True),
    Case(130, 96, (2, 2), (64, 32), FP32, window=7, lengths=(0, 100)),
    Case(130, 80, (2, 2), (32, 64), FP32, documents=(64, 66), causal=False),
    Case(130, 16, (4, 1), (16, 128), FP16, window=33, causal=False, gradient="expanded"),
    Case(200, 64, (4, 1), (128, 128), FP32, T=70),
    Case(200, 128, (2, 2), (64, 128), FP32, T=33, window=7, tma=True),
    Case(200, 16, (4, 2), (32, 64), FP32, T=130, documents=(90, 1, 109)),
    Case(200, 72, (2, 2), (128, 64), FP16, window=1),
    Case(257, 64, (2, 2), (64, 128), FP16, documents=(100, 28, 129), tma=True),
    Case(257, 16, (4, 2), (128, 64), FP32, gradient="expanded"),
    Case(257, 80, (2, 2), (128, 128), BF16, lengths=(200, 3), causal=False),
]


@contextmanager
def cut_into(tiles: tuple[int, int], tma: bool) -> Iterator[None]:
    """In the interpreter, where any tile works, the three kernels with these tiles; on a GPU, its own."""
    flash = importlib.import_module("kernels.flash")
    usual = flash.config_for
    cut = flash.Tiles(*tiles, warps=4, stages=1, tma=tma)
    if INTERPRETED:
        flash.config_for = lambda q: flash.Config(cut, cut, cut)
    try:
        yield
    finally:
        flash.config_for = usual


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Bounds | None]:
    (H, KV), T = case.heads, case.T or case.S
    q = guarded((2, T, H, case.D), case.dtype, seed=1)
    k, v = (guarded((2, case.S, KV, case.D), case.dtype, seed=seed) for seed in (2, 3))
    ids = None
    if case.documents:
        runs = torch.tensor(case.documents), torch.tensor(case.documents[::-1])
        ids = torch.stack([torch.arange(len(run)).repeat_interleave(run) for run in runs]).to(DEVICE)
    if not (case.window or case.documents or case.lengths):
        return q, k, v, None
    lengths = None if case.lengths is None else torch.tensor(case.lengths, device=DEVICE)
    bounds = make_bounds(case.S, case.window, ids, lengths, device=DEVICE)
    return q, k, v, Bounds(bounds.lo[:, case.S - T :], bounds.hi)


def gradient_like(out: Tensor, kind: str) -> Tensor:
    torch.manual_seed(4)
    if kind == "expanded":
        return torch.randn((), device=out.device, dtype=out.dtype).expand(out.shape)
    random = torch.randn(out.shape, device=out.device, dtype=out.dtype)
    return random.transpose(1, 3).contiguous().transpose(1, 3) if kind == "transposed" else random


def run(case: Case, function, tensors: list[Tensor], bounds: Bounds | None) -> list[Tensor]:
    """The output of an attention function, and its gradients of q, k and v."""
    out = function(*tensors, bounds, case.causal)
    gradient = gradient_like(out.to(case.dtype), case.gradient).to(out.dtype)
    return [out, *torch.autograd.grad(out, tensors, gradient)]


@runs_kernels
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)).replace(" ", ""))
def test_kernel_is_as_exact_as_pytorch(case: Case) -> None:
    """Error against float64 at most twice (gradients: three times) that of plain PyTorch in the same
    precision."""
    *tensors, bounds = inputs(case)
    wide = [x.detach().double().requires_grad_() for x in tensors]
    narrow = [x.detach().clone().requires_grad_() for x in tensors]

    def kernel(*arguments):
        return attention(*arguments, impl="triton")

    with cut_into(case.tiles, case.tma):
        ours = run(case, kernel, tensors, bounds)
        again = run(case, kernel, tensors, bounds) if case.S in (65, 97) else ours
    exact = run(case, lambda *arguments: attention(*arguments, impl="reference"), wide, bounds)
    plain = run(case, plain_attention, narrow, bounds)
    for name, got, twice, truth, yardstick, factor in zip(
        ("o", "dq", "dk", "dv"), ours, again, exact, plain, (2, 3, 3, 3), strict=True
    ):
        assert torch.equal(got, twice), f"{name} differs on a second run"
        # Where each query sees one key PyTorch is exact: allow the rounding of the result, and for a gradient
        # that is zero in truth, that of the two float32 sums whose difference it is.
        rounding = torch.finfo(case.dtype).eps * truth.abs().max().item() if truth.any() else 1e-5
        assert error(got, truth) <= max(factor * error(yardstick, truth), rounding), name
    seen = visible(tensors[0].shape[1], case.S, bounds, case.causal, tensors[0].device).any(-1)
    dead = ~seen.expand(2, -1)
    assert not ours[0][dead].any() and not ours[1][dead].any()


@only_interpreted
@pytest.mark.parametrize("index", [1, 5, 6, 7, 8, 15])
def test_kernel_stays_inside_its_tensors(index: int) -> None:
    """Every address belongs to an argument, and no two programs write the same one."""
    import interpreter

    case = CASES[index]
    *tensors, bounds = inputs(case)
    with cut_into(case.tiles, case.tma), interpreter.watched() as faults:
        run(case, lambda *arguments: attention(*arguments, impl="triton"), tensors, bounds)
    assert not faults, faults[:5]


@only_interpreted
def test_kernel_sanitizer_finds_planted_faults() -> None:
    import interpreter
    import planted_faults

    x, out = torch.arange(8.0), torch.zeros(8)
    with interpreter.watched() as faults:
        planted_faults.copy_kernel[2,](x, out, 8, OFFSET=0, SHARED=False, BLOCK=4)
    assert not faults and torch.equal(x, out)
    with interpreter.watched() as faults:
        planted_faults.copy_kernel[2,](x, out, 8, OFFSET=1, SHARED=False, BLOCK=4)
    assert any("outside" in fault for fault in faults)
    with interpreter.watched() as faults:
        planted_faults.copy_kernel[2,](x, out, 8, OFFSET=0, SHARED=True, BLOCK=4)
    assert any("same address" in fault for fault in faults)


@only_interpreted
def test_kernel_interpreter_rounds_bfloat16_as_pytorch_does() -> None:
    import interpreter

    bits = torch.randint(
        -(2**31), 2**31 - 1, (4096,), dtype=torch.int32, generator=torch.Generator().manual_seed(0)
    )
    values = bits.view(torch.float32)
    rounded = torch.from_numpy(interpreter.float32_to_bfloat16(values.numpy()).view("int16")).view(BF16)
    finite = ~values.isnan()
    assert torch.equal(rounded[finite], values.to(BF16)[finite]) and bool(rounded[~finite].isnan().all())
    back = torch.from_numpy(interpreter.bfloat16_to_float32(rounded.view(torch.int16).numpy().view("uint16")))
    assert torch.equal(back[finite], rounded.float()[finite])


@runs_kernels
@pytest.mark.parametrize("case", [Case(33, 16, (4, 2), window=7), Case(33, 16, causal=False)])
def test_kernel_passes_opcheck(case: Case) -> None:
    from kernels.flash import flash_backward, flash_forward

    q, k, v, bounds = inputs(case)
    lo, hi = bounds or (None, None)
    torch.library.opcheck(flash_forward, (q, k, v, lo, hi, case.causal, 0.25))
    q, k, v = q.detach(), k.detach(), v.detach()
    o, lse = flash_forward(q, k, v, lo, hi, case.causal, 0.25)
    torch.library.opcheck(flash_backward, (q, k, v, o, lse, torch.randn_like(o), lo, hi, case.causal, 0.25))


def keep_attention(context, operator, *args, **kwargs) -> CheckpointPolicy:
    ours = operator is torch.ops.nanomoxin.flash_forward.default
    return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE


def selective_contexts() -> tuple:
    return create_selective_checkpoint_contexts(keep_attention)


class Layers(nn.Module):
    """Two layers of attention, as small as they can be."""

    def __init__(self, recompute: str = "none") -> None:
        super().__init__()
        self.recompute = recompute
        self.layers = nn.ModuleList([nn.Linear(32, 64, bias=False) for _ in range(2)])

    def block(self, layer: nn.Linear, x: Tensor, bounds: Bounds) -> Tensor:
        q, k, v = layer(x).split([32, 16, 16], dim=-1)  # strided views of one tensor
        out = attention(q.unflatten(-1, (2, 16)), k.unflatten(-1, (1, 16)), v.unflatten(-1, (1, 16)), bounds)
        return x + out.flatten(2)

    def forward(self, x: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        bounds = Bounds(lo, hi)
        for layer in self.layers:
            if self.recompute == "none":
                x = self.block(layer, x, bounds)
            elif self.recompute == "full":
                x = checkpoint(self.block, layer, x, bounds, use_reentrant=False)
            else:
                x = checkpoint(
                    self.block, layer, x, bounds, use_reentrant=False, context_fn=selective_contexts
                )
        return x


def layer_results(compiled: bool, recompute: str) -> list[Tensor]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Layers(recompute).to(DEVICE)
    x = torch.randn(2, 33, 32, device=DEVICE)
    function = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    out = function(x, *make_bounds(33, window=9, device=DEVICE))
    return [out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))]


@runs_kernels
def test_kernel_gives_the_same_bits_compiled_and_recomputed() -> None:
    eager = layer_results(False, "none")
    for compiled in (False, True):
        for recompute in ("none", "full", "selective"):
            for got, expected in zip(layer_results(compiled, recompute), eager, strict=True):
                assert torch.equal(got, expected), (compiled, recompute)


@runs_kernels
def test_kernel_result_is_kept_by_selective_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    flash = importlib.import_module("kernels.flash")
    config_for, calls = flash.config_for, []
    monkeypatch.setattr(flash, "config_for", lambda q: calls.append(1) or config_for(q))
    layer_results(False, "selective")
    kept = len(calls)
    layer_results(False, "full")
    assert (
        kept == 4 and len(calls) - kept == 6
    )  # forward and backward of two layers; full repeats the forwards


def shard_and_run(rank: int, folder: str) -> None:
    """One of two processes: the layers under FSDP2, each with half of the batch; rank 0 writes the
    gradients."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    store = dist.FileStore(os.path.join(folder, "store"), 2)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=store)
    torch.manual_seed(0)
    model = Layers("full")
    x = 0.3 * torch.randn(2, 33, 32)[rank : rank + 1]
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    model(x, *make_bounds(33, window=9)).square().mean().backward()
    gradients = [parameter.grad.full_tensor() for parameter in model.parameters()]
    if rank == 0:
        torch.save(gradients, os.path.join(folder, "gradients.pt"))
    dist.destroy_process_group()


@only_interpreted
def test_kernel_under_fsdp_equals_one_process(tmp_path) -> None:
    import multiprocessing

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=shard_and_run, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    torch.manual_seed(0)
    model = Layers()
    out = model(0.3 * torch.randn(2, 33, 32), *make_bounds(33, window=9))
    expected = torch.autograd.grad(out.square().mean(), list(model.parameters()))
    for got, alone in zip(torch.load(tmp_path / "gradients.pt"), expected, strict=True):
        assert (got - alone).abs().max() <= 1e-8
