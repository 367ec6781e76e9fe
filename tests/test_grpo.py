"""GRPO: the loss against TRL's and calculus, invariance to how work is divided, tools, resume."""

import dataclasses
import itertools
import json
import math
import random
import types
from collections import defaultdict
from pathlib import Path

import pytest
import torch

import grpo
from core.config import UsageError, UserError
from core.generate import generate
from core.rollouts import IGNORE, Episode, Statistics, deal, make_micro, pass_at_k, score
from core.run import Run
from data.demonstrations import make_tokenizer
from data.problems import Problem, Problems
from model import Config as Shape
from model import Transformer
from tests.conftest import run_processes

SHAPE = Shape(vocab_size=61, layers=2, dim=32, heads=4, kv_heads=2, head_dim=8, ffn_dim=64, max_seq_len=128)


def config_of(**changes) -> grpo.Config:
    defaults = dict(preset="tiny", device="cpu", prompts=4, num_samples=4, batch_size=16, seq_len=64)
    return grpo.Config(**{**defaults, **changes})


# The loss


def random_case(seed: int = 0) -> dict[str, torch.Tensor]:
    """Four completions of uneven lengths with log-probabilities under four models, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> torch.Tensor:
        return scale * torch.randn(4, 9, generator=generator, dtype=torch.float64)

    logprobs = -2 + noise(0.5)
    mask = torch.arange(9) < torch.tensor([[9], [4], [1], [6]])
    advantages = torch.randn(4, 1, generator=generator, dtype=torch.float64)
    return dict(logprobs=logprobs, old=logprobs + noise(0.4), reference=logprobs + noise(0.4), mask=mask,
                advantages=advantages, entropy=noise(0.1).abs() + 1)  # fmt: skip


def weights_of(config: grpo.Config, mask: torch.Tensor, limit: int) -> torch.Tensor:
    """What grpo.weight_of gives each token of these rows."""
    rows = [Episode(0, [0], [1] * int(n), [True] * int(n), []) for n in mask.sum(1)]
    tokens = int(mask.sum())
    each = [grpo.weight_of(row, config, len(rows), tokens, limit) for row in rows]
    return mask * torch.tensor(each, dtype=torch.float64)[:, None]


def trl_loss(
    case: dict, logprobs: torch.Tensor, config: grpo.Config, limit: int, several: bool
) -> torch.Tensor:
    """The same loss by TRL 1.16's trainer, its model replaced by these log-probabilities."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="the oracle needs trl 1.16").GRPOTrainer
    mask = case["mask"]
    loss_type = "cispo" if config.ratio == "cispo" else config.aggregation
    stub = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, case["entropy"], None),
        importance_sampling_level="sequence" if config.ratio == "sequence" else "token",
        beta=config.kl_coef,
        loss_type=loss_type,
        epsilon_low=config.clip_low,
        epsilon_high=config.cispo_cap if loss_type == "cispo" else config.clip_high,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        max_completion_length=limit,
        current_gradient_accumulation_steps=1,
        model=types.SimpleNamespace(training=True),
        args=types.SimpleNamespace(
            delta=config.dual_clip or None,
            use_bias_correction_kl=config.kl_gradient == "reverse_ratio",
            steps_per_generation=1,
        ),
        accelerator=types.SimpleNamespace(
            num_processes=1,
            sync_gradients=False,
            gather=lambda x: x,
            reduce=lambda x, **k: x,
            gather_for_metrics=lambda x: x,
        ),
        _entropy_bonus_enabled=bool(config.entropy_coef),
        use_adaptive_entropy=False,
        entropy_coef=config.entropy_coef,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
        tools=[],
    )
    inputs = {
        "prompt_ids": torch.ones(4, 1, dtype=torch.long),
        "prompt_mask": torch.ones(4, 1, dtype=torch.long),
        "completion_ids": torch.ones(4, 9, dtype=torch.long),
        "completion_mask": mask.long(),
        "advantages": case["advantages"].squeeze(1),
        "num_items_in_batch": mask.sum(),
        "ref_per_token_logps": case["reference"],
    }
    if several:
        inputs["old_per_token_logps"] = case["old"]
    return trainer._compute_loss(stub, None, inputs)


