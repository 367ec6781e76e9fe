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
    python grpo.py --init_from runs/sft/model --data gsm8k.train.jsonl --suffix '' --max_new_tokens 512
"""

import itertools
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from core import rollouts, tools
from core.checkpoint import load_weights, read_config, resolve_folder, save_pretrained
from core.config import UserError, parse, require, run_main
from core.estimate import print_estimate
from core.generate import generate
from core.optimizer import make_adamw, take_step
from core.parallel import new_model, unsharded
from core.resume import Checkpointer
from core.rewards import REWARDS
from core.rollouts import IGNORE, Clock, Episode, Statistics
from core.run import Run, SpikeGuard, due
from data.chat import after_commands, render
from data.demonstrations import Pupil, small_shape, teach
from data.problems import Problem, Problems
from data.readers import Message
from data.replies import end_ids, read_commands
from data.tokenizer import Tokenizer, load_tokenizer
from model import Transformer, num_parameters


@dataclass(kw_only=True)
class Config(Pupil):
    data: tuple[str, ...] = ("sorting",)  # tasks of data/problems.py or files, each with an optional :weight
    skip_bad: bool = False  # leave unreadable records of a file out instead of stopping
    system: str = ""  # system message; empty = none, or with --tools MOSS's meta-instruction
    suffix: str = ""  # put behind every problem
    tools: tuple[str, ...] = ()  # calculator, search ...: run between commands and answer; moss format only
    boxed_only: bool = False  # an answer outside \\boxed{} earns nothing
    # Rolling out
    steps: int = 60  # rollouts, each followed by its updates
    prompts: int = 32  # problems in a rollout, over all processes
    num_samples: int = 8  # completions of each problem: the group
    max_new_tokens: int = 16  # longest completion
    curriculum: tuple[str, ...] = ()  # STEPS@MAX_NEW_TOKENS[@NUM_SAMPLES] ..., one after the other
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

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.temperature > 0, "--temperature must be above 0: greedy completions are all equal")
        require(self.num_samples > 1, "--num_samples must be at least 2: a group is compared with itself")
        require(not self.tools or self.chat_format == "moss", "--tools need --chat_format moss")
        parts, rest = divmod(self.prompts * self.num_samples, self.batch_size)
        require(parts > 0 and rest == 0, "--batch_size must divide --prompts x --num_samples")
        bounded = not self.dual_clip or self.dual_clip > 1 + self.clip_high
        require(bounded, "--dual_clip must exceed 1 + --clip_high")

    @property
    def opening(self) -> str:
        """The system message."""
        return self.system or (tools.meta_instruction(tools.tool_names(self.tools)) if self.tools else "")

    @property
    def several_updates(self) -> bool:
        """Whether a rollout is used more than once, so that the ratio moves away from 1."""
        return self.epochs > 1 or self.prompts * self.num_samples > self.batch_size


# fmt: off
# DeepScaleR's and Moxin's prompts end in this sentence.
BOXED = " Let's think step by step and output the final answer within \\boxed{}."
DEEPSCALER = "hub/agentica-org/DeepScaleR-Preview-Dataset/deepscaler.json"
# Moxin's script. The paper leaves the number of steps open: ours is one pass over 40,000 problems. Its
# trainer averaged over the tokens of each micro-batch, which weighs them unevenly; dapo is what it meant.
MOXIN: dict[str, Any] = dict(
    data=(DEEPSCALER,), suffix=BOXED, boxed_only=True, steps=630, prompts=64, num_samples=8, batch_size=512,
    max_new_tokens=16_384, seq_len=17_408, micro_batch_size=2, max_batch=128, temperature=0.6, std_eps=1e-6,
    lr=1e-6, min_lr=1e-6, schedule="constant", weight_decay=0.01, kl_coef=0.001, entropy_coef=0.001,
    keep_zero_variance=True, checkpointing="full", compile=True, log_every=1, eval_every=20, save_every=20,
    eval_problems=500,
)
PRESETS: dict[str, dict[str, Any]] = {
    # Ours, for one thread of a laptop: one update a rollout, no completion scored twice.
    "tiny": dict(lr=6e-4, warmup_steps=20, schedule="linear", weight_decay=0.0, seq_len=64,
        micro_batch_size=32, max_new_tokens=10, warm_steps=165, warm_batch=16, steps=240, log_every=5,
        eval_every=40, save_every=40),
    # Ours, for one GPU: a model of some 11 M parameters, taught and trained in minutes.
    "small": dict(data=("countdown", "steps"), dim=384, layers=6, heads=6, warm_steps=2000, warm_batch=256,
        warm_lr=1e-3, lr=1e-4, warmup_steps=10, schedule="linear", weight_decay=0.0, prompts=128,
        num_samples=16, batch_size=2048, max_new_tokens=96, seq_len=160, micro_batch_size=1024,
        max_batch=2048, steps=200, log_every=5, eval_every=50, save_every=50),
    "moxin-7b": MOXIN,
    # DeepScaleR's context curriculum, where Moxin's script comes from: 128 problems, two updates a rollout.
    "deepscaler": {**MOXIN, **dict(prompts=128, steps=1750, seq_len=25_600, micro_batch_size=1,
        curriculum=("1040@8192", "480@16384", "230@24576@16"))},
}
# fmt: on


# Rolling out


def roll_out(
    model: Transformer, problems: list[Problem], tokenizer: Tokenizer, config: Config, seed: int, limit: int,
    num_samples: int, temperature: float,
) -> list[Episode]:  # fmt: skip
    """Sample `num_samples` completions of up to `limit` tokens of each problem; groups stand together.

    In the moss format a completion has two parts, each up to the limit, and tools run in between.
    """
    talks = [problem.conversation(config.opening, config.suffix) for problem in problems]
    prompts = [render(t, tokenizer, config.chat_format, add_generation_prompt=True).ids for t in talks]
    moss = config.chat_format == "moss"
    stops = end_ids(tokenizer, "<eoc>", "<eom>") if moss else (tokenizer.eos_id,)
    sampling = dict(temperature=temperature, stop_ids=stops, max_batch=config.max_batch)
    with unsharded(model):
        sampled = generate(model, prompts, limit, num_samples, seed=seed, **sampling)
        episodes = [
            Episode(group, prompts[group]).add(completion, tokenizer)
            for group, completions in enumerate(sampled)
            for completion in completions
        ]
        if moss:
            room = model.config.max_seq_len
            asked = [e for e in episodes if use_tools(e, talks[e.group], tokenizer, config, room)]
            inputs = [episode.prompt + episode.tokens for episode in asked]
            answers = generate(model, inputs, limit, seed=seed + 1, **sampling)
            for episode, (answer,) in zip(asked, answers, strict=True):
                episode.add(answer, tokenizer)
    return episodes


def use_tools(episode: Episode, talk: list[Message], tokenizer: Tokenizer, config: Config, room: int) -> bool:
    """Run the commands an episode ends in and append their results, which are never in the loss.

    False if it ends otherwise, or if the results leave no room in the context: then it never gets to answer.
    """
    episode.text, episode.finished = "", False
    written = read_commands(episode.tokens, tokenizer)
    if written is None:
        return False
    outcome = tools.run_commands(written[1], tools.tool_names(config.tools))
    episode.calls, episode.failures = outcome.calls, outcome.failures
    meta = talk[0]["content"] if talk[0]["role"] == "system" else ""
    given = after_commands({"results": outcome.text}, meta, tokenizer)
    if episode.length + len(given) >= room:
        return False
    episode.add_given(given)
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
    logprobs: Tensor, old: Tensor, advantages: Tensor, weights: Tensor, mask: Tensor, config: Config,
    reference: Tensor | None = None, entropy: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
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


def update(
    model: Transformer, optimizer: torch.optim.Optimizer, guard: SpikeGuard, episodes: list[Episode],
    config: Config, run: Run, step: int, limit: int,
) -> Statistics:  # fmt: skip
    """Learn from a rollout: `epochs` passes, in updates of about batch_size completions, groups undivided."""
    statistics = Statistics(run.device, config.kl_coef > 0)
    parts = max(1, len(episodes) // config.batch_size)
    groups = [list(group) for _, group in itertools.groupby(episodes, key=lambda episode: episode.prompt)]
    for epoch in range(config.epochs):
        random.Random(f"{config.seed}/{step}/{epoch}").shuffle(groups)
        for part in range(parts):
            batch = [episode for group in groups[part::parts] for episode in group]
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
    shares = rollouts.deal(live or batch[:1], config.micro_batch_size * config.seq_len, run)
    for share in shares:
        # With nothing to learn here, a forward of weight 0 keeps the processes' collectives in step.
        idle = not share or not live
        chosen = share or batch[:1]
        weights = [0.0 if idle else weight_of(e, config, len(batch), tokens, limit) for e in chosen]
        if config.aggregation == "bnpo" and not idle:
            own = sum(sum(episode.own) for episode in chosen)
            weights = [1 / (own * len(shares) * run.world_size)] * len(chosen)
        micro = rollouts.make_micro(chosen, weights, run.device)
        logprobs, entropy = micro.logprobs(model, config.temperature)
        old = micro.old if config.several_updates else logprobs.detach()
        mask, reference = micro.targets != IGNORE, micro.reference if config.kl_coef else None
        inputs = logprobs, old, micro.advantages, micro.weights, mask, config, reference
        loss, ratio = policy_loss(*inputs, entropy if config.entropy_coef else None)
        loss.backward()
        total += loss.detach()
        if not idle:
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
    sampled = roll_out(model, share, tokenizer, config, config.seed, limit, k, config.temperature)
    greedy = roll_out(model, share, tokenizer, config, config.seed, limit, 1, 0.0)
    for episodes in (sampled, greedy):
        judge(episodes, share, config, limit)
    right = [sum(e.reward > 0 for e in sampled[start : start + k]) for start in range(0, len(sampled), k)]
    sums = {
        "pass@1": sum(rollouts.pass_at_k(k, count, 1) for count in right),
        f"pass@{k}": sum(rollouts.pass_at_k(k, count, k) for count in right),
        "greedy": sum(episode.reward > 0 for episode in greedy),
        "eval_length": sum(len(episode.tokens) for episode in sampled) / k,
    }
    count, *values = run.sum(len(share), *sums.values())
    found = {name: value / count for name, value in zip(sums, values, strict=True)}
    run.say("held out: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    for episode, problem in list(zip(greedy, share, strict=True))[:2]:
        run.say(f"  {problem.prompt!r} -> {tokenizer.decode(episode.tokens)!r}  reward {episode.reward:.0f}")
    return found


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
        understood = len(numbers) in (2, 3) and all(map(str.isdecimal, numbers))
        require(understood, f"--curriculum {text!r}: expected STEPS@MAX_NEW_TOKENS[@NUM_SAMPLES]")
        steps, limit, *samples = map(int, numbers)
        stages.append(Stage(first, limit, samples[0] if samples else config.num_samples))
        first += steps
    require(first == config.steps, f"--curriculum has {first} steps in all, --steps says {config.steps}")
    return stages


def collect(
    model: Transformer, problems: Problems, tokenizer: Tokenizer, config: Config, run: Run, step: int,
    stage: Stage, cursor: int, clock: Clock,
) -> tuple[list[Episode], int]:  # fmt: skip
    """A rollout over all processes, with advantages, and where in the problems the next one begins.

    With resample_rounds (DAPO's dynamic sampling) groups of equal rewards are replaced by others.
    """
    kept: list[Episode] = []
    rows = run.rows(config.prompts)
    for attempt in range(1 + config.resample_rounds):
        chosen = [problems.train(cursor + row) for row in range(rows.start, rows.stop)]
        seed = random.Random(f"{config.seed}/{step}/{attempt}/{run.rank}").getrandbits(60)
        how = seed, stage.limit, stage.samples, config.temperature
        with clock("rollout"):
            episodes = roll_out(model, chosen, tokenizer, config, *how)
        with clock("reward"):
            judge(episodes, chosen, config, stage.limit)
        episodes = rollouts.gather(episodes, run)
        assign_advantages(episodes, config, stage.samples, step)
        cursor += config.prompts
        if not config.resample_rounds:
            return episodes, cursor
        kept += [episode for episode in episodes if episode.advantage]
        if len(kept) >= config.prompts * stage.samples:
            break
    return (kept or episodes)[: config.prompts * stage.samples], cursor


def load(folder: Path, run: Run) -> Transformer:
    """A model folder, shared among the processes."""
    model = new_model(read_config(folder), run)
    load_weights(model, folder)
    return model


def main() -> None:
    config = parse(Config, PRESETS, about=__doc__)
    stages = plan(config)
    require(bool(config.init_from or config.warm_steps), "give --init_from MODEL, or --warm_steps > 0")
    if config.dry_run:
        shape = read_config(resolve_folder(config.init_from)) if config.init_from else None
        return print_estimate(config, shape or small_shape(config, config.vocab_size))

    run = Run(config, "grpo")
    problems = Problems(config.data, config.seed, config.skip_bad)
    for remark in problems.remarks:
        run.say(f"left out: {remark}")
    start = resolve_folder(config.init_from) if config.init_from else run.folder / "start"
    cpu_seconds = {"demonstrations": -time.process_time(), "reinforcement": 0.0}  # of this process
    if not config.init_from and not config.resume:
        teach(start, lambda n: problems.train(n).solved(config.opening, config.suffix), config, run)
    cpu_seconds["demonstrations"] += time.process_time()
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
    if not state:
        run.log(0, config.steps, **before)

    size = num_parameters(model.config)
    run.say(f"{size:,} parameters, {config.steps} rollouts of {config.prompts} problems")
    run.progress(config.steps)
    step = run.start_step
    while step < config.steps:
        stage = [stage for stage in stages if stage.first <= step][-1]
        clock = Clock()
        episodes, cursor = collect(model, problems, tokenizer, config, run, step, stage, cursor, clock)
        live = [episode for episode in episodes if episode.advantage or config.keep_zero_variance]
        if config.several_updates:
            with clock("old"):
                rollouts.score(model, live, "old", config.temperature, run)
        if reference is not None:
            with clock("reference"):
                rollouts.score(reference, live, "reference", config.temperature, run)
        with clock("update"):
            learnt = update(model, optimizer, guard, episodes, config, run, step, stage.limit).read(run)
        if learnt["mismatch"] > config.max_mismatch:
            raise UserError(
                f"sampler and trainer differ by {learnt['mismatch']:.3g} nats a token (--max_mismatch "
                f"{config.max_mismatch}): they no longer compute the same model; try --dtype float32"
            )

        cpu_seconds["reinforcement"] += clock.cpu_seconds
        step += 1
        stopping, last = run.should_stop(), step == config.steps
        if due(config.log_every, step) or last:
            speed = clock.speed(episodes, learnt["trained_tokens"], run.device)
            run.log(step, config.steps, **rollouts.describe(episodes, stage.samples), **learnt, **speed)
            rollouts.write_samples(run, step, episodes, tokenizer)
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
    run.say(f"next: python chat.py --model {run.folder}/model")


if __name__ == "__main__":
    run_main(main)
