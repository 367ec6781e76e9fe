"""Stage 4: reasoning by reinforcement (GRPO, arXiv 2402.03300), in three functions:

    roll_out         sample G completions of each problem and let a program check their answers
    advantages_of    A_i = (r_i - mean r) / (std r + eps): how much better than the rest of its group
    update           gradient of  - sum_i sum_t w_it min(rho_it A_i, clip(rho_it, 1 - low, 1 + high) A_i)
                                  + beta sum_i sum_t w_it KL_it,        rho_it = p(token) / p_old(token)

The weights w make the aggregation: each sequence counts the same (grpo), each token does (dapo), each token
is one of a fixed length (dr_grpo). They are set from the whole batch of all processes, so neither the number
of processes nor of micro-batches changes the gradient.

Moxin Reasoning (arXiv 2412.06845 and its training script): from the CoT model, 64 problems x 8 completions of
up to 16k tokens, one update per rollout, KL 0.001, temperature 0.6. With one update per rollout rho is 1 and
clipping never acts; a loss near 0 is then normal, and reward and gradient norm are what to watch.

    python grpo.py                                    sorting digits: a tiny model learns to, on a laptop
    python grpo.py --data countdown                   the numbers game
    python grpo.py --init_from runs/sft/model --data gsm8k.train.jsonl --chat_format tulu
"""

import json
import random
import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from core import tools
from core.checkpoint import load_weights, read_config, save_pretrained
from core.config import RunConfig, UserError, parse, require, run_main
from core.estimate import print_estimate
from core.generate import generate
from core.optimizer import make_adamw, set_learning_rate, take_step
from core.parallel import clip_grad_norm, new_model, unsharded
from core.resume import Checkpointer
from core.rewards import REWARDS
from core.rollouts import IGNORE, Clock, Episode, Statistics, deal, describe, gather, make_micro, pass_at_k
from core.run import Run, SpikeGuard, due, peak_memory_bytes
from data.chat import chat_template, render
from data.problems import Problem, Problems
from data.tokenizer import SPECIAL_TOKENS, Tokenizer, load_tokenizer, train_tokenizer
from model import Config as Shape
from model import Transformer, num_parameters


