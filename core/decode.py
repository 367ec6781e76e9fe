"""One token a sequence, as fast as it goes: the key/value cache and the forward that reads it.

A decoding step does little arithmetic on many weights, so what counts is to read each weight once, in the
order in which it lies in memory, and to start few operations. `Decoder` is `Transformer.hidden_states`
written for that case: same weights, same results, a third of the operations.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import attention, decode_attention, make_bounds
from kernels.attention import Bounds, choose
from model import Config, Transformer, rotary_tables, rotate

TYPICAL_ROWS = 32  # weights are packed for products with about this many rows; others cost little more
WORTH_PACKING = 256  # widths from which the product takes longer than oneDNN takes to start it


@dataclass
class Memory:
    """What a model has read of one conversation: tokens, and each layer's keys and values [1, n, KV, D].

    The conversation only ever grows, so its next prompt is read from where this ends.
    """

    tokens: list[int] = field(default_factory=list)
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def known(self, prompt: Sequence[int]) -> int:
        """How many of the prompt's tokens need not be read again; not its last, whose logits are wanted."""
        if self.tokens != list(prompt[: len(self.tokens)]):
            self.tokens, self.layers = [], []
        return min(len(self.tokens), len(prompt) - 1)

    def keep(self, tokens: list[int], cache: "Cache") -> None:
        """Remember the first slot of a cache, which has read these tokens; nothing, if it has overwritten
        some."""
        kept = tokens if len(tokens) <= cache.capacity else []
        halves = [own[:1, :, : len(kept)].transpose(1, 2).chunk(2, dim=2) for own in cache.layers]
        self.tokens, self.layers = kept, halves


class Prefill:
    """A cache that only remembers. Prompts lie end to end in one row, without padding, and attend each to
    itself; their keys and values are kept. Of a prompt alone, `memory` may know the first `known` tokens."""

    def __init__(
        self,
        config: Config,
        lengths: list[int],
        device: torch.device,
        memory: Memory | None = None,
        known: int = 0,
    ) -> None:
        self.lengths, self.known = lengths, known
        self.past = [[x[:, :known] for x in layer] for layer in memory.layers] if known else []
        self.positions = torch.cat([torch.arange(known, length, device=device) for length in lengths])
        self.bounds = {}  # by number of queries, where the window cuts something off
        for length in lengths:
            if 0 < config.sliding_window < length:
                lo, hi = make_bounds(length, window=config.sliding_window, device=device)
                self.bounds[length - known] = Bounds(lo[:, known:], hi)
        self.layers: list[tuple[Tensor, Tensor]] = []  # k, v [1, all tokens, KV, D]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.past:
            k, v = (torch.cat(pair, dim=1) for pair in zip(self.past[layer], (k, v), strict=True))
        self.layers.append((k, v))
        outs, start = [], 0
        for length, equal in groupby(self.lengths):  # neighbours of one length are a batch
            end = start + length * len(list(equal))
            new = length - self.known
            queries = q[:, start : end - self.known].view(-1, new, *q.shape[2:])
            keys, values = (x[:, start:end].view(-1, length, *x.shape[2:]) for x in (k, v))
            out = attention(queries, keys, values, bounds=self.bounds.get(new))
            outs.append(out.reshape(1, -1, *q.shape[2:]))
            start = end
        return torch.cat(outs, dim=1) if len(outs) > 1 else outs[0]