VARIANTS = [
    *itertools.product(["grpo", "bnpo", "dapo", "dr_grpo"], ["token", "sequence"]),
    ("dapo", "cispo"),
]


@pytest.mark.parametrize(("aggregation", "ratio"), VARIANTS)
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("kl", ["none", "forward", "reverse_ratio"])
@pytest.mark.parametrize("dual_clip", [0.0, 1.3])
def test_loss_and_gradient_equal_trl(aggregation, ratio, several, kl, dual_clip):
    changes = dict(aggregation=aggregation, ratio=ratio, clip_low=0.1, clip_high=0.2, dual_clip=dual_clip)
    if kl != "none":
        changes |= dict(kl_coef=0.04, kl_gradient=kl)
    config, case, limit = config_of(**changes), random_case(), 20
    results = []
    for side in ("ours", "trl"):
        logprobs = case["logprobs"].clone().requires_grad_()
        if side == "ours":
            old = case["old"] if several else logprobs.detach()
            weights = weights_of(config, case["mask"], limit)
            reference = case["reference"] if config.kl_coef else None
            loss, _ = grpo.policy_loss(
                logprobs, old, case["advantages"], weights, case["mask"], config, reference
            )
        else:
            loss = trl_loss(case, logprobs, config, limit, several)
        loss.backward()
        results.append((loss.detach(), logprobs.grad))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-12)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-12)


def test_entropy_term_equals_trl():
    """TRL's is a mean over tokens, as ours is with dapo."""
    config, case = config_of(aggregation="dapo", entropy_coef=0.01), random_case()
    weights = weights_of(config, case["mask"], 20)
    inputs = (case["logprobs"], case["old"], case["advantages"], weights, case["mask"], config)
    ours, _ = grpo.policy_loss(*inputs, entropy=case["entropy"])
    assert torch.allclose(ours, trl_loss(case, case["logprobs"], config, 20, True), atol=1e-12)


def test_gradient_at_ratio_one_is_the_policy_gradient():
    config, case = config_of(clip_low=0.2, clip_high=0.2), random_case()
    logprobs = case["logprobs"].clone().requires_grad_()
    weights = weights_of(config, case["mask"], 20)
    loss, ratio = grpo.policy_loss(
        logprobs, logprobs.detach(), case["advantages"], weights, case["mask"], config
    )
    loss.backward()
    assert (ratio == 1).all()
    assert torch.equal(logprobs.grad, -case["advantages"] * weights)


@pytest.mark.parametrize(
    ("advantage", "ratio", "gradient_flows"),
    [(1, 1.3, False), (1, 0.7, True), (-1, 1.3, True), (-1, 0.7, False), (-1, 5.0, True)],
)
def test_clipping_stops_what_went_far_enough(advantage, ratio, gradient_flows):
    def gradient(**changes):
        logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
        one = torch.ones(1, 1)
        config = config_of(**changes)
        grpo.policy_loss(logprobs, torch.zeros(1, 1), advantage * one, one, one > 0, config)[0].backward()
        return logprobs.grad.item()

    assert (gradient() != 0) is gradient_flows
    assert gradient(ratio="cispo", cispo_cap=5.0) == pytest.approx(-advantage * min(ratio, 5.0))
    if ratio == 5.0:
        assert gradient(dual_clip=3.0) == 0


