"""One query a sequence against a long cache of keys, in Triton: the step that `generate` repeats for every
token.

There is hardly any arithmetic here; the time goes into reading the cache once, so all of the GPU must take
part in reading it, though a batch of one has only a few heads to share out. The keys are therefore cut into
splits, each of which one program attends to, leaving a partial result and the logarithm of its denominator; a
second kernel merges:

    o = sum_s 2^(lse_s - m) o_s / sum_s 2^(lse_s - m),      m = max_s lse_s

(Flash-Decoding; Dao et al., 2023). The query heads that read the same key head are the rows of one tile, so
that the cache is read once for all of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.flash import INF, LOG2E

KEYS_PER_SPLIT = 256  # 8 key heads and 4096 keys then make 128 programs: a sequence alone fills an H100


@triton.jit
def split_kernel(
    Q, K, V, PARTIAL, LSE, LENGTHS, q_strides, k_strides, v_strides, scale, KV, splits,
    GROUP: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """PARTIAL [B, H, splits, D] and LSE [B, H, splits], float32; one program a split of one key head's
    cache."""
    batch, kv_head = tl.program_id(0) // KV, tl.program_id(0) % KV
    split = tl.program_id(1)
    length = tl.load(LENGTHS + batch)
    begin, end = split * SPLIT, tl.minimum((split + 1) * SPLIT, length)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BD)
    head = kv_head * GROUP + rows  # ROWS >= GROUP: the rest is padding for the matrix unit
    real, inside = rows < GROUP, columns < D
    q_offsets = batch.to(tl.int64) * q_strides[0] + head[:, None] * q_strides[1] + columns[None, :]
    q = tl.load(Q + q_offsets, mask=real[:, None] & inside[None, :], other=0.0)
    K += batch.to(tl.int64) * k_strides[0] + kv_head.to(tl.int64) * k_strides[1]
    V += batch.to(tl.int64) * v_strides[0] + kv_head.to(tl.int64) * v_strides[1]

    acc = tl.zeros([ROWS, BD], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    largest = tl.full([ROWS], -INF, tl.float32)
    for start in range(begin, end, BN):
        keys = start + tl.arange(0, BN)
        mask = (keys[:, None] < end) & inside[None, :]
        k = tl.load(K + keys[:, None] * k_strides[2] + columns[None, :], mask=mask, other=0.0)
        v = tl.load(V + keys[:, None] * v_strides[2] + columns[None, :], mask=mask, other=0.0)
        scores = tl.dot(q, k.T, input_precision="ieee") * (scale * LOG2E)
        scores = tl.where(keys[None, :] < end, scores, -INF)
        new_largest = tl.maximum(largest, tl.max(scores, 1))  # finite: a tile has a key at least
        p = tl.exp2(scores - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        largest = new_largest

    row = (batch.to(tl.int64) * KV * GROUP + head) * splits + split
    if begin < end:
        tl.store(LSE + row, largest + tl.log2(total), mask=real)
        out = acc / total[:, None]
        tl.store(PARTIAL + row[:, None] * D + columns[None, :], out, mask=real[:, None] & inside[None, :])
    else:
        tl.store(LSE + row, tl.full([ROWS], -INF, tl.float32), mask=real)


@triton.jit
def merge_kernel(
    PARTIAL, LSE, OUT, splits, SPLITS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """OUT [B, H, D]; one program a head. SPLITS is the power of two that holds `splits`."""
    row = tl.program_id(0).to(tl.int64)
    split, columns = tl.arange(0, SPLITS), tl.arange(0, BD)
    lse = tl.load(LSE + row * splits + split, mask=split < splits, other=-INF)
    largest = tl.maximum(
        tl.max(lse, 0), -1e30
    )  # finite, even where every split is empty: the result is then 0
    weight = tl.exp2(lse - largest)
    # An empty split was never written: it must not be read either.
    mask = (lse[:, None] > -INF) & (columns[None, :] < D)
    partial = tl.load(PARTIAL + (row * splits + split[:, None]) * D + columns[None, :], mask=mask, other=0.0)
    total = tl.sum(weight, 0)
    out = tl.sum(partial * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(OUT + row * D + columns, out.to(OUT.dtype.element_ty), mask=columns < D)


@torch.library.custom_op("nanomoxin::decode", mutates_args=())
def flash_decode(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """`kernels.decode_attention` with impl="triton": q [B, H, D] over keys and values [B, KV, S, D]."""
    (B, H, D), (KV, S) = q.shape, keys.shape[1:3]
    q, keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, keys, values))
    splits, group, width = triton.cdiv(S, KEYS_PER_SPLIT), H // KV, max(16, triton.next_power_of_2(D))
    partial = q.new_empty((B, H, splits, D), dtype=torch.float32)
    lse = q.new_empty((B, H, splits), dtype=torch.float32)
    out = q.new_empty(q.shape)
    split_kernel[B * KV, splits](
        q, keys, values, partial, lse, lengths, q.stride()[:2], keys.stride()[:3], values.stride()[:3],
        scale, KV, splits, GROUP=group, ROWS=max(16, triton.next_power_of_2(group)),
        BN=64 if q.element_size() == 2 else 16, SPLIT=KEYS_PER_SPLIT, D=D, BD=width,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    merge_kernel[B * H,](partial, lse, out, splits, SPLITS=triton.next_power_of_2(splits), D=D, BD=width)
    return out


@flash_decode.register_fake
def _(q, keys, values, lengths, scale):
    return q.new_empty(q.shape)