class Cache:
    """Keys and values of `slots` sequences, in each layer [slots, 2 KV, capacity, D], keys first, after
    rotation.

    Position p lives at p % capacity. With a sliding window the capacity is at most the window, and each new
    key replaces the one that has just left it (a rolling buffer: Mistral 7B, arXiv 2310.06825, section 2).
    """

    def __init__(self, like: Prefill, slots: int, capacity: int) -> None:
        self.capacity = capacity
        _, _, self.kv_heads, width = like.layers[0][0].shape
        shape = (slots, 2 * self.kv_heads, capacity, width)
        self.layers = [k.new_zeros(shape) for k, _ in like.layers]
        self.by_kernel = choose(self.layers[0]) == "triton"
        self.columns = torch.arange(capacity, device=self.layers[0].device)
        # Where the first place of each slot and head is in the flattened cache.
        self.starts = torch.arange(slots * shape[1], device=self.columns.device).view(slots, -1) * capacity

    def insert(self, slots: list[int], prefill: Prefill, rows: list[int]) -> None:
        """Copy the last positions of prefilled prompts into slots."""
        ends = list(accumulate(prefill.lengths))
        sources, targets = [], []  # of positions: where they are in the prefill, and where their heads go
        for slot, row in zip(slots, rows, strict=True):
            length = prefill.lengths[row]
            positions = torch.arange(max(0, length - self.capacity), length, device=self.columns.device)
            sources.append(positions + (ends[row] - length))
            targets.append(self.starts[slot] + (positions % self.capacity)[:, None])
        source, target = torch.cat(sources), torch.cat(targets).flatten()
        for own, (k, v) in zip(self.layers, prefill.layers, strict=True):
            new = torch.cat((k[0], v[0]), dim=1)[source]  # [positions, 2 KV, D]
            own.view(-1, own.shape[-1]).index_copy_(0, target, new.flatten(0, 1))

    def move(self, source: int, target: int) -> None:
        """Copy a slot over another."""
        for own in self.layers:
            own[target] = own[source]

    def begin_step(self, positions: Tensor, used: int) -> None:
        """Before a step of the first n slots: their positions [n], and the most places that one fills."""
        n, self.used = len(positions), used
        self.places = (self.starts[:n] + (positions % self.capacity)[:, None]).flatten()  # [n 2 KV]
        self.mask = self.lengths = None  # a slot alone fills all that is used
        if self.by_kernel:
            self.lengths = (positions + 1).clamp(max=self.capacity).int()
        elif n > 1:
            unfilled = self.columns[:used] > positions[:, None]
            mask = torch.zeros(unfilled.shape, dtype=self.layers[0].dtype, device=positions.device)
            self.mask = mask.masked_fill_(unfilled, float("-inf"))[:, None, None]  # [n, 1, 1, used]

    def attend(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """One query a slot, q [n, H, D], over the slot's keys and, from now on, the new kv [n, 2 KV, D]."""
        n, heads, width = q.shape
        own = self.layers[layer]
        own.view(-1, width).index_copy_(0, self.places, kv.view(-1, width))
        keys, values = own[:n, : self.kv_heads, : self.used], own[:n, self.kv_heads :, : self.used]
        if self.by_kernel:
            return decode_attention(q, keys, values, self.lengths).flatten(1)
        # The query heads of a group stand as queries of their shared key head. (decode_attention would do the
        # same, with a mask made once a layer instead of once a step.)
        grouped = q.reshape(n, self.kv_heads, heads // self.kv_heads, width)
        return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self.mask).view(n, -1)


class Decoder:
    """tokens [n], positions [n] -> logits [n, V], reading and extending a cache.

    The model's weights are used where they are, joined, packed or as they are.
    """

    def __init__(self, model: Transformer, cache: Cache, length: int) -> None:
        """`length`: positions that it will be asked for; a row that idles past them is turned as at the
        last."""
        self.model, self.cache = model, cache
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.rope = [
            table.squeeze(1)
            for table in rotary_tables(torch.arange(length, device=cache.columns.device), model.config)
        ]  # 2 x [length, R]
        self.layers = [
            (
                layer,
                *map(fast_norm, (layer.attention_norm, layer.mlp_norm)),
                *map(joined_matrix, groups_of(layer)),
            )
            for layer in model.layers
        ]

    def replay(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """The same as a CUDA graph, recorded at the first step of n slots: one launch instead of hundreds.

        tokens and positions must be the same memory at every call, and so are the logits. Recording runs the
        step, which writes to the cache only what the step itself will write again.
        """
        n = len(tokens)
        if n not in self.graphs:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # what compiles or allocates must have done so before recording
                self(tokens, positions, self.cache.capacity)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self(tokens, positions, self.cache.capacity)
            self.graphs[n] = (graph, logits)
        graph, logits = self.graphs[n]
        graph.replay()
        return logits

    def __call__(self, tokens: Tensor, positions: Tensor, used: int) -> Tensor:
        model, config, n = self.model, self.model.config, len(tokens)
        self.cache.begin_step(positions, used)
        places = positions.clamp(max=len(self.rope[0]) - 1)
        rope = tuple(table.index_select(0, places)[:, None] for table in self.rope)  # 2 x [n, 1, R]
        x = model.embed(tokens)
        for number, (layer, attention_norm, mlp_norm, qkv_matrix, up_matrix) in enumerate(self.layers):
            normed = attention_norm(x)
            part = layer.attention
            if qkv_matrix is None:
                qkv = torch.cat((part.q(normed), part.k(normed), part.v(normed)), dim=-1)
            else:
                qkv = normed @ qkv_matrix
            qkv = qkv.view(n, -1, config.head_dim)  # [n, H + 2 KV, D]
            turned = rotate(qkv[:, : config.heads + config.kv_heads], rope)
            kv = torch.cat((turned[:, config.heads :], qkv[:, config.heads + config.kv_heads :]), dim=1)
            attended = x + part.o(self.cache.attend(number, turned[:, : config.heads], kv))
            if mlp_norm is not None:
                normed = mlp_norm(attended)
            if up_matrix is None:
                x = attended + layer.mlp(normed)
            else:
                gate, up = (normed @ up_matrix).chunk(2, dim=-1)
                x = attended + layer.mlp.down(F.silu(gate).mul_(up))
        return model.head(model.norm(x))


def fast_norm(norm: nn.Module | None) -> Callable[[Tensor], Tensor] | None:
    """RMSNorm in four operations instead of eight, where nothing does it in one (a CPU, float32):

    x / sqrt(mean(x^2) + eps) w = x / sqrt(|x|^2 + d eps) (w sqrt(d)).
    """
    if not isinstance(norm, nn.RMSNorm) or norm.weight.is_cuda or norm.weight.dtype != torch.float32:
        return norm
    weight = norm.weight * math.sqrt(len(norm.weight))
    extra = weight.new_tensor(math.sqrt(len(weight) * norm.eps))
    return lambda x: (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(extra)).mul_(weight)


def groups_of(layer: nn.Module) -> list[list[nn.Module]]:
    """The linear maps of a decoder layer that read the same input."""
    gate = getattr(layer.mlp, "gate", None)
    return [[layer.attention.q, layer.attention.k, layer.attention.v], [gate, layer.mlp.up] if gate else []]


def joined_matrix(group: list[nn.Module]) -> Tensor | None:
    """The one matrix [in, sum of out] whose columns the group's weights are, where `join_weights` made it
    so."""
    weights = [getattr(module, "weight", None) for module in group]
    if not weights or not all(isinstance(weight, Tensor) for weight in weights):
        return None
    width, place = sum(weight.shape[0] for weight in weights), weights[0].data_ptr()
    for weight in weights:
        if weight.stride() != (1, width) or weight.data_ptr() != place:
            return None
        place += weight.shape[0] * weight.element_size()
    return weights[0].detach().as_strided((weights[0].shape[1], width), (width, 1))


class PackedLinear(nn.Module):
    """nn.Linear whose weight lies in the blocks in which oneDNN multiplies (float32, on a CPU)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        self.blocks = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), TYPICAL_ROWS)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.blocks, self.bias, "none", [], "")


@torch.no_grad()
def join_weights(model: Transformer) -> Transformer:
    """Re-lay a model's weights in memory for decoding, in place: [in, out] order, and matrices that read the
    same input side by side.

    Names, shapes and values stay; each parameter becomes a view, so later updates are seen at once. For a
    model that is only used: strided parameters make training slower. Worth about 1.5 x for a single sequence
    on a CPU.
    """
    groups = [group for layer in model.layers for group in groups_of(layer) if group] + [[model.head]]
    for group in groups:
        if not all(type(module) is nn.Linear for module in group):
            continue
        joined = torch.cat([module.weight.t() for module in group], dim=1)  # [in, sum of out]
        columns = joined.split([module.weight.shape[0] for module in group], dim=1)
        for module, own in zip(group, columns, strict=True):
            module.weight.data = own.t()
    return model


@torch.no_grad()
def pack_weights(model: Transformer) -> Transformer:
    """Lay a model's weights out for many sequences at a time, in place: packed, or joined where they are
    small or cannot be packed.

    Packed matrices are no parameters: the model can then be used, but neither trained nor saved. Worth about
    1.5 x on a CPU from four sequences on, in reading prompts too, since MKL packs a weight anew for every
    product. Where the head shares its weight with the embedding, that one is then held twice.
    """
    weight = model.embed.weight
    large = model.config.dim >= WORTH_PACKING and torch.backends.mkldnn.is_available()
    if not large or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return join_weights(model)
    parents = [part for layer in model.layers for part in (layer.attention, layer.mlp)]
    for parent in [*parents, model]:
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child))
    return model
