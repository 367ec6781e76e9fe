"""Attention in Triton: softmax(scale * q k^T) v without ever storing the T x S scores, forward and backward.

The method is FlashAttention-2 (arXiv 2307.08691): a program owns one tile of rows of the result and walks
over tiles of the other side, keeping a running softmax. Written down for one query i, with the keys j that it
may see,

    s_j  = scale * log2(e) * q . k_j           so that exp(scale * q . k) = exp2(s): exp2 is the hardware's
    own lse  = log2(sum_j exp2(s_j))               the one number kept for the backward pass p_j  = exp2(s_j -
    lse)                     the softmax o    = sum_j p_j v_j

and backward, with do the gradient of o,

    delta = do . o                             (= sum_j p_j dp_j)
    dp_j  = do . v_j            ds_j = p_j (dp_j - delta)
    dv_j += p_j do              dk_j += scale ds_j q            dq = scale sum_j ds_j k_j

dK and dV are sums over queries and dQ is a sum over keys, so there are two backward kernels, and each writes
every element of its results once: no atomic additions, the same bits on every run.

Which tiles. The keys that a query sees are one interval, whose two ends never decrease from one query to the
next (`kernels.attention.Bounds`). For a tile of rows four numbers follow: tiles of keys before `begin` and
from `end` on are seen by no row and skipped; those in `full_begin .. full_end` are seen by every row and need
no mask; only the few in between are masked. The full tiles are the hot loop; `docs/kernels.md` draws this.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.attention import INTERPRETED, MAX_HEAD_DIM, Bounds

LOG2E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(float("inf"))


# ----------------------------------------------------------------------------------------------------
# Device side. Capitals: pointers, descriptors and compile-time constants. BM rows of queries meet BN rows of
# keys; D is the head dimension and BD the power of two that holds it.


@triton.jit
def _load_tile(
    X, strides, batch, head, start, count, ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    CHECK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Rows start .. start + ROWS of one head of X [batch, count, heads, D], as [ROWS, BD] filled up with
    zeros.

    With TMA, X is a descriptor and the copy engine does everything; else X is a pointer, and CHECK says that
    the tile may reach past row `count`.
    """
    if TMA:
        tile = X.load([batch, start, head, 0]).reshape(ROWS, BD)
    else:
        rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, BD)[None, :]
        # The offset of a tile can pass 2^31 elements; offsets inside it cannot.
        base = X + batch.to(tl.int64) * strides[0] + start.to(tl.int64) * strides[1] + head * strides[2]
        pointers = base + rows * strides[1] + columns
        if CHECK:
            tile = tl.load(pointers, mask=(start + rows < count) & (columns < D), other=0.0)
        elif D < BD:
            tile = tl.load(pointers, mask=columns < D, other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def _store_tile(
    X, tile, batch, head, heads, start, count, ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """The reverse of `_load_tile`, into a contiguous X [batch, count, heads, D]."""
    rows, columns = tl.arange(0, ROWS)[:, None], tl.arange(0, BD)[None, :]
    base = X + ((batch.to(tl.int64) * count + start) * heads + head) * D
    inside = (start + rows < count) & (columns < D)
    tl.store(base + rows * (heads * D) + columns, tile.to(X.dtype.element_ty), mask=inside)


@triton.jit
def _seen_keys(LO, HI, query, T, S, CAUSAL: tl.constexpr, BOUNDS: tl.constexpr):
    """The interval first <= key < last that a query (or each of a tile of queries) sees."""
    first = query * 0
    last = first + S
    if CAUSAL:
        last = tl.minimum(query + (S - T) + 1, S)  # the queries are the last T of the S positions
    if BOUNDS:
        first = tl.load(LO + query, mask=query < T, other=S)
        if not CAUSAL:
            last = tl.load(HI + query, mask=query < T, other=0)
    return first, last


@triton.jit
def _seeing_queries(LO, HI, key, T, S, CAUSAL: tl.constexpr, BOUNDS: tl.constexpr):
    """The interval first <= query < last of the queries that see a key: `_seen_keys` from the other side."""
    first = key * 0
    last = first + T
    if CAUSAL:
        first = tl.maximum(key - (S - T), 0)
    if BOUNDS:
        last = tl.load(HI + key, mask=key < S, other=0) - (S - T)
        if not CAUSAL:
            first = tl.load(LO + key, mask=key < S, other=T)
    return first, last


@triton.jit
def _plan(first_low, last_low, first_high, last_high, STEP: tl.constexpr):
    """Which tiles of STEP to visit, from the intervals of a tile's lowest and highest row.

    Returns where the tiles begin, where the full ones begin and end, the number of full ones and of the
    others.
    """
    begin = first_low // STEP * STEP
    stop = tl.maximum(tl.cdiv(last_high, STEP) * STEP, begin)
    full_begin = tl.maximum(tl.minimum(tl.cdiv(first_high, STEP) * STEP, stop), begin)
    full_end = tl.maximum(last_low // STEP * STEP, full_begin)
    full = (full_end - full_begin) // STEP
    return begin, full_begin, full_end, full, (stop - begin) // STEP - full


@triton.jit
def _tile_start(index, begin, full_begin, full_end, STEP: tl.constexpr, MASK: tl.constexpr):
    """Where the full tile number `index` starts; with MASK, the other tile number `index`."""
    if MASK:
        start = begin + index * STEP
        start = tl.where(start < full_begin, start, start + (full_end - full_begin))
    else:
        start = full_begin + index * STEP
    return start


@triton.jit
def _forward_tiles(
    acc, total, largest, q, K, V, LO, HI, k_strides, v_strides, batch, kv_head, rows, T, S, qk_scale,
    begin, full_begin, full_end, tiles, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    CAUSAL: tl.constexpr, BOUNDS: tl.constexpr, MASK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Carry the running softmax (acc, total, largest) over either the full tiles of keys, or the masked
    ones."""
    for index in tl.range(0, tiles, num_stages=1 if MASK else None):
        start = _tile_start(index, begin, full_begin, full_end, BN, MASK)
        k = _load_tile(K, k_strides, batch, kv_head, start, S, BN, D, BD, MASK, TMA)
        scores = tl.dot(q, k.T, input_precision="ieee")
        if MASK:
            first, last = _seen_keys(LO, HI, rows, T, S, CAUSAL, BOUNDS)
            keys = start + tl.arange(0, BN)[None, :]
            scores = tl.where((keys >= first[:, None]) & (keys < last[:, None]), scores * qk_scale, -INF)
            new_largest = tl.maximum(largest, tl.max(scores, 1))
            shift = tl.where(
                new_largest == -INF, 0.0, new_largest
            )  # a row that sees nothing yet: no inf - inf
            p = tl.exp2(scores - shift[:, None])
        else:
            new_largest = tl.maximum(largest, tl.max(scores, 1) * qk_scale)
            shift = new_largest
            p = tl.exp2(scores * qk_scale - shift[:, None])  # one fused multiply-add
        shrink = tl.exp2(largest - shift)
        total = total * shrink + tl.sum(p, 1)
        v = _load_tile(V, v_strides, batch, kv_head, start, S, BN, D, BD, MASK, TMA)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        largest = new_largest
    return acc, total, largest


@triton.jit
def forward_kernel(
    Q, K, V, OUT, LSE, LO, HI, q_strides, k_strides, v_strides, bounds_strides, scale, H, T, S,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    CAUSAL: tl.constexpr, BOUNDS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """OUT [B, T, H, D] and LSE [B, H, T]; one program a tile of BM queries of one head."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM  # causal: the longest rows first
    batch, head = tl.program_id(1) // H, tl.program_id(1) % H
    kv_head = head // GROUP
    if BOUNDS:
        LO += batch.to(tl.int64) * bounds_strides[0]
        HI += batch.to(tl.int64) * bounds_strides[1]
    first_low, last_low = _seen_keys(LO, HI, start, T, S, CAUSAL, BOUNDS)
    first_high, last_high = _seen_keys(LO, HI, tl.minimum(start + BM, T) - 1, T, S, CAUSAL, BOUNDS)
    begin, full_begin, full_end, full, others = _plan(first_low, last_low, first_high, last_high, BN)

    rows = start + tl.arange(0, BM)
    q = _load_tile(Q, q_strides, batch, head, start, T, BM, D, BD, True, TMA)
    acc = tl.zeros([BM, BD], tl.float32)
    total = tl.zeros([BM], tl.float32)
    largest = tl.full([BM], -INF, tl.float32)
    qk_scale = scale * LOG2E
    acc, total, largest = _forward_tiles(
        acc, total, largest, q, K, V, LO, HI, k_strides, v_strides, batch, kv_head, rows, T, S, qk_scale,
        begin, full_begin, full_end, full, BN, D, BD, CAUSAL, BOUNDS, False, TMA,
    )  # fmt: skip
    acc, total, largest = _forward_tiles(
        acc, total, largest, q, K, V, LO, HI, k_strides, v_strides, batch, kv_head, rows, T, S, qk_scale,
        begin, full_begin, full_end, others, BN, D, BD, CAUSAL, BOUNDS, True, TMA,
    )  # fmt: skip

    # A row that saw nothing: o = 0, and lse = +inf so that the backward pass finds p = exp2(s - inf) = 0.
    dead = total == 0.0
    total = tl.where(dead, 1.0, total)
    lse = tl.where(dead, INF, largest + tl.log2(total))
    tl.store(LSE + tl.program_id(1).to(tl.int64) * T + rows, lse, mask=rows < T)
    out = acc / total[:, None]
    _store_tile(OUT, out, batch, head, H, start, T, BM, D, BD)


@triton.jit
def delta_kernel(OUT, DO, DELTA, H, T, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr):
    """DELTA [B, H, T] = sum over D of OUT * DO, both [B, T, H, D]; from the stored, rounded OUT."""
    start = tl.program_id(0) * BM
    batch, head = tl.program_id(1) // H, tl.program_id(1) % H
    strides = (T * H * D, H * D, D)
    o = _load_tile(OUT, strides, batch, head, start, T, BM, D, BD, True, False).to(tl.float32)
    do = _load_tile(DO, strides, batch, head, start, T, BM, D, BD, True, False).to(tl.float32)
    rows = start + tl.arange(0, BM)
    tl.store(DELTA + tl.program_id(1).to(tl.int64) * T + rows, tl.sum(o * do, 1), mask=rows < T)


@triton.jit
def _dkdv_tiles(
    dk, dv, k, v, Q, DO, LSE, DELTA, LO, HI, q_strides, do_strides, batch, first_head, keys, T, S, qk_scale,
    begin, full_begin, full_end, tiles, GROUP: tl.constexpr, BM: tl.constexpr, D: tl.constexpr,
    BD: tl.constexpr, CAUSAL: tl.constexpr, BOUNDS: tl.constexpr, MASK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Add to dk and dv what either the full tiles of queries, or the masked ones, of all GROUP heads
    contribute.

    Everything is transposed (keys down, queries across), so that p and ds are already the left-hand sides of
    the two sums. One flat loop over (tile, head) rather than two nested ones: nothing but its own variables
    is alive in the hot loop, which fills all 255 registers as it is.
    """
    for index in tl.range(0, tiles * GROUP, num_stages=1 if MASK else None):
        start = _tile_start(index // GROUP, begin, full_begin, full_end, BM, MASK)
        head = index % GROUP
        rows = start + tl.arange(0, BM)
        q = _load_tile(Q, q_strides, batch, first_head + head, start, T, BM, D, BD, MASK, TMA)
        do = _load_tile(DO, do_strides, batch, first_head + head, start, T, BM, D, BD, MASK, TMA)
        lse = tl.load(LSE + head * T + rows, mask=rows < T if MASK else None, other=INF if MASK else None)
        scores = tl.dot(k, q.T, input_precision="ieee")  # [BN, BM]
        if MASK:
            first, last = _seeing_queries(LO, HI, keys, T, S, CAUSAL, BOUNDS)
            seen = (rows[None, :] >= first[:, None]) & (rows[None, :] < last[:, None])
            scores = tl.where(seen, scores, -INF)
        p = tl.exp2(scores * qk_scale - lse[None, :])
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dp = tl.dot(v, do.T, input_precision="ieee")
        delta = tl.load(DELTA + head * T + rows, mask=rows < T if MASK else None, other=0.0 if MASK else None)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def dkdv_kernel(
    Q, K, V, DO, LSE, DELTA, DK, DV, LO, HI, q_strides, k_strides, v_strides, bounds_strides, scale, KV, T, S,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    CAUSAL: tl.constexpr, BOUNDS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """DK and DV [B, S, KV, D]; one program a tile of BN keys of one key head, over all query heads that read
    it."""
    start = tl.program_id(0) * BN
    batch, kv_head = tl.program_id(1) // KV, tl.program_id(1) % KV
    first_head = kv_head * GROUP
    H = KV * GROUP
    if BOUNDS:
        LO += batch.to(tl.int64) * bounds_strides[0]
        HI += batch.to(tl.int64) * bounds_strides[1]
    LSE += (batch * H + first_head).to(tl.int64) * T
    DELTA += (batch * H + first_head).to(tl.int64) * T
    first_low, last_low = _seeing_queries(LO, HI, start, T, S, CAUSAL, BOUNDS)
    first_high, last_high = _seeing_queries(LO, HI, tl.minimum(start + BN, S) - 1, T, S, CAUSAL, BOUNDS)
    begin, full_begin, full_end, full, others = _plan(first_low, last_low, first_high, last_high, BM)

    keys = start + tl.arange(0, BN)
    k = _load_tile(K, k_strides, batch, kv_head, start, S, BN, D, BD, True, False)
    v = _load_tile(V, v_strides, batch, kv_head, start, S, BN, D, BD, True, False)
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BD], tl.float32)
    qk_scale = scale * LOG2E
    do_strides = (T * H * D, H * D, D)
    dk, dv = _dkdv_tiles(
        dk, dv, k, v, Q, DO, LSE, DELTA, LO, HI, q_strides, do_strides, batch, first_head, keys, T, S,
        qk_scale, begin, full_begin, full_end, full, GROUP, BM, D, BD, CAUSAL, BOUNDS, False, TMA,
    )  # fmt: skip
    dk, dv = _dkdv_tiles(
        dk, dv, k, v, Q, DO, LSE, DELTA, LO, HI, q_strides, do_strides, batch, first_head, keys, T, S,
        qk_scale, begin, full_begin, full_end, others, GROUP, BM, D, BD, CAUSAL, BOUNDS, True, TMA,
    )  # fmt: skip
    _store_tile(DK, dk * scale, batch, kv_head, KV, start, S, BN, D, BD)
    _store_tile(DV, dv, batch, kv_head, KV, start, S, BN, D, BD)


@triton.jit
def _dq_tiles(
    dq, q, do, lse, delta, K, V, LO, HI, k_strides, v_strides, batch, kv_head, rows, T, S, qk_scale,
    begin, full_begin, full_end, tiles, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    CAUSAL: tl.constexpr, BOUNDS: tl.constexpr, MASK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Add to dq what either the full tiles of keys, or the masked ones, contribute."""
    for index in tl.range(0, tiles, num_stages=1 if MASK else None):
        start = _tile_start(index, begin, full_begin, full_end, BN, MASK)
        k = _load_tile(K, k_strides, batch, kv_head, start, S, BN, D, BD, MASK, TMA)
        scores = tl.dot(q, k.T, input_precision="ieee")
        if MASK:
            first, last = _seen_keys(LO, HI, rows, T, S, CAUSAL, BOUNDS)
            keys = start + tl.arange(0, BN)[None, :]
            scores = tl.where((keys >= first[:, None]) & (keys < last[:, None]), scores, -INF)
        p = tl.exp2(scores * qk_scale - lse[:, None])
        v = _load_tile(V, v_strides, batch, kv_head, start, S, BN, D, BD, MASK, TMA)
        dp = tl.dot(do, v.T, input_precision="ieee")
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def dq_kernel(
    Q, K, V, DO, LSE, DELTA, DQ, LO, HI, q_strides, k_strides, v_strides, bounds_strides, scale, H, T, S,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    CAUSAL: tl.constexpr, BOUNDS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """DQ [B, T, H, D]; one program a tile of BM queries of one head, as in the forward pass."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BM
    batch, head = tl.program_id(1) // H, tl.program_id(1) % H
    kv_head = head // GROUP
    if BOUNDS:
        LO += batch.to(tl.int64) * bounds_strides[0]
        HI += batch.to(tl.int64) * bounds_strides[1]
    first_low, last_low = _seen_keys(LO, HI, start, T, S, CAUSAL, BOUNDS)
    first_high, last_high = _seen_keys(LO, HI, tl.minimum(start + BM, T) - 1, T, S, CAUSAL, BOUNDS)
    begin, full_begin, full_end, full, others = _plan(first_low, last_low, first_high, last_high, BN)

    rows = start + tl.arange(0, BM)
    q = _load_tile(Q, q_strides, batch, head, start, T, BM, D, BD, True, False)
    do = _load_tile(DO, (T * H * D, H * D, D), batch, head, start, T, BM, D, BD, True, False)
    row_offset = tl.program_id(1).to(tl.int64) * T + rows
    lse = tl.load(LSE + row_offset, mask=rows < T, other=INF)
    delta = tl.load(DELTA + row_offset, mask=rows < T, other=0.0)
    dq = tl.zeros([BM, BD], tl.float32)
    qk_scale = scale * LOG2E
    dq = _dq_tiles(
        dq, q, do, lse, delta, K, V, LO, HI, k_strides, v_strides, batch, kv_head, rows, T, S, qk_scale,
        begin, full_begin, full_end, full, BN, D, BD, CAUSAL, BOUNDS, False, TMA,
    )  # fmt: skip
    dq = _dq_tiles(
        dq, q, do, lse, delta, K, V, LO, HI, k_strides, v_strides, batch, kv_head, rows, T, S, qk_scale,
        begin, full_begin, full_end, others, BN, D, BD, CAUSAL, BOUNDS, True, TMA,
    )  # fmt: skip
    _store_tile(DQ, dq * scale, batch, head, H, start, T, BM, D, BD)


# ----------------------------------------------------------------------------------------------------
# Host side: which tiles, and the launches.


class Tiles(NamedTuple):
    """How one kernel is cut, and whether the copy engine (TMA) loads what its loop reads."""

    queries: int  # rows of queries that meet
    keys: int  # rows of keys
    warps: int
    stages: int  # of the pipeline of loads
    tma: bool = False


class Config(NamedTuple):
    """The tiles of the three kernels."""

    forward: Tiles
    dkdv: Tiles
    dq: Tiles


# (architecture, width of the tiles or a head dimension of its own, bytes of an element) -> Config. A fixed
# table rather than a search at run time: the same program on every run and every rank. Each row was chosen
# by compiling candidates and counting registers, spills, shared memory and instructions (docs/kernels.md).
# sm_80 also stands for 86 and 89, which have less shared memory; sm_90 has asynchronous matrix instructions
# and sm_100 a memory for their results, so theirs are larger.
WIDE_HOPPER = Config(Tiles(128, 64, 8, 3, True), Tiles(64, 128, 8, 2, True), Tiles(128, 64, 8, 2, True))
NARROW_HOPPER = Config(Tiles(128, 128, 8, 3, True), Tiles(64, 128, 8, 2, True), Tiles(128, 64, 8, 2, True))
EXACT = Config(Tiles(16, 16, 4, 1), Tiles(16, 16, 4, 1), Tiles(16, 16, 8, 1))  # float32: no tensor cores
PLAIN = Config(Tiles(64, 64, 4, 1), Tiles(64, 64, 4, 1), Tiles(64, 64, 4, 1))
CONFIGS: dict[tuple[str, int, int], Config] = {
    ("sm_80", 64, 2): Config(Tiles(128, 64, 8, 3), Tiles(32, 128, 8, 2), Tiles(128, 64, 8, 2)),
    ("sm_80", 128, 2): Config(Tiles(128, 32, 8, 3), Tiles(64, 64, 8, 2), Tiles(64, 64, 4, 2)),
    # SigLIP's heads: with columns to mask, the row above spills on sm_89.
    ("sm_80", 72, 2): Config(Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(64, 64, 4, 2)),
    ("sm_90", 64, 2): NARROW_HOPPER,
    ("sm_90", 128, 2): WIDE_HOPPER,
    ("sm_100", 64, 2): NARROW_HOPPER,
    ("sm_100", 128, 2): WIDE_HOPPER,
    ("sm_120", 64, 2): Config(Tiles(128, 64, 8, 3, True), Tiles(32, 128, 8, 2), Tiles(128, 64, 8, 2, True)),
    ("sm_120", 128, 2): Config(Tiles(128, 32, 8, 3, True), *2 * [Tiles(64, 64, 8, 2, True)]),
    **{(name, width, 2): PLAIN for name in ("amd", "interpreter") for width in (64, 128)},
    **{
        (name, width, 4): EXACT if name.startswith("sm") else PLAIN
        for name in ("sm_80", "sm_90", "sm_100", "sm_120", "amd", "interpreter")
        for width in (64, 128)
    },
}


def architecture() -> str:
    """The row of CONFIGS for the device that Triton compiles for."""
    if INTERPRETED:
        return "interpreter"
    target = driver.active.get_current_target()
    if target.backend == "hip":
        return "amd"
    return next(f"sm_{known}" for known in (120, 100, 90, 80) if target.arch >= known)


def config_for(q: Tensor) -> Config:
    """The tiles for these inputs: a matter of device, head dimension and precision."""
    name, head_dim, size = architecture(), q.shape[-1], q.element_size()
    return CONFIGS.get((name, head_dim, size)) or CONFIGS[name, 64 if head_dim <= 64 else 128, size]


def _width(head_dim: int) -> int:
    """Columns of a tile: tiles have powers of two, and matrix instructions take 16 at least."""
    return max(16, triton.next_power_of_2(head_dim))


def _source(x: Tensor, rows: int, width: int, tma: bool) -> Tensor | TensorDescriptor:
    """What a kernel loads tiles of `rows` rows from: x [B, S, heads, D] itself, or a descriptor of it."""
    return TensorDescriptor.from_tensor(x, [1, rows, 1, width]) if tma else x


def _loadable(x: Tensor) -> Tensor:
    """x, or a copy that the copy engine accepts: columns adjacent, other strides multiples of 16 bytes."""
    steps = [stride * x.element_size() for stride in x.stride()[:-1]]
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _bounds_arguments(
    B: int, lo: Tensor | None, hi: Tensor | None
) -> tuple[Tensor | None, Tensor | None, tuple]:
    """The two arrays, rows contiguous, and their batch strides (0 where one row serves the whole batch)."""
    if lo is None or hi is None:
        return None, None, (0, 0)
    lo, hi = (x.expand(B, -1) if x.stride(-1) == 1 else x.contiguous().expand(B, -1) for x in (lo, hi))
    return lo, hi, (lo.stride(0), hi.stride(0))


@torch.library.custom_op("nanomoxin::flash_forward", mutates_args=())
def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor | None, hi: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Returns o [B, T, H, D] and lse [B, H, T] float32, the base-2 logarithm of the softmax's denominator."""
    (B, T, H, D), (S, KV) = q.shape, k.shape[1:3]
    q, k, v = _loadable(q), _loadable(k), _loadable(v)
    lo, hi, bounds_strides = _bounds_arguments(B, lo, hi)
    o, lse = q.new_empty(q.shape), q.new_empty((B, H, T), dtype=torch.float32)
    width, tiles = _width(D), config_for(q).forward
    forward_kernel[triton.cdiv(T, tiles.queries), B * H](
        _source(q, tiles.queries, width, tiles.tma),
        _source(k, tiles.keys, width, tiles.tma),
        _source(v, tiles.keys, width, tiles.tma),
        o, lse, lo, hi, q.stride()[:3], k.stride()[:3], v.stride()[:3], bounds_strides, scale, H, T, S,
        GROUP=H // KV, BM=tiles.queries, BN=tiles.keys, D=D, BD=width,
        CAUSAL=causal, BOUNDS=lo is not None, TMA=tiles.tma, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return o, lse


@torch.library.custom_op("nanomoxin::flash_backward", mutates_args=())
def flash_backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, lo: Tensor | None, hi: Tensor | None,
    causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, from what `flash_forward` read and returned and the gradient do of its o."""
    (B, T, H, D), (S, KV) = q.shape, k.shape[1:3]
    q, k, v, do = _loadable(q), _loadable(k), _loadable(v), do.contiguous()
    lo, hi, bounds_strides = _bounds_arguments(B, lo, hi)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    delta = torch.empty_like(lse)
    config, width = config_for(q), _width(D)
    strides = q.stride()[:3], k.stride()[:3], v.stride()[:3], bounds_strides
    common = dict(GROUP=H // KV, D=D, BD=width, CAUSAL=causal, BOUNDS=lo is not None)

    delta_kernel[triton.cdiv(T, 64), B * H](o, do, delta, H, T, D=D, BD=width, BM=64)

    tiles = config.dkdv
    q_source, do_source = (_source(x, tiles.queries, width, tiles.tma) for x in (q, do))
    dkdv_kernel[triton.cdiv(S, tiles.keys), B * KV](
        q_source, k, v, do_source, lse, delta, dk, dv, lo, hi, *strides, scale, KV, T, S,
        BM=tiles.queries, BN=tiles.keys, TMA=tiles.tma, **common,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    tiles = config.dq
    k_source, v_source = (_source(x, tiles.keys, width, tiles.tma) for x in (k, v))
    dq_kernel[triton.cdiv(T, tiles.queries), B * H](
        q, k_source, v_source, do, lse, delta, dq, lo, hi, *strides, scale, H, T, S,
        BM=tiles.queries, BN=tiles.keys, TMA=tiles.tma, **common,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return dq, dk, dv


# Operators of their own, so that compilation, activation checkpointing and sharding treat each as one step
# whose shapes they know, and never look inside.


@flash_forward.register_fake
def _(q, k, v, lo, hi, causal, scale):
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, T), dtype=torch.float32)


@flash_backward.register_fake
def _(q, k, v, o, lse, do, lo, hi, causal, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx, inputs, output):
    q, k, v, lo, hi, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, lo, hi, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, do, dlse):
    """dlse is not used: `flash_attention` returns o alone, so nothing can depend on lse."""
    q, k, v, lo, hi, o, lse = ctx.saved_tensors
    return *flash_backward(q, k, v, o, lse, do, lo, hi, ctx.causal, ctx.scale), None, None, None, None


flash_forward.register_autograd(_backward, setup_context=_save_for_backward)


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, bounds: Bounds | None, causal: bool, scale: float
) -> Tensor:
    """`kernels.attention` with impl="triton". Raises ValueError on what the kernels do not cover."""
    head_dim = q.shape[-1]
    if head_dim > MAX_HEAD_DIM or head_dim % 8 or scale <= 0:
        raise ValueError(
            f"triton attention needs a head dimension up to {MAX_HEAD_DIM}, a multiple of 8, and "
            f"scale > 0: not {head_dim} and {scale}"
        )
    lo, hi = (None, None) if bounds is None else bounds
    return flash_forward(q, k, v, lo, hi, causal, scale)[0]
