"""Attention: one entry point, one way to say who sees whom, three implementations.

    out[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j]      over the keys j that query i may see

`reference` writes that sum down. `sdpa` hands it to PyTorch. `triton` is ours, in `kernels/flash.py`. All
three read the same two integer arrays (`Bounds`), which express causal order, sliding windows, packed
documents and padding.
"""

import os
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Impl = Literal["auto", "triton", "sdpa", "reference"]

# Triton runs kernels as plain Python on CPU tensors when this is set before it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = find_spec("triton") is not None  # it is published for Linux only
# Of the Triton kernels: with wider heads (MOSS: 256) their tiles would not fit in shared memory.
MAX_HEAD_DIM = 128


class Bounds(NamedTuple):
    """Which keys each query sees. Both arrays never decrease along a row; positions count from the first key.

    A causal query i sees the keys lo[i] <= j <= i, so that key j is seen by the queries j <= i < hi[j].
    Without causal order the relation is symmetric, and i sees lo[i] <= j < hi[i].
    """

    lo: Tensor  # [B, T] int32: the first key that the query sees
    hi: Tensor  # [B, S] int32: one past the last query that sees the key


def make_bounds(
    T: int,
    window: int = 0,
    doc_ids: Tensor | None = None,
    lengths: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Bounds:
    """Bounds of self-attention over T positions; every restriction given is applied.

    window: each query sees itself and the window - 1 keys before it (and, without causal order, after it); 0
    = all.
    doc_ids: [B, T] integers, constant over a document: no attention across a change of value.
    lengths: [B] integers: positions from lengths[b] on are padding, neither seeing nor seen.
    device: where to put them when neither tensor says so. Returns arrays [B, T], B = 1 when neither tensor is
    given.
    """
    given = doc_ids if doc_ids is not None else lengths
    batch, device = (1, device) if given is None else (given.shape[0], given.device)
    position = torch.arange(T, device=device, dtype=torch.int32).expand(batch, T)
    lo, hi = torch.zeros_like(position), torch.full_like(position, T)
    if doc_ids is not None:
        changes = (doc_ids[:, 1:] != doc_ids[:, :-1]).cumsum(1)
        document = F.pad(changes, (1, 0)).contiguous()  # [B, T] counts up from 0
        lo = torch.maximum(lo, torch.searchsorted(document, document, out_int32=True))
        hi = torch.minimum(hi, torch.searchsorted(document, document, right=True, out_int32=True))
    if window:
        lo = torch.maximum(lo, position - (window - 1))
        hi = torch.minimum(hi, position + window)
    if lengths is not None:
        length = lengths[:, None].to(torch.int32)
        lo = torch.where(position < length, lo, T)  # a padding query sees nothing
        hi = torch.minimum(hi, length)  # and nothing past the end sees a key
    return Bounds(lo.contiguous(), hi.contiguous())


def visible(T: int, S: int, bounds: Bounds | None, causal: bool, device: torch.device) -> Tensor:
    """The bounds spelled out as a boolean mask [B or 1, T, S]: True where the query sees the key."""
    query = torch.arange(S - T, S, device=device)[:, None]
    key = torch.arange(S, device=device)
    if bounds is None:
        return (key <= query if causal else torch.ones(T, S, dtype=torch.bool, device=device))[None]
    mask = key >= bounds.lo[:, :, None]
    return mask & (key <= query) if causal else mask & (key < bounds.hi[:, :, None])


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Bounds | None = None,
    causal: bool = True,
    scale: float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Attention of q [B, T, H, D] over k, v [B, S, KV, D], shaped and typed like q.

    Query head h reads key head h // (H / KV). Causal queries are the last T of the S positions, so a cached
    prefix needs no special case. A query that sees no key gives 0, and passes no gradient. scale: 1 / sqrt(D)
    unless given. impl: auto = triton on a CUDA device (or in the interpreter) up to head dimension 128, else
    sdpa; it depends on where and what shape q is, never on values. Raises ValueError on shapes that do not
    fit together.
    """
    (B, T, H, D), (S, KV) = q.shape, k.shape[1:3]
    if k.shape != v.shape or k.shape != (B, S, KV, D) or H % KV:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    if causal and T > S or bounds is not None and not causal and T != S:
        raise ValueError(f"{T} queries over {S} keys: causal needs T <= S, bounds without causal need T == S")
    if bounds is not None:
        bounds = Bounds(*bounds)
        if bounds.lo.shape[1] != T or bounds.hi.shape[1] != S:
            sizes = f"{bounds.lo.shape[1]} queries and {bounds.hi.shape[1]} keys"
            raise ValueError(f"bounds are for {sizes}, not for {T} and {S}")
    scale = D**-0.5 if scale is None else scale
    if impl == "auto":
        impl = choose(q)
    if impl == "triton":
        from kernels.flash import flash_attention

        return flash_attention(q, k, v, bounds, causal, scale)
    return {"sdpa": sdpa_attention, "reference": reference_attention}[impl](q, k, v, bounds, causal, scale)


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, scale: float | None = None, impl: Impl = "auto"
) -> Tensor:
    """One query a sequence over its cache: q [B, H, D], keys and values [B, KV, S, D], without gradients.

    Sequence b has filled the first lengths[b] (int32) places of its cache. Their order is of no matter, so a
    rolling buffer that has wrapped around is one whose every place is filled. Returns [B, H, D]; 0 for an
    empty cache.
    """
    B, H, D = q.shape
    scale = D**-0.5 if scale is None else scale
    if (choose(q) if impl == "auto" else impl) == "triton":
        from kernels.decode import flash_decode

        return flash_decode(q, keys, values, lengths, scale)
    filled = torch.arange(keys.shape[2], device=q.device) < lengths[:, None]  # [B, S]
    grouped = q.unflatten(1, (keys.shape[1], -1))  # the heads of a group stand as queries of their key head
    mask = filled[:, None, None, :]
    return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale).flatten(1, 2)


def choose(q: Tensor) -> Impl:
    """The implementation that `auto` stands for: a matter of the device and the head dimension only."""
    kernels_run_here = INTERPRETED or q.is_cuda and HAS_TRITON
    covered = q.shape[-1] <= MAX_HEAD_DIM and q.shape[-1] % 8 == 0
    return "triton" if kernels_run_here and covered else "sdpa"


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, bounds: Bounds | None, causal: bool, scale: float
) -> Tensor:
    """The definition, with the whole score matrix in memory; in float32, or float64 for float64 inputs."""
    (B, T, H, D), (S, KV) = q.shape, k.shape[1:3]
    dtype = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(dtype).unflatten(2, (KV, H // KV))
    scores = scale * torch.einsum("btkgd,bskd->bkgts", grouped, k.to(dtype))
    mask = visible(T, S, bounds, causal, q.device)[:, None, None]  # [B, 1, 1, T, S]
    # Not -inf: the softmax of a row of -inf is NaN. The second mask clears rows that see nothing.
    weights = scores.masked_fill(~mask, torch.finfo(dtype).min).softmax(-1).masked_fill(~mask, 0.0)
    return torch.einsum("bkgts,bskd->btkgd", weights, v.to(dtype)).reshape(B, T, H, D).to(q.dtype)


def sdpa_attention(
    q: Tensor, k: Tensor, v: Tensor, bounds: Bounds | None, causal: bool, scale: float
) -> Tensor:
    """PyTorch's attention: its flash kernel where causal order at most is asked for, else a boolean mask."""
    T, S = q.shape[1], k.shape[1]
    plain = bounds is None and (not causal or T == S or T == 1)
    mask = None if plain else _mask(T, S, bounds, causal, q.device)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=plain and causal and T > 1,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _mask(T: int, S: int, bounds: Bounds | None, causal: bool, device: torch.device) -> Tensor:
    """The mask [B or 1, 1, T, S], made once for all layers that pass the same bounds: the array `lo` keeps
    it.

    (Not the Bounds: wrappers such as FSDP rebuild tuples on the way in, but hand integer tensors through.) A
    compiled layer makes its own, which the compiler fuses.
    """
    if bounds is None or torch.compiler.is_compiling():
        return visible(T, S, bounds, causal, device)[:, None]
    made_for = (bounds.hi.data_ptr(), causal)
    if getattr(bounds.lo, "mask_made_for", None) != made_for:
        bounds.lo.mask_made_for, bounds.lo.mask = made_for, visible(T, S, bounds, causal, device)[:, None]
    return bounds.lo.mask