@pytest.mark.parametrize("kl_gradient", ["forward", "reverse", "reverse_ratio"])
def test_kl_estimates_have_the_gradients_they_are_named_for(kl_gradient):
    """On a categorical distribution the expectation over samples is a sum, so the gradients are exact."""
    generator = torch.Generator().manual_seed(0)
    logits, other = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    policy, reference = logits.log_softmax(0), other.log_softmax(0)
    # One "sequence" of one token a symbol, weighted by its probability: the expectation under the policy.
    config = config_of(kl_coef=1.0, kl_gradient=kl_gradient)
    column = policy[:, None]
    weights, mask = column.detach().exp(), torch.ones(7, 1, dtype=torch.bool)
    zero = torch.zeros(7, 1, dtype=torch.float64)
    loss, _ = grpo.policy_loss(column, column.detach(), zero, weights, mask, config, reference[:, None])
    (estimated,) = torch.autograd.grad(loss, logits, retain_graph=True)
    forward = (reference.exp() * (reference - policy)).sum()  # KL(reference || policy)
    reverse = (policy.exp() * (policy - reference)).sum()  # KL(policy || reference)
    wanted, unwanted = (forward, reverse) if kl_gradient == "forward" else (reverse, forward)
    assert torch.allclose(estimated, torch.autograd.grad(wanted, logits, retain_graph=True)[0], atol=1e-12)
    assert not torch.allclose(estimated, torch.autograd.grad(unwanted, logits)[0], atol=1e-3)


# Advantages


def test_advantages():
    rewards = torch.tensor([[1.0, 0, 0, 0], [0.1, 0.1, 0.1, 0.1], [1, 1, 0, 0]])
    plain = grpo.advantages_of(rewards, scale_by_std=False)
    assert torch.allclose(plain, rewards.double() - rewards.double().mean(1, keepdim=True))
    scaled = grpo.advantages_of(rewards, eps=1e-4)
    assert torch.allclose(scaled[0], plain[0] / (rewards[0].double().std() + 1e-4))
    assert (scaled[1] == 0).all()
    assert torch.allclose(scaled.sum(1), torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -0.3, 1 / 3])
@pytest.mark.parametrize("samples", [2, 3, 8, 16])
def test_equal_rewards_teach_nothing(reward, samples):
    assert (grpo.advantages_of(torch.full((5, samples), reward)) == 0).all()


def test_shuffled_rewards_keep_their_sum_and_lose_their_place():
    episodes = [
        Episode(group, [1], [2], [True], [0.0], reward=float(group % 2))
        for group in range(8)
        for _ in range(4)
    ]
    grpo.assign_advantages(episodes, config_of(shuffle_rewards=True), samples=4, seed=0)
    assert any(episode.advantage for episode in episodes)  # with the rewards in place, each group is uniform
    grpo.assign_advantages(episodes, config_of(), samples=4, seed=0)
    assert not any(episode.advantage for episode in episodes)


def test_pass_at_k_is_unbiased():
    assert pass_at_k(8, 0, 4) == 0 and pass_at_k(8, 8, 1) == 1 and pass_at_k(8, 2, 1) == 0.25
    for right, k in ((1, 2), (3, 4), (5, 3)):
        subsets = list(itertools.combinations(range(8), k))
        share = sum(min(subset) < right for subset in subsets) / len(subsets)
        assert pass_at_k(8, right, k) == pytest.approx(share)


# Batches