@dataclass(kw_only=True)
class Config(RunConfig):
    data: tuple[str, ...] = ("sorting",)  # tasks of data/problems.py or files, each with an optional :weight
    skip_bad: bool = False  # leave unreadable records of a file out instead of stopping
    chat_format: Literal["tulu", "moss"] = "tulu"  # moss has a place for tool calls
    system: str = ""  # system message; empty = none, or with --tools MOSS's meta-instruction
    suffix: str = ""  # put behind every problem
    tools: tuple[
        str, ...
    ] = ()  # calculator, search, ... run between command and answer; needs the moss format
    boxed_only: bool = False  # an answer outside \\boxed{} earns nothing
    # Rolling out
    steps: int = 60  # rollouts, each followed by its updates
    prompts: int = 32  # problems in a rollout, over all processes
    num_samples: int = 8  # completions of each problem: the group
    max_new_tokens: int = 16  # longest completion
    curriculum: tuple[
        str, ...
    ] = ()  # STEPS@MAX_NEW_TOKENS[@NUM_SAMPLES], one after the other; empty = no change
    temperature: float = 1.0  # of sampler and trainer alike
    max_batch: int = 256  # completions sampled at a time on one process
    resample_rounds: int = 0  # rollouts more, at most, to replace groups with nothing to learn (DAPO: 10)
    # Advantages
    scale_by_std: bool = True  # divide by the group's standard deviation (Dr. GRPO does not)
    std_eps: float = 1e-4  # added to it
    overlong_tokens: int = 0  # the reward falls by up to 1 over the last so many tokens (DAPO); 0 = never
    mask_truncated: bool = False  # leave cut-off completions out of the loss
    shuffle_rewards: bool = False  # control: give rewards to the wrong completions; nothing may be learnt
    # The loss
    batch_size: int = 256  # completions in one update; fewer than in a rollout = several updates from it
    epochs: int = 1  # passes over a rollout
    aggregation: Literal["grpo", "bnpo", "dapo", "dr_grpo"] = "dapo"  # what counts the same, see weight_of
    ratio: Literal["token", "sequence", "cispo"] = "token"  # sequence: GSPO; cispo: weighted, not clipped
    clip_low: float = 0.2  # the ratio may fall to 1 - this
    clip_high: float = 0.2  # the ratio may rise to 1 + this
    dual_clip: float = 0.0  # largest ratio where the advantage is negative; 0 = no limit
    cispo_cap: float = 5.0  # largest weight with --ratio cispo
    kl_coef: float = 0.0  # beta; 0 = no reference model
    kl_gradient: Literal["forward", "reverse", "reverse_ratio"] = "forward"  # see policy_loss
    entropy_coef: float = 0.0  # reward for entropy
    keep_zero_variance: bool = False  # forward also what has no advantage, for its KL and entropy terms
    max_mismatch: float = 0.05  # stop if sampler and trainer differ by more a token, in nats, on average
    # Watching
    eval_problems: int = 200  # held-out problems
    eval_samples: int = 8  # completions of each for pass@1 and pass@k
    # Where there is no --init_from: a small model taught by demonstrations first
    warm_steps: int = 400  # optimizer steps of supervised learning
    warm_batch: int = 64  # demonstrations in a step
    warm_lr: float = 3e-3  # falls linearly to 0
    layers: int = 3
    dim: int = 96
    heads: int = 4
    vocab_size: int = 330

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.temperature > 0,
            "--temperature must be above 0: greedy completions of a problem are all equal",
        )
        require(
            self.num_samples > 1, "--num_samples must be at least 2: a completion is compared with its group"
        )
        require(not self.tools or self.chat_format == "moss", "--tools need --chat_format moss")
        rollout = self.prompts * self.num_samples
        require(
            rollout % self.batch_size == 0, f"--batch_size must divide the rollout of {rollout} completions"
        )
        require(
            not self.dual_clip or self.dual_clip > 1 + self.clip_high,
            "--dual_clip must exceed 1 + --clip_high",
        )

    @property
    def several_updates(self) -> bool:
        """Whether a rollout is used more than once, so that the ratio moves away from 1."""
        return self.epochs > 1 or self.prompts * self.num_samples > self.batch_size


# DeepScaleR's and Moxin's prompts end in this sentence.
BOXED = " Let's think step by step and output the final answer within \\boxed{}."
MOXIN: dict[str, Any] = dict(
    suffix=BOXED,
    boxed_only=True,
    warm_steps=0,
    prompts=64,
    num_samples=8,
    batch_size=512,
    max_new_tokens=16_384,
    seq_len=17_408,
    micro_batch_size=2,
    temperature=0.6,
    max_batch=128,
    lr=1e-6,
    min_lr=1e-6,
    schedule="constant",
    weight_decay=0.01,
    std_eps=1e-6,
    kl_coef=0.001,
    kl_gradient="forward",
    entropy_coef=0.001,
    keep_zero_variance=True,
    aggregation="dapo",
    checkpointing="full",
    compile=True,
    log_every=1,
    eval_every=20,
    save_every=20,
    eval_problems=500,
)
DEEPSCALER = "hub/agentica-org/DeepScaleR-Preview-Dataset/deepscaler.json"
# fmt: off
PRESETS: dict[str, dict[str, Any]] = {
    # Ours, for one thread of a laptop.
    "tiny": dict(lr=4e-4, warmup_steps=5, schedule="linear", weight_decay=0.0, seq_len=64,
        micro_batch_size=256, temperature=0.6, batch_size=128,
        warm_steps=75, log_every=5, eval_every=20, save_every=20),
    # Ours, for one GPU: a model of some 11 M parameters, taught and trained in minutes.
    "small": dict(data=("countdown", "steps"), dim=384, layers=6, heads=6, warm_steps=2000, warm_batch=256,
        warm_lr=1e-3, lr=1e-4, warmup_steps=10, schedule="linear", weight_decay=0.0, prompts=128,
        num_samples=16, batch_size=2048, max_new_tokens=96, seq_len=160, micro_batch_size=1024,
        max_batch=2048, steps=200, log_every=5, eval_every=50, save_every=50),
    # Moxin's script. The paper leaves the number of steps open: ours is one pass over 40,000 problems. Its
    # trainer averaged over tokens of each micro-batch, which weighs tokens unevenly; dapo is what it meant.
    "moxin-7b": {**MOXIN, **dict(data=(DEEPSCALER,), steps=630)},
    # DeepScaleR's context curriculum, where Moxin's script comes from: 128 problems, two updates a rollout.
    "deepscaler": {**MOXIN, **dict(data=(DEEPSCALER,), prompts=128, steps=1750, seq_len=25_600,
        micro_batch_size=1, curriculum=("1040@8192", "480@16384", "230@24576@16"))},
}
# fmt: on


