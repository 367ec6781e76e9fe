"""Depth expansion and vocabulary extension keep what the model knew."""

import dataclasses

import pytest
import torch

from core.config import UserError
from core.surgery import expand_depth, extend_vocabulary, source_layers
from model import Config, Transformer

SHAPE = Config(vocab_size=61, layers=2, dim=128, heads=4, kv_heads=2, head_dim=8, ffn_dim=40, max_seq_len=64)


def text(rows: int, seed: int) -> torch.Tensor:
    """Word frequencies fall as in language, so that hidden states share a direction as in real models."""
    ranks = torch.rand(rows, 24, generator=torch.Generator().manual_seed(seed))
    return (61 * ranks**4).long()


def trained(config: Config) -> Transformer:
    """A model whose hidden states are no longer those of random initialisation."""
    model = Transformer(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens = text(16, 0)
    for _ in range(30):
        loss, count = model.loss(tokens[:, :-1], tokens[:, 1:])
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_moxin_doubles_four_layers_of_thirty_two() -> None:
    layers = source_layers(32, 36)
    assert sorted(set(layers)) == list(range(32)) and len(layers) == 36
    assert [i for i in range(32) if layers.count(i) == 2] == [0, 8, 16, 24]


def test_expansion_with_identity_keeps_the_function() -> None:
    model = trained(SHAPE)
    deeper = expand_depth(model, 5, identity=True)
    assert deeper.config.layers == 5
    assert torch.allclose(deeper(text(2, 1)), model(text(2, 1)), atol=1e-6)
    copied = expand_depth(model, 5)
    assert torch.equal(copied.layers[1].mlp.up.weight, model.layers[0].mlp.up.weight)
    assert not torch.allclose(copied(text(2, 1)), model(text(2, 1)), atol=1e-3)
    with pytest.raises(UserError, match="more than the 2 layers"):
        expand_depth(model, 2)


CODEGEN = dict(architecture="codegen", norm="layer", head_bias=True, mlp="gelu", parallel_block=True)


@pytest.mark.parametrize(("changes", "allowed"), [({}, 0.02), (CODEGEN, 1e-6)], ids=["mistral", "codegen"])
def test_extension_keeps_the_loss_on_old_text(changes: dict, allowed: float) -> None:
    model = trained(dataclasses.replace(SHAPE, **changes))
    wider = extend_vocabulary(model, [[3, 4], [5], [6, 7, 8]] * 20, sample=text(256, 2))
    assert wider.config.vocab_size == 121
    unseen = text(16, 3)
    with torch.no_grad():
        before, count = model.loss(unseen[:, :-1], unseen[:, 1:])
        after, _ = wider.loss(unseen[:, :-1], unseen[:, 1:])
        naive = torch.cat((model(unseen), torch.zeros(16, 24, 60)), dim=-1).logsumexp(-1) - model(
            unseen
        ).logsumexp(-1)
        assert 0 <= float(after - before) / int(count) < allowed < 0.2 < naive.mean()
        assert torch.equal(wider(unseen)[..., :61], model(unseen))
    assert torch.allclose(wider.embed.weight[63], model.embed.weight[[6, 7, 8]].mean(0))


def test_new_tokens_can_be_learnt_after_extension() -> None:
    wider = extend_vocabulary(trained(SHAPE), [[3, 4], [5]], sample=text(64, 2))
    tokens = text(16, 4)
    tokens[:, ::3] = 61 + (tokens[:, ::3] % 2)
    optimizer = torch.optim.AdamW(wider.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss, count = wider.loss(tokens[:, :-1], tokens[:, 1:])
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item() / count.item())
    assert losses[-1] < 3.5 < 4.5 < losses[0]