def made_up_episodes(count: int = 16, samples: int = 4) -> list[Episode]:
    """Completions of uneven lengths, some with a tool's words in the middle, some cut off."""
    rng = random.Random(0)
    episodes = []
    for number in range(count):
        prompt = [rng.randrange(61) for _ in range(3 + number // samples)]
        tokens = [rng.randrange(61) for _ in range(rng.randint(1, 12))]
        own = [not 3 <= place <= 5 for place in range(len(tokens))]
        logprobs = [-rng.random() * mine for mine in own]
        episode = Episode(number // samples, prompt, tokens, own, logprobs, finished=number % 5 > 0)
        episode.advantage = rng.gauss(0, 1) if number >= samples else 0.0
        episode.old = [-3 - rng.random() for _ in tokens]
        episode.reference = [-3 - rng.random() for _ in tokens]
        episodes.append(episode)
    return episodes


def test_targets_are_the_models_own_tokens():
    """The loss falls on every token that the model wrote, its end included, and on no other."""
    episode = Episode(0, [1, 2, 3], [4, 5, 6, 7], [True, False, False, True], [-1.0, 0.0, 0.0, -2.0])
    longer = Episode(1, [8], [9] * 8, [True] * 8, [-0.5] * 8, old=[-0.25] * 8)
    micro = make_micro([episode, longer], [0.5, 2.0], torch.device("cpu"))
    assert micro.tokens[0].tolist() == [1, 2, 3, 4, 5, 6, 0, 0]
    assert micro.targets[0].tolist() == [IGNORE, IGNORE, 4, IGNORE, IGNORE, 7, IGNORE, IGNORE]
    assert micro.weights[0].tolist() == [0, 0, 0.5, 0, 0, 0.5, 0, 0]
    assert micro.sampled[0].tolist() == [0, 0, -1, 0, 0, -2, 0, 0]
    assert micro.targets[1].tolist() == [9] * 8 and micro.old[1].tolist() == [-0.25] * 8


@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("longer", [0, 3])
def test_reading_a_prompt_once_changes_nothing(window, longer):
    """Log-probabilities, entropies and their gradients are those of every sequence read by itself."""
    episodes = made_up_episodes()
    for episode in episodes:
        episode.prompt = [episode.group] * (1 + longer * (1 + episode.group))
    micro = make_micro(episodes, [1.0] * len(episodes), torch.device("cpu"))
    model = Transformer(dataclasses.replace(SHAPE, sliding_window=window), seed=3)
    results = []
    for values in (micro.logprobs(model, 0.7), model.logprobs(micro.tokens, micro.targets, temperature=0.7)):
        model.zero_grad()
        sum((value.cumsum(1) * value).sum() for value in values).backward()
        results.append([*values, *(parameter.grad for parameter in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-4)
    read = len(micro.row.cells)
    assert read < sum(episode.length - 1 for episode in episodes) or not longer


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_work_is_dealt_whole_and_evenly(world_size):
    episodes = made_up_episodes(13)
    seen: list[int] = []
    lengths = set()
    for rank in range(world_size):
        run = types.SimpleNamespace(rank=rank, world_size=world_size)
        micros = deal(episodes, 40, run)
        lengths.add(len(micros))
        for micro in micros:
            assert not micro or len(micro) == 1 or len(micro) * max(e.length for e in micro) <= 40
            seen += [id(episode) for episode in micro]
    assert sorted(seen) == sorted(map(id, episodes)) and len(lengths) == 1


def gradient_of(folder: str, batch: list[Episode] | None = None, **changes) -> dict:
    """Gradient of one update's loss on made-up episodes."""
    from core.parallel import materialize, parallelize

    config = config_of(out=folder, **changes)
    run = Run(config, "test")
    with torch.device("meta"):
        model = Transformer(SHAPE)
    model = materialize(parallelize(model, run), run)
    model.init_weights(1)
    statistics = Statistics(run.device, config.kl_coef > 0)
    loss = grpo.accumulate(model, batch or made_up_episodes(), config, run, 20, statistics)
    whole = {
        n: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for n, p in model.named_parameters()
    }
    statistics.updates.append({"loss": run.sum(loss)[0], "grad_norm": 0.0, "lr": 0.0, "skipped": 0})
    return {"loss": run.sum(loss)[0], "grads": whole, "statistics": statistics.read(run)}


def same_gradient(a: dict, b: dict, tolerance: float = 1e-6) -> None:
    assert a["loss"] == pytest.approx(b["loss"], abs=tolerance)
    for name, value in a["grads"].items():
        assert torch.allclose(value, b["grads"][name], atol=tolerance), name


COMMON = dict(epochs=2, kl_coef=0.1, entropy_coef=0.01, keep_zero_variance=True)


@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo"])
def test_accumulation_changes_nothing(tmp_path, aggregation):
    whole = gradient_of(str(tmp_path / "a"), aggregation=aggregation, **COMMON)
    parts = gradient_of(
        str(tmp_path / "b"), aggregation=aggregation, micro_batch_size=1, seq_len=20, **COMMON
    )
    same_gradient(whole, parts)
    for name, value in whole["statistics"].items():
        assert name == "not_trained" or parts["statistics"][name] == pytest.approx(value, abs=1e-5), name


@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo"])
def test_processes_change_nothing(tmp_path, aggregation):
    """Two processes share sixteen episodes, then three in which one process has nothing to learn."""
    changes = dict(aggregation=aggregation, micro_batch_size=1, seq_len=30, **COMMON)
    for number, batch in enumerate((made_up_episodes(), made_up_episodes(5)[4:])):
        one = gradient_of(str(tmp_path / f"one{number}"), batch, **changes)
        two = run_processes(gradient_of, 2, tmp_path, str(tmp_path / f"two{number}"), batch, **changes)
        same_gradient(one, two[0])
        same_gradient(two[0], two[1], 0)
        for name, value in one["statistics"].items():
            assert name == "not_trained" or two[0]["statistics"][name] == pytest.approx(value, abs=1e-5), name


def test_padding_changes_nothing(tmp_path):
    """An episode gives the same gradient alone and beside a longer one of no weight."""
    episodes = made_up_episodes()
    episode, longest = episodes[9], max(episodes, key=lambda e: e.length)
    longest = dataclasses.replace(longest, prompt=longest.prompt + [5] * 20, advantage=0.0)
    alone = gradient_of(
        str(tmp_path / "a"), [episode], aggregation="dr_grpo", keep_zero_variance=True, epochs=2
    )
    beside = gradient_of(
        str(tmp_path / "b"), [episode, longest], aggregation="dr_grpo", keep_zero_variance=True, epochs=2
    )
    for name, value in alone["grads"].items():
        assert torch.allclose(value, 2 * beside["grads"][name], atol=1e-6), name


def test_dropping_groups_without_advantage_changes_nothing(tmp_path):
    kept = gradient_of(str(tmp_path / "a"), keep_zero_variance=True, epochs=2)
    dropped = gradient_of(str(tmp_path / "b"), keep_zero_variance=False, epochs=2)
    same_gradient(kept, dropped)
    assert dropped["statistics"]["trained_tokens"] < kept["statistics"]["trained_tokens"]


def test_constant_rewards_give_exactly_zero_gradient(tmp_path):
    for reward in (0.0, 0.1, 1.0):
        episodes = made_up_episodes()
        for episode in episodes:
            episode.reward = reward
        grpo.assign_advantages(episodes, config_of(), samples=4, seed=0)
        result = gradient_of(str(tmp_path / f"r{reward}"), episodes, keep_zero_variance=True)
        assert result["loss"] == 0 and all((grad == 0).all() for grad in result["grads"].values())


def test_truncated_completions_can_be_left_out(tmp_path):
    episodes = made_up_episodes()
    finished = [e for e in episodes if e.finished]
    masked = gradient_of(str(tmp_path / "a"), episodes, mask_truncated=True, epochs=2)
    without = gradient_of(str(tmp_path / "b"), finished, epochs=2)
    same_gradient(masked, without)


def test_a_cut_in_two_updates_is_one_without_a_step_between(tmp_path):
    """Sampler, scorer and loss agree about a model: the mismatch is rounding, the ratio 1, the KL 0."""
    config = config_of(out=str(tmp_path), kl_coef=0.1, epochs=2, temperature=0.7, aggregation="grpo")
    run, model = Run(config, "test"), Transformer(SHAPE, seed=2)
    sampled = generate(model, [[1, 2, 3], [4, 5]], 9, 4, temperature=0.7, stop_ids=(7,), seed=5)
    episodes = [
        Episode(group, [[1, 2, 3], [4, 5]][group], c.tokens, [True] * len(c.tokens), c.logprobs, True)
        for group, samples in enumerate(sampled)
        for c in samples
    ]
    score(model, episodes, "old", config.temperature, run)
    for number, episode in enumerate(episodes):
        assert episode.old == pytest.approx(episode.logprobs, abs=1e-5)
        episode.reference = episode.old
        episode.advantage = number - 3.5
    statistics = Statistics(run.device, config.kl_coef > 0)
    grpo.accumulate(model, episodes, config, run, 9, statistics)
    statistics.updates.append({"loss": 0.0, "grad_norm": 0.0, "lr": 0.0, "skipped": 0})
    values = statistics.read(run)
    assert values["mismatch"] < 1e-5 and values["mismatch_max"] < 1e-4 and abs(values["ratio"] - 1) < 1e-6
    assert abs(values["kl_k3"]) < 1e-6 and values["clip_low"] == values["clip_high"] == 0


# Rollouts


MOSS = dict(chat_format="moss", system="Calculator: enabled. API: Calculate(expression)")


@pytest.fixture(scope="module")
def tokenizer():
    problems = Problems(("sorting", "products"), 0)
    return make_tokenizer(lambda number: problems.train(number).solved(MOSS["system"]), config_of(**MOSS))


def test_tool_results_enter_the_episode_and_not_the_loss(tokenizer, monkeypatch):
    from data.chat import render

    config = config_of(tools=("calculator",), **MOSS)
    problem = Problem("compute 17*24", "408")
    eot, eoc = (tokenizer.special_tokens[name] for name in ("<eot>", "<eoc>"))
    thoughts = (
        tokenizer.encode(" None") + [eot] + tokenizer.encode('\n<|Commands|>: Calculate("17*24")') + [eoc]
    )
    cut_off = tokenizer.encode(" None and so on")
    answer = tokenizer.encode(" 408") + [tokenizer.special_tokens["<eom>"]]
    calls = []

    def scripted(model, prompts, limit, num_samples=1, **_):
        calls.append(prompts)
        group = [thoughts, cut_off] if len(calls) == 1 else [answer]
        reasons = {id(thoughts): "stop", id(cut_off): "length", id(answer): "stop"}
        return [
            [
                types.SimpleNamespace(tokens=t, logprobs=[-1.0] * len(t), finish_reason=reasons[id(t)])
                for t in group
            ]
            for _ in prompts
        ]

    monkeypatch.setattr(grpo, "generate", scripted)
    episodes = grpo.roll_out(
        Transformer(dataclasses.replace(SHAPE, max_seq_len=512)), [problem], tokenizer, config, 0, 2, 64, 1.0
    )
    grpo.judge(episodes, [problem], config, 64)
    used, lost = episodes
    expected = render(
        [*problem.conversation(MOSS["system"]), {"role": "assistant", "commands": 'Calculate("17*24")',
         "results": "Calculate(\"17*24\") => '408'", "content": "408"}], tokenizer, "moss")  # fmt: skip
    assert (
        used.prompt + used.tokens == expected.ids[:-1]
    )  # the renderer's ids, but for the line end after <eom>
    own = [mine for mine, label in zip(expected.mask, expected.labels, strict=True)][len(used.prompt) : -1]
    assert used.own == own
    assert (
        tokenizer.decode([t for t, mine in zip(used.tokens, used.own, strict=True) if not mine]).count(
            "'408'"
        )
        == 1
    )
    assert (used.reward, used.calls, used.failures, used.finished) == (1.0, 1, 0, True)
    assert (lost.reward, lost.finished, lost.text) == (0.0, False, "")
    assert len(calls[1]) == 1


def test_overlong_completions_lose_reward_gradually():
    config = config_of(overlong_tokens=4)
    problem = Problem("", "1", "math")
    rewards = []
    for length in (10, 16, 18, 20):
        episode = Episode(0, [1], [2] * length, [True] * length, [], finished=length < 20, text="1")
        grpo.judge([episode], [problem], config, 20)
        rewards.append(episode.reward)
    assert rewards == [1.0, 1.0, 0.5, -1.0]


def test_an_unfinished_answer_earns_nothing():
    episode = Episode(0, [1], [2], [True], [], finished=False, text="1")
    grpo.judge([episode], [Problem("", "1", "math")], config_of(), 20)
    assert episode.reward == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(temperature=0.0), "temperature"),
        (dict(num_samples=1, batch_size=4), "num_samples"),
        (dict(tools=("calculator",)), "moss"),
        (dict(batch_size=5), "batch_size"),
        (dict(dual_clip=1.0), "dual_clip"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        config_of(**changes)


@pytest.mark.parametrize(
    ("curriculum", "steps", "message"),
    [(("5@x",), 5, "expected"), (("5",), 5, "expected"), (("5@8", "5@16"), 11, "10 steps in all")],
)
def test_bad_curricula_are_refused(curriculum, steps, message):
    with pytest.raises(UsageError, match=message):
        grpo.plan(config_of(curriculum=curriculum, steps=steps))


def test_published_curriculum():
    config = grpo.Config(preset="deepscaler", **grpo.PRESETS["deepscaler"])
    stages = [(stage.first, stage.limit, stage.samples) for stage in grpo.plan(config)]
    assert stages == [(0, 8192, 8), (1040, 16384, 8), (1520, 24576, 16)]
    assert (
        config.several_updates
        and not grpo.Config(preset="moxin-7b", **grpo.PRESETS["moxin-7b"]).several_updates
    )


# Whole runs

SMALL = """--layers 1 --dim 32 --heads 2 --warm_steps 12 --warm_batch 8 --prompts 4 --num_samples 4
    --batch_size 8 --max_new_tokens 10 --eval_problems 8 --eval_samples 2 --kl_coef 0.01
    --log_every 1 --save_every 2 --temperature 1 --device cpu""".split()


def main_with(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["grpo.py", *arguments])
    monkeypatch.setattr("core.run.draw_curves", lambda *_: None)
    grpo.main()


def trained(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model" / "model.safetensors")


def metrics(folder: Path) -> list[dict]:
    timed = ("seconds", "per_second", "peak_memory")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not any(word in k for word in timed)} for r in records]


def test_resume_is_bitwise(tmp_path, monkeypatch):
    """Stopped after two of four rollouts and resumed: same weights, same log, same place in the problems."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main_with(monkeypatch, "--out", str(whole), "--steps", "4", "--resample_rounds", "1", *SMALL)
    stop = iter([False, True])
    monkeypatch.setattr(Run, "should_stop", lambda self: next(stop))
    with pytest.raises(UserError, match="stopped at step 2"):
        main_with(monkeypatch, "--out", str(parts), "--steps", "4", "--resample_rounds", "1", *SMALL)
    monkeypatch.setattr(Run, "should_stop", lambda self: False)
    main_with(monkeypatch, "--out", str(parts), "--steps", "4", "--resample_rounds", "1", "--resume", *SMALL)
    assert metrics(whole) == metrics(parts)
    for name, value in trained(whole).items():
        assert torch.equal(value, trained(parts)[name]), name
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (whole, parts)]
    assert summaries[0]["problems"] == summaries[1]["problems"] >= 16
    assert summaries[0]["before"] == summaries[1]["before"]


def test_golden_trajectory(tmp_path, monkeypatch):
    """Twenty rollouts as they were when this was written; another value means that training changed."""
    share_right = lambda text, answer: sum(map(str.__eq__, text, answer)) / len(answer)  # noqa: E731
    monkeypatch.setitem(grpo.REWARDS, "sorting", share_right)
    main_with(monkeypatch, "--out", str(tmp_path), *SMALL, "--steps", "20", "--warm_steps", "60")
    curve = {record["step"]: record for record in metrics(tmp_path) if "loss" in record}
    found = [[curve[step][name] for name in ("reward", "grad_norm", "entropy")] for step in (1, 10, 20)]
    assert found == [pytest.approx(golden, abs=5e-3) for golden in GOLDEN], found


GOLDEN = [[0.031, 1.301, 3.903], [0.070, 1.447, 3.525], [0.031, 1.353, 3.312]]


def two_processes(folder: str, arguments: list[str]) -> dict[str, torch.Tensor]:
    """A whole run on this process of two; its shard of the embedding at the end."""
    import sys

    import core.run

    core.run.draw_curves = lambda *_: None
    sys.argv = ["grpo.py", "--out", folder, *arguments]
    save, last = grpo.save_pretrained, []
    grpo.save_pretrained = lambda model, *rest: (last.append(model), save(model, *rest))
    grpo.main()
    return last[-1].embed.weight.detach().to_local().clone()


def test_two_processes_train_one_model(tmp_path):
    """Processes do unequal work (their completions differ in length) and train one and the same model."""
    from safetensors.torch import load_file

    arguments = [*SMALL, "--steps", "2", "--entropy_coef", "0.1", "--keep_zero_variance"]
    first, second = run_processes(two_processes, 2, tmp_path, str(tmp_path / "run"), arguments)
    name = "model.embed_tokens.weight"
    start, end = (
        load_file(tmp_path / "run" / part / "model.safetensors")[name] for part in ("start", "model")
    )
    assert torch.equal(torch.cat([first, second])[: len(end)], end) and not torch.equal(start, end)
    assert {record["step"] for record in metrics(tmp_path / "run")} == {0, 1, 2}


def test_a_real_model_on_real_problems(tmp_path, monkeypatch, real_data):
    """Two rollouts of the published 260,000-parameter story model on GSM8K: it runs, and the sampler agrees
    with the trainer; the model solves nothing, so what moves it is the entropy term."""
    data, model = real_data / "math/gsm8k.train.jsonl", real_data / "stories260k"
    arguments = ["--init_from", str(model), "--data", str(data), "--steps", "2", "--entropy_coef", "0.01"]
    arguments += ["--suffix", grpo.BOXED, "--prompts", "2", "--batch_size", "8", "--keep_zero_variance"]
    main_with(monkeypatch, "--out", str(tmp_path), *SMALL, *arguments)
    steps = [record for record in metrics(tmp_path) if "loss" in record]
    assert len(steps) == 2
    assert all(step["mismatch"] < 1e-4 and step["grad_norm"] > 0 and step["length"] > 5 for step in steps)
    assert "<|assistant|>" in (tmp_path / "samples.jsonl").read_text()


def test_results_that_fill_the_context_end_the_episode(tokenizer, monkeypatch):
    """A command may return more than the model can read: it then never answers, and the run goes on."""
    config = config_of(tools=("calculator",), **MOSS)
    words = tokenizer.encode(" None"), tokenizer.encode('\n<|Commands|>: Calculate("1+1")')
    eot, eoc = (tokenizer.special_tokens[name] for name in ("<eot>", "<eoc>"))
    talk = Problem("compute 1+1", "2").conversation(MOSS["system"])
    for room, answers in ((500, True), (40, False)):
        tokens = [*words[0], eot, *words[1], eoc]
        episode = Episode(0, [1] * 20, tokens, [True] * len(tokens), [-1.0] * len(tokens), finished=True)
        assert grpo.use_tools(episode, talk, tokenizer, config, room) is answers
        assert (len(episode.tokens) > len(tokens)) is answers and not episode.finished


def test_without_a_model_or_demonstrations(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="init_from"):
        main_with(monkeypatch, "--out", str(tmp_path / "a"), "--warm_steps", "0")
    path = tmp_path / "p.jsonl"
    path.write_text('{"problem": "1+1", "answer": "2"}\n')
    with pytest.raises(UserError, match="no solution to learn from"):
        main_with(monkeypatch, "--out", str(tmp_path / "b"), "--data", str(path))


def test_a_sampler_that_disagrees_stops_the_run(tmp_path, monkeypatch):
    def wrong(*arguments, **keywords):
        found = generate(*arguments, **keywords)
        for group in found:
            for completion in group:
                completion.logprobs = [value - 0.2 for value in completion.logprobs]
        return found

    monkeypatch.setattr(grpo, "generate", wrong)
    with pytest.raises(UserError, match="sampler and trainer differ by 0.2"):
        main_with(monkeypatch, "--out", str(tmp_path), "--steps", "1", "--keep_zero_variance", *SMALL)