# Rolling out


def conversation(problem: Problem, config: Config) -> list[dict[str, Any]]:
    """The messages before the model's answer."""
    system = config.system
    if config.tools and not system:
        system = tools.meta_instruction(tools.tool_names(config.tools))
    opening = [{"role": "system", "content": system}] if system else []
    return [*opening, {"role": "user", "content": problem.prompt + config.suffix}]


def roll_out(
    model: Transformer,
    problems: list[Problem],
    tokenizer: Tokenizer,
    config: Config,
    seed: int,
    num_samples: int,
    max_new_tokens: int,
    temperature: float,
) -> list[Episode]:
    """Sample `num_samples` completions of each problem, with the tools they call. Groups stand together."""
    talks = [conversation(problem, config) for problem in problems]
    prompts = [render(t, tokenizer, config.chat_format, add_generation_prompt=True).ids for t in talks]
    special = tokenizer.special_tokens
    stops = (tokenizer.eos_id,) if config.chat_format == "tulu" else (special["<eoc>"], special["<eom>"])
    sampling = dict(temperature=temperature, stop_ids=stops, max_batch=config.max_batch)
    with unsharded(model):
        sampled = generate(model, prompts, max_new_tokens, num_samples, seed=seed, **sampling)
        episodes = [
            Episode(
                group, prompts[group], c.tokens, [True] * len(c.tokens), c.logprobs, c.finish_reason == "stop"
            )
            for group, completions in enumerate(sampled)
            for c in completions
        ]
        if config.chat_format == "tulu":
            for episode in episodes:
                episode.text = tokenizer.decode(episode.tokens[: -1 if episode.finished else None])
        else:
            answers = [use_tools(episode, talks[episode.group], tokenizer, config) for episode in episodes]
            asked = [episode for episode, answers_now in zip(episodes, answers, strict=True) if answers_now]
            inputs = [episode.prompt + episode.tokens for episode in asked]
            sampled = generate(model, inputs, max_new_tokens, seed=seed + 1, **sampling)
            for episode, (answer,) in zip(asked, sampled, strict=True):
                episode.tokens = episode.tokens + answer.tokens
                episode.own = episode.own + [True] * len(answer.tokens)
                episode.logprobs = episode.logprobs + answer.logprobs
                episode.finished = answer.tokens[-1] == special["<eom>"]
                episode.text = tokenizer.decode(answer.tokens[: -1 if episode.finished else None])
    return episodes


def use_tools(episode: Episode, talk: list[dict], tokenizer: Tokenizer, config: Config) -> bool:
    """Run the commands an episode ends with and append the results, up to the header of its answer.

    The appended tokens are those of the renderer; the model's own are kept as it sampled them. False if the
    episode does not end in commands: then it never gets to answer.
    """
    end = tokenizer.special_tokens["<eoc>"]
    episode.finished = False
    if episode.tokens[-1] != end:
        return False
    thoughts, _, commands = tokenizer.decode(episode.tokens[:-1]).rpartition("<|Commands|>:")
    outcome = tools.run_commands(commands, tools.tool_names(config.tools))
    episode.calls, episode.failures = outcome.calls, outcome.failures
    turn = {"role": "assistant", "thoughts": thoughts, "commands": commands, "results": outcome.text}
    whole = render([*talk, turn], tokenizer, "moss").ids
    added = whole[len(whole) - whole[::-1].index(end) :]
    episode.tokens = episode.tokens + added
    episode.own = episode.own + [False] * len(added)
    episode.logprobs = episode.logprobs + [0.0] * len(added)
    return True


