"""Schedules against closed forms; AdamW's groups; Muon against a plain restatement."""

import math

import pytest
import torch

from core.config import RunConfig
from core.optimizer import learning_rate, make_adamw, make_muon, newton_schulz, set_learning_rate
from model import Config, Transformer

SHAPE = Config(vocab_size=31, layers=1, dim=16, heads=2, kv_heads=2, head_dim=8, ffn_dim=24, max_seq_len=16)


def rates(**options) -> list[float]:
    config = RunConfig(preset="tiny", lr=1.0, **options)
    return [learning_rate(config, step) for step in range(config.steps)]


def test_warmup_then_cosine_to_the_floor() -> None:
    values = rates(steps=110, warmup_steps=10, min_lr=0.1)
    assert values[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert values[10] == 1.0 and values[60] == pytest.approx(0.55)
    assert values[109] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 0.99)))
    assert values[10:] == sorted(values[10:], reverse=True)


def test_other_schedules() -> None:
    assert rates(steps=4, schedule="linear") == pytest.approx([1, 0.75, 0.5, 0.25])
    assert rates(steps=3, schedule="constant", min_lr=0.5) == [1, 1, 1]
    assert rates(steps=10, schedule="wsd") == pytest.approx([1] * 8 + [1, 0.5])
    assert rates(steps=3, warmup_steps=6) == pytest.approx([1 / 6, 2 / 6, 3 / 6])


def test_only_matrices_decay_and_every_parameter_is_in_one_group() -> None:
    model = Transformer(SHAPE)
    for optimizer in (make_adamw(model, 0.1, 0.5), make_muon(model, 0.1, 0.5)):
        grouped = [(p, group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(id(p) for p, _ in grouped) == sorted(id(p) for p in model.parameters())
        assert all(decay == (0.5 if p.ndim > 1 else 0.0) for p, decay in grouped)


def test_frozen_parameters_are_left_out() -> None:
    model = Transformer(SHAPE)
    model.embed.weight.requires_grad_(False)
    held = {id(p) for group in make_adamw(model, 0.1, 0.1).param_groups for p in group["params"]}
    assert id(model.embed.weight) not in held and id(model.head.weight) in held


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
def test_newton_schulz_is_nearly_orthogonal(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(newton_schulz(matrix))
    assert singular.min() > 0.3 and singular.max() < 1.3
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    cosine = (
        (newton_schulz(matrix) * (left @ right)).sum() / newton_schulz(matrix).norm() / (left @ right).norm()
    )
    assert cosine > 0.95


def test_muon_uses_adamw_for_what_is_not_a_layer_matrix() -> None:
    models = [Transformer(SHAPE), Transformer(SHAPE)]
    optimizers = [make_muon(models[0], 1e-2, 0.1), make_adamw(models[1], 1e-2, 0.1)]
    tokens = torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(0))
    for model, optimizer in zip(models, optimizers, strict=True):
        set_learning_rate(optimizer, 5e-3)
        model.loss(tokens[:, :-1], tokens[:, 1:])[0].backward()
        optimizer.step()
    assert torch.allclose(models[0].embed.weight, models[1].embed.weight, atol=1e-7)
    assert torch.allclose(models[0].norm.weight, models[1].norm.weight, atol=1e-7)
    name = "layers.0.mlp.up.weight"
    start = dict(Transformer(SHAPE).named_parameters())[name]
    gradient = dict(models[0].named_parameters())[name].grad
    momentum = 0.05 * gradient  # one step of lerp from zero, then Nesterov's look ahead
    update = newton_schulz(0.05 * gradient + 0.95 * momentum) * 0.2 * math.sqrt(24)
    expected = start * (1 - 5e-3 * 0.1) - 5e-3 * update
    assert torch.allclose(dict(models[0].named_parameters())[name], expected, atol=1e-6)
