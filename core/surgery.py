"""A new model out of a smaller one: more layers, or more vocabulary.

Moxin-7B has Mistral-7B's shape but 36 layers instead of 32 and was very likely started from it (the released
pretraining script loads an "expanded model"; which layers were copied is not published). MOSS appended some
55,800 merges, mostly Chinese, to GPT-2's vocabulary; how the new rows were initialised is not published
either.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from core.config import UserError
from model import Transformer


def source_layers(old: int, new: int) -> list[int]:
    """Which old layer each new layer copies: spread evenly, a copy right after its original (32 -> 36 doubles
    layers 0, 8, 16 and 24)."""
    return [i * old // new for i in range(new)]


@torch.no_grad()
def expand_depth(model: Transformer, layers: int, identity: bool = False) -> Transformer:
    """A deeper copy of `model` (depth up-scaling). With `identity`, added layers write nothing to the
    residual stream at first (LLaMA Pro, Wu et al. 2024), so the deeper model computes the same function until
    it is trained.
    """
    old = model.config.layers
    if layers <= old:
        raise UserError(f"--expand_layers {layers} must be more than the {old} layers of the starting model")
    deeper = Transformer(replace(model.config, layers=layers)).to(model.embed.weight.device)
    for name in ("embed", "norm", "head"):
        getattr(deeper, name).load_state_dict(getattr(model, name).state_dict())
    previous = None
    for layer, source in zip(deeper.layers, source_layers(old, layers), strict=True):
        layer.load_state_dict(model.layers[source].state_dict())
        if identity and source == previous:
            for parameter in (*layer.attention.o.parameters(), *layer.mlp.down.parameters()):
                parameter.zero_()
        previous = source
    return deeper


def extend_vocabulary(model: Transformer, pieces: Sequence[Sequence[int]], sample: Tensor) -> Transformer:
    """Append one row per entry of `pieces`, the old ids that spelled the new token; old rows are unchanged.

    Embedding: the mean of its pieces' rows. Head: a new token must not take probability from old text before
    it is trained, so all new rows begin as one quiet row (`quiet_row`), fitted on `sample` [B, T] of old
    text. A model with a head bias needs no search: its new rows are 0 and their bias is low. A tied model has
    no choice: its head is its embedding.
    """
    config, added = model.config, len(pieces)
    wider = Transformer(replace(config, vocab_size=config.vocab_size + added)).to(model.embed.weight.device)
    with torch.no_grad():
        wider.layers.load_state_dict(model.layers.state_dict())
        wider.norm.load_state_dict(model.norm.state_dict())
        means = torch.stack([model.embed.weight[list(ids)].mean(0) for ids in pieces])
        wider.embed.weight.copy_(torch.cat((model.embed.weight, means)))
        if config.tied:
            return wider
        hidden = model.hidden_states(sample).flatten(0, 1)  # [N, dim]
        ceiling = torch.logsumexp(model.head(hidden), dim=-1) - math.log(added)  # [N]
    if config.head_bias:
        row, bias = torch.zeros_like(means[0]), ceiling.min() - 20
    else:
        row, bias = quiet_row(hidden, ceiling), None
    with torch.no_grad():
        wider.head.weight.copy_(torch.cat((model.head.weight, row.to(means).expand(added, -1))))
        if bias is not None:
            wider.head.bias.copy_(torch.cat((model.head.bias, bias.expand(added))))
    return wider


def quiet_row(hidden: Tensor, ceiling: Tensor) -> Tensor:
    """w = argmin  log mean_n exp(w . h_n - ceiling_n) + |w|^2 / 2:  the head row of ordinary length that
    takes the least probability over hidden states [N, dim], where it would take all of it at w . h_n =
    ceiling_n."""
    states, ceiling = hidden.double(), ceiling.double()
    row = torch.zeros(states.shape[1], dtype=torch.float64, device=hidden.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([row], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        objective = torch.logsumexp(states @ row - ceiling, 0) - math.log(len(ceiling)) + row @ row / 2
        objective.backward()
        return objective

    optimizer.step(closure)
    return row.detach()