def judge(episodes: list[Episode], problems: list[Problem], config: Config, limit: int) -> None:
    """Write each episode's reward: 1 for a right answer that came to its end, else 0.

    DAPO's penalty for running towards the limit (arXiv 2503.14476, eq. 13) is taken off if asked for.
    """
    for episode in episodes:
        problem = problems[episode.group]
        options = {"boxed_only": config.boxed_only} if problem.task == "math" else {}
        right = episode.finished and REWARDS[problem.task](episode.text, problem.answer, **options)
        episode.reward = float(right)
        if config.overlong_tokens:
            over = len(episode.tokens) - (limit - config.overlong_tokens)
            episode.reward -= min(max(over / config.overlong_tokens, 0.0), 1.0)

    # Advantages


def advantages_of(rewards: Tensor, scale_by_std: bool = True, eps: float = 1e-4) -> Tensor:
    """rewards [groups, samples] -> advantages of the same shape. Equal rewards give exactly 0."""
    rewards = rewards.double()
    centred = rewards - rewards[:, :1]  # first, so that equal rewards leave no rounding error to be divided
    centred = centred - centred.mean(1, keepdim=True)
    return centred / (centred.std(1, keepdim=True) + eps) if scale_by_std else centred


def assign_advantages(episodes: list[Episode], config: Config, samples: int, seed: int) -> None:
    """Write each episode's advantage over its group: `samples` episodes that stand together."""
    rewards = torch.tensor([episode.reward for episode in episodes])
    if config.shuffle_rewards:
        rewards = rewards[torch.randperm(len(rewards), generator=torch.Generator().manual_seed(seed))]
    advantages = advantages_of(rewards.view(-1, samples), config.scale_by_std, config.std_eps)
    for episode, advantage in zip(episodes, advantages.flatten().tolist(), strict=True):
        episode.advantage = advantage


# The loss


def weight_of(episode: Episode, config: Config, sequences: int, tokens: int, limit: int) -> float:
    """What one token of an episode counts in the loss.

    grpo: sequences count the same (arXiv 2402.03300, eq. 3). dapo: tokens count the same (2503.14476, eq. 8).
    dr_grpo: as tokens of sequences of the longest length (2503.20783), so that long ones are not favoured.
    bnpo, TRL's first: tokens of a micro-batch count the same, and micro-batches do (see accumulate).
    """
    if config.aggregation == "grpo":
        return 1 / (sequences * sum(episode.own))
    if config.aggregation == "dr_grpo":
        return 1 / (sequences * limit)
    return 1 / tokens


def policy_loss(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    weights: Tensor,
    mask: Tensor,
    config: Config,
    reference: Tensor | None = None,
    entropy: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss, and the ratio [n, T] (or [n, 1] for sequences). Inputs [n, T], advantages [n, 1].

    KL(policy || reference) enters through an estimate made from the sampled tokens, d = log reference - log
    policy. Estimates of one quantity, but their gradients are those of different ones (checked on a
    categorical distribution in tests/test_grpo.py):

        forward        k3 = e^d - d - 1     gradient of the forward KL(reference || policy); DeepScaleR, Moxin
        reverse        k2 = d^2 / 2         gradient of the reverse KL(policy || reference)
        reverse_ratio  rho k3               the same, also after several updates; TRL

    (k1 = -d, the plain estimate, has no gradient on average.)
    """
    log_ratio = (logprobs - old) * mask
    if config.ratio == "sequence":  # GSPO, arXiv 2507.18071, eq. 7
        log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    ratio = log_ratio.exp()
    if config.ratio == "cispo":  # arXiv 2506.13585, eq. 4: the gradient of every token survives
        gain = ratio.detach().clamp(max=config.cispo_cap) * advantages * logprobs
    else:
        bounded = ratio.clamp(max=config.dual_clip) if config.dual_clip else ratio
        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        gain = torch.minimum(bounded * advantages, clipped * advantages)
    loss = -(gain * weights).sum()
    if reference is not None:
        delta = (reference - logprobs) * mask
        k3 = delta.exp() - delta - 1
        penalty = {"forward": k3, "reverse": 0.5 * delta**2, "reverse_ratio": ratio * k3}[config.kl_gradient]
        loss = loss + config.kl_coef * (penalty * weights).sum()
    if entropy is not None:
        loss = loss - config.entropy_coef * (entropy * weights).sum()
    return loss, ratio


# Updating


@torch.no_grad()
def score(model: Transformer, episodes: list[Episode], config: Config, run: Run) -> list[list[float]]:
    """Log-probabilities of each episode's completion under a model, on every process."""
    found: dict[int, list[float]] = {}
    numbers = {id(episode): number for number, episode in enumerate(episodes)}
    for share in deal(episodes, config.micro_batch_size * config.seq_len, run):
        micro = make_micro(share or episodes[:1], [0.0] * max(1, len(share)), run.device)
        logprobs, _ = model.logprobs(micro.tokens, micro.targets, temperature=config.temperature)
        for row, episode in enumerate(share):
            start = len(episode.prompt) - 1
            found[numbers[id(episode)]] = logprobs[row, start : start + len(episode.tokens)].tolist()
    return [logprobs for _, logprobs in sorted(gather(list(found.items()), run))]


def update(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    guard: SpikeGuard,
    episodes: list[Episode],
    config: Config,
    run: Run,
    step: int,
    limit: int,
) -> Statistics:
    """Learn from a rollout: `epochs` passes, in updates of batch_size completions."""
    statistics = Statistics(run.device, config.kl_coef > 0)
    parts = max(1, len(episodes) // config.batch_size)
    for epoch in range(config.epochs):
        order = list(range(len(episodes)))
        random.Random(f"{config.seed}/{step}/{epoch}").shuffle(order)
        for part in range(parts):
            batch = [episodes[number] for number in sorted(order[part::parts])]
            loss = run.sum(accumulate(model, batch, config, run, limit, statistics))[0]
            statistics.updates.append(take_step(model, optimizer, guard, config, step, loss))
    return statistics


def accumulate(
    model: Transformer, batch: list[Episode], config: Config, run: Run, limit: int, statistics: Statistics
) -> Tensor:
    """Add the gradient of one update's loss on this process's share; returns that share of the loss.

    Episodes without advantage are not forwarded, but they count in the weights: leaving them out saves work
    and changes nothing, except that the KL and entropy terms skip them (keep_zero_variance keeps them).
    """
    counted = [episode for episode in batch if episode.finished or not config.mask_truncated]
    tokens = max(1, sum(sum(episode.own) for episode in counted))
    live = [episode for episode in counted if episode.advantage or config.keep_zero_variance]
    total = torch.zeros((), device=run.device)
    shares = deal(live or batch[:1], config.micro_batch_size * config.seq_len, run)
    for share in shares:
        # With nothing to learn here, a forward of weight 0 keeps the processes' collectives in step.
        idle = not share or not live
        chosen = share or batch[:1]
        weights = [0.0 if idle else weight_of(e, config, len(batch), tokens, limit) for e in chosen]
        if config.aggregation == "bnpo" and not idle:
            own = sum(sum(episode.own) for episode in chosen)
            weights = [1 / (own * len(shares) * run.world_size)] * len(chosen)
        micro = make_micro(chosen, weights, run.device)
        logprobs, entropy = model.logprobs(micro.tokens, micro.targets, temperature=config.temperature)
        old = micro.old if config.several_updates else logprobs.detach()
        loss, ratio = policy_loss(
            logprobs,
            old,
            micro.advantages,
            micro.weights,
            micro.targets != IGNORE,
            config,
            micro.reference if config.kl_coef else None,
            entropy if config.entropy_coef else None,
        )
        loss.backward()
        total += loss.detach()
        if share:
            now = logprobs.detach(), old, entropy.detach(), ratio.detach()
            statistics.add(micro, *now, config.clip_low, config.clip_high)
    return total


# Before and after


def evaluate(
    model: Transformer, problems: list[Problem], tokenizer: Tokenizer, config: Config, run: Run
) -> dict[str, float]:
    """Accuracy on held-out problems: greedy, pass@1 and pass@k by sampling. Prints a few completions."""
    share = problems[run.rank :: run.world_size]
    limit, k = config.max_new_tokens, config.eval_samples
    sampled = roll_out(model, share, tokenizer, config, config.seed, k, limit, config.temperature)
    greedy = roll_out(model, share, tokenizer, config, config.seed, 1, limit, 0.0)
    for episodes in (sampled, greedy):
        judge(episodes, share, config, limit)
    right = [0] * len(share)
    for episode in sampled:
        right[episode.group] += episode.reward > 0
    sums = run.sum(
        len(share),
        sum(pass_at_k(k, count, 1) for count in right),
        sum(pass_at_k(k, count, k) for count in right),
        sum(episode.reward > 0 for episode in greedy),
        sum(len(episode.tokens) for episode in sampled) / k,
    )
    names = ("pass@1", f"pass@{k}", "greedy", "eval_length")
    values = {name: value / sums[0] for name, value in zip(names, sums[1:], strict=True)}
    run.say("held out: " + ", ".join(f"{name} {value:.3f}" for name, value in values.items()))
    for episode in greedy[:2]:
        asked = share[episode.group].prompt
        run.say(f"  {asked!r} -> {tokenizer.decode(episode.tokens)!r}  reward {episode.reward:.0f}")
    return values


# The model at the start


def make_tokenizer(problems: Problems, config: Config) -> Tokenizer:
    """A small vocabulary for the conversations that the model made here will read and write."""
    letters = train_tokenizer(["."], 256 + len(SPECIAL_TOKENS))
    talks = [demonstration(problems.train(index), config) for index in range(500)]
    texts = [letters.decode(render(talk, letters, config.chat_format).ids) for talk in talks]
    tokenizer = train_tokenizer(texts, config.vocab_size)
    tokenizer.chat_template = chat_template(tokenizer, config.chat_format)
    return tokenizer


def demonstration(problem: Problem, config: Config) -> list[dict[str, Any]]:
    if not problem.demonstration:
        raise UserError(
            f"no solution to learn from for {problem.prompt[:60]!r}; give --init_from a model instead"
        )
    return [*conversation(problem, config), {"role": "assistant", **problem.demonstration}]


def warm_start(config: Config, run: Run, problems: Problems) -> None:
    """Teach a new model by demonstrations, -sum log p(answer token) / N, and save it as RUN/start."""
    tokenizer = make_tokenizer(problems, config)
    model = new_model(own_shape(config, tokenizer.vocab_size), run)
    model.init_weights(config.seed)
    optimizer = make_adamw(model, config.warm_lr, 0.0)
    rows = run.rows(config.warm_batch)
    for step in range(config.warm_steps):
        first = step * config.warm_batch
        talks = [demonstration(problems.train(first + row), config) for row in range(rows.start, rows.stop)]
        rendered = [render(talk, tokenizer, config.chat_format) for talk in talks]
        width = max(len(one.ids) for one in rendered) - 1
        tokens, targets = (
            torch.zeros(len(rendered), width, dtype=torch.long),
            torch.full((len(rendered), width), IGNORE),
        )
        for row, one in enumerate(rendered):
            ids = torch.tensor(one.ids)
            tokens[row, : len(ids) - 1] = ids[:-1]
            targets[row, : len(ids) - 1] = torch.where(torch.tensor(one.mask), ids, IGNORE)[1:]
        (counted,) = run.sum((targets >= 0).sum())
        loss, _ = model.loss(tokens.to(run.device), targets.to(run.device))
        (loss / counted).backward()
        clip_grad_norm(model, config.grad_clip)
        set_learning_rate(optimizer, config.warm_lr * min((step + 1) / 20, 1 - step / config.warm_steps))
        optimizer.step()
        optimizer.zero_grad()
        if due(100, step + 1):
            nats = run.sum(loss.detach())[0] / counted
            run.say(f"demonstrations: step {step + 1}/{config.warm_steps}, loss {nats:.3f}")
    save_pretrained(model, run.folder / "start", tokenizer)


def own_shape(config: Config, vocab_size: int) -> Shape:
    """The shape of the model made here."""
    return Shape(
        vocab_size=vocab_size,
        layers=config.layers,
        dim=config.dim,
        heads=config.heads,
        kv_heads=config.heads,
        head_dim=config.dim // config.heads,
        ffn_dim=8 * config.dim // 3,
        max_seq_len=max(256, config.seq_len),
        tied=True,
    )


def load(folder: str, run: Run) -> Transformer:
    """A model folder, shared among the processes."""
    model = new_model(read_config(folder), run)
    load_weights(model, folder)
    # FSDP wants its first call through the root, and sampling enters by the layers. `unsharded` also frees
    # the gathered weights again: left there, an optimizer would be given these instead of the shards.
    with torch.no_grad(), unsharded(model):
        first = torch.zeros(1, 2, dtype=torch.long, device=run.device)
        model.logprobs(first, first)
    return model


# The run


@dataclass(frozen=True)
class Stage:
    """Part of a curriculum: from rollout `first` on, up to `limit` tokens, `samples` of a problem."""

    first: int
    limit: int
    samples: int


def plan(config: Config) -> list[Stage]:
    """DeepScaleR's schedule of contexts; without --curriculum, one stage."""
    stages, first = [], 0
    for text in config.curriculum or (f"{config.steps}@{config.max_new_tokens}",):
        numbers = text.split("@")
        require(
            len(numbers) in (2, 3) and all(map(str.isdecimal, numbers)),
            f"--curriculum {text!r}: expected STEPS@MAX_NEW_TOKENS or STEPS@MAX_NEW_TOKENS@NUM_SAMPLES",
        )
        steps, limit, *samples = map(int, numbers)
        stages.append(Stage(first, limit, samples[0] if samples else config.num_samples))
        first += steps
    require(first == config.steps, f"--curriculum has {first} steps in all, --steps says {config.steps}")
    return stages


def collect(
    model: Transformer,
    problems: Problems,
    tokenizer: Tokenizer,
    config: Config,
    run: Run,
    step: int,
    stage: Stage,
    cursor: int,
    clock: Clock,
) -> tuple[list[Episode], int]:
    """A rollout over all processes, judged, with advantages; and where in the problems the next one begins.

    With resample_rounds (DAPO's dynamic sampling) groups of equal rewards are replaced by others.
    """
    kept: list[Episode] = []
    rows = run.rows(config.prompts)
    for attempt in range(1 + config.resample_rounds):
        chosen = [problems.train(cursor + row) for row in range(rows.start, rows.stop)]
        seed = random.Random(f"{config.seed}/{step}/{attempt}/{run.rank}").getrandbits(60)
        with clock("rollout"):
            episodes = roll_out(
                model, chosen, tokenizer, config, seed, stage.samples, stage.limit, config.temperature
            )
        with clock("reward"):
            judge(episodes, chosen, config, stage.limit)
        for episode in episodes:
            episode.group += cursor + rows.start  # now its number among all problems
        cursor += config.prompts
        episodes = gather(episodes, run)
        assign_advantages(episodes, config, stage.samples, step)
        if not config.resample_rounds:
            return episodes, cursor
        kept += [episode for episode in episodes if episode.advantage]
        if len(kept) >= config.prompts * stage.samples:
            break
    return (kept or episodes)[: config.prompts * stage.samples], cursor


def main() -> None:
    config = parse(Config, PRESETS, about=__doc__)
    stages = plan(config)
    require(
        bool(config.init_from) or config.warm_steps > 0,
        "without --warm_steps, give a model: --init_from FOLDER",
    )
    if config.dry_run:
        return print_estimate(
            config,
            read_config(config.init_from) if config.init_from else own_shape(config, config.vocab_size),
        )

    run = Run(config, "grpo")
    problems = Problems(config.data, config.seed, config.skip_bad)
    for remark in problems.remarks:
        run.say(f"left out: {remark}")
    start = config.init_from or str(run.folder / "start")
    cpu_seconds = {"warm start": 0.0, "rollouts and updates": 0.0}  # of this process
    if not config.init_from and not (run.folder / "start").exists():
        warm_start(config, run, problems)
        cpu_seconds["warm start"] = time.process_time()
    tokenizer, model = load_tokenizer(start), load(start, run)
    reference = load(start, run) if config.kl_coef else None
    optimizer = make_adamw(model, config.lr, config.weight_decay, betas=(0.9, 0.999))
    guard = SpikeGuard(window=10**9)  # only what is not finite: rewards make honest jumps
    held_out = problems.test(config.eval_problems)
    same = ("seed", "lr", "schedule", "data", "prompts", "num_samples", "batch_size", "epochs", "temperature")
    identity = {"model": asdict(model.config), **{name: getattr(config, name) for name in same}}
    checkpoints = Checkpointer(run, model, optimizer, identity)
    state = checkpoints.resume(guard)
    cursor = state.get("cursor", 0)
    before = state.get("before") or evaluate(model, held_out, tokenizer, config, run)

    run.say(
        f"{num_parameters(model.config):,} parameters, {config.steps} rollouts of {config.prompts} problems"
    )
    run.progress(config.steps)
    step = run.start_step
    while step < config.steps:
        stage = [stage for stage in stages if stage.first <= step][-1]
        clock, begun, begun_cpu = Clock(), time.monotonic(), time.process_time()
        episodes, cursor = collect(model, problems, tokenizer, config, run, step, stage, cursor, clock)
        if config.several_updates:
            with clock("old"):
                for episode, logprobs in zip(episodes, score(model, episodes, config, run), strict=True):
                    episode.old = logprobs
        if reference is not None:
            with clock("reference"):
                for episode, logprobs in zip(episodes, score(reference, episodes, config, run), strict=True):
                    episode.reference = logprobs
        with clock("update"):
            learnt = update(model, optimizer, guard, episodes, config, run, step, stage.limit).read(run)
        if learnt["mismatch"] > config.max_mismatch:
            raise UserError(
                f"sampler and trainer differ by {learnt['mismatch']:.3g} nats a token (--max_mismatch "
                f"{config.max_mismatch}): they no longer compute the same model; try --dtype float32"
            )

        cpu_seconds["rollouts and updates"] += time.process_time() - begun_cpu
        step += 1
        stopping, last = run.should_stop(), step == config.steps
        if due(config.log_every, step) or last:
            seconds = {f"seconds/{phase}": value for phase, value in clock.seconds.items()}
            made = sum(len(episode.tokens) for episode in episodes)
            speed = {
                "generated_tokens_per_second": made / clock.seconds["rollout"],
                "trained_tokens_per_second": learnt["trained_tokens"] / clock.seconds["update"],
                "step_seconds": time.monotonic() - begun,
                "peak_memory_bytes": peak_memory_bytes(run.device),
            }
            run.log(step, config.steps, **describe(episodes, stage.samples), **learnt, **speed, **seconds)
            write_samples(run, step, episodes, tokenizer)
        if due(config.eval_every, step) and not (last or stopping):
            run.log(step, config.steps, **evaluate(model, held_out, tokenizer, config, run))
        checkpoints.after_step(step, last, stopping, guard=guard.state_dict(), before=before, cursor=cursor)

    after = evaluate(model, held_out, tokenizer, config, run)
    run.log(step, config.steps, **after)
    checkpoints.wait()
    save_pretrained(model, run.folder / "model", tokenizer)
    curves = (("reward", *tuple(after)[:3]), ("length", "eval_length"), ("entropy",), ("kl_k3", "mismatch"))
    curves += (("clip_low", "clip_high"), ("grad_norm",), ("all_right", "all_wrong", "truncated"))
    summary = {"before": before, "after": after, "problems": cursor, "skipped_steps": guard.skipped}
    run.finish({**summary, "cpu_seconds": cpu_seconds}, curves)
    run.say(f"done: {run.folder}/curves.png, {run.folder}/summary.json, model in {run.folder}/model")
    run.say(f"next: python chat.py --model {run.folder}/model")


def write_samples(run: Run, step: int, episodes: list[Episode], tokenizer: Tokenizer) -> None:
    """Append two completions of the rollout to samples.jsonl, with what they earned."""
    if run.main:
        with open(run.folder / "samples.jsonl", "a") as file:
            for episode in (episodes[0], episodes[-1]):
                texts = {
                    "prompt": tokenizer.decode(episode.prompt),
                    "completion": tokenizer.decode(episode.tokens),
                }
                record = {"step": step, **texts, "reward": episode.reward, "advantage": episode.advantage}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    run_main(main)
