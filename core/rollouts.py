"""Completions as training data: dealt to processes, padded into batches, counted for the log."""

import contextlib
import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from core.generate import Completion
from core.run import Run, peak_memory_bytes
from kernels import attention, make_bounds
from model import Transformer

IGNORE = -100  # a target that is not in the loss


@dataclass
class Episode:
    """One completion of one problem: what the model wrote, what tools put in between, and what it earned."""

    group: int  # index of its problem in the rollout
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)  # False = written by a tool: never in the loss
    logprobs: list[float] = field(default_factory=list)  # the sampler's, of own tokens
    finished: bool = False  # it came to its end by itself
    text: str = ""  # what is judged
    reward: float = 0.0
    advantage: float = 0.0  # how much better that is than its group
    calls: int = 0
    failures: int = 0  # calls of tools that gave nothing
    old: list[float] = field(default_factory=list)  # the trainer's log-probabilities before the first update
    reference: list[float] = field(default_factory=list)  # those of the model at the start

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)

    def add(self, completion: Completion, tokenizer: Any) -> "Episode":
        """Append what the model wrote; its text alone is what will be judged."""
        self.tokens = self.tokens + completion.tokens
        self.own = self.own + [True] * len(completion.tokens)
        self.logprobs = self.logprobs + completion.logprobs
        self.finished = completion.finish_reason == "stop"
        self.text = tokenizer.decode(completion.tokens[: -1 if self.finished else None])
        return self

    def add_given(self, tokens: list[int]) -> None:
        """Append what a tool wrote, which is never in the loss."""
        self.tokens = self.tokens + tokens
        self.own = self.own + [False] * len(tokens)
        self.logprobs = self.logprobs + [0.0] * len(tokens)


@dataclass
class Micro:
    """Some episodes side by side, padded on the right. All [n, T] unless said otherwise."""

    tokens: Tensor
    targets: Tensor  # the next token where the model wrote it, else -100
    sampled: Tensor  # the sampler's log-probabilities of the targets, and so on
    old: Tensor
    reference: Tensor
    weights: Tensor  # of each target in the loss
    advantages: Tensor  # [n, 1]
    row: "SharedPrompts"

    def logprobs(self, model: Transformer, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the targets and entropies where they are drawn, 0 elsewhere; see model.py."""
        self.row.window = model.config.sliding_window
        read = [x.flatten()[None, self.row.cells] for x in (self.tokens, self.targets)]
        positions = self.row.cells % self.tokens.shape[1]
        found = model.logprobs(*read, None, positions, temperature, cache=self.row)
        logprobs, entropy = (x[0, self.row.places] * (self.targets != IGNORE) for x in found)
        return logprobs, entropy


class SharedPrompts:
    """A table of sequences [n, T] as the model reads it: each prompt once, however many lines begin with it.

    What differs lies end to end in one row, without padding, and only attention sees the table. The last
    token of a prompt is read for each line, since what is to be predicted there differs.
    """

    def __init__(self, prompts: list[list[int]], lengths: list[int], device: torch.device) -> None:
        """lengths: of the lines, as they are read."""
        n, width = len(prompts), max(lengths)
        places = torch.zeros(n, width, dtype=torch.long)
        cells: list[int] = []
        starts: dict[tuple, int] = {}  # of each prompt in the row
        for line, (prompt, length) in enumerate(zip(map(tuple, prompts), lengths, strict=True)):
            begin, end = line * width, len(prompt) - 1
            if prompt not in starts:
                starts[prompt] = len(cells)
                cells += range(begin, begin + end)
            places[line, :end] = torch.arange(end) + starts[prompt]
            places[line, end:length] = torch.arange(length - end) + len(cells)
            cells += range(begin + end, begin + length)
        self.places = places.to(device)  # where in the row each cell of the table is; anywhere for padding
        self.cells = torch.tensor(cells, device=device)  # [row] the inverse: the cell, counted line by line
        self.window = 0

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The model's attention over [1, row, heads, D]: to the table, and back."""
        # F.embedding is x[0, places] with a quicker gradient.
        tables = [F.embedding(self.places, x[0].flatten(1)).unflatten(-1, x.shape[2:]) for x in (q, k, v)]
        bounds = make_bounds(self.places.shape[1], self.window, device=q.device) if self.window else None
        return attention(*tables, bounds).flatten(0, 1)[None, self.cells]


def make_micro(episodes: list[Episode], weights: list[float], device: torch.device) -> Micro:
    width = max(episode.length for episode in episodes) - 1

    def table(name: str, fill: float = 0.0) -> Tensor:
        """Something that an episode has of each of its tokens, where that token is the target."""
        rows = ([fill] * (len(e.prompt) - 1) + (getattr(e, name) or [fill] * len(e.tokens)) for e in episodes)
        return torch.tensor([row + [fill] * (width - len(row)) for row in rows])

    inputs = [(e.prompt + e.tokens)[:-1] for e in episodes]
    own = table("own", False)
    tables = (
        torch.tensor([row + [0] * (width - len(row)) for row in inputs]),
        table("tokens", IGNORE).where(own, IGNORE),
        *map(table, ("logprobs", "old", "reference")),
        own * torch.tensor(weights)[:, None],
        torch.tensor([[episode.advantage] for episode in episodes]),
    )
    row = SharedPrompts([e.prompt for e in episodes], list(map(len, inputs)), device)
    return Micro(*(value.to(device) for value in tables), row)


def deal(episodes: list[Episode], budget: int, run: Run) -> list[list[Episode]]:
    """This process's share, as micro-batches of at most `budget` tokens, padding included.

    Episodes of a prompt go together, and groups of like length. Every process gets the same number of
    micro-batches, some perhaps empty, since each forward of a sharded model must be made by all.
    """
    groups: dict[tuple, list[Episode]] = {}
    for episode in sorted(episodes, key=lambda episode: -episode.length):
        groups.setdefault(tuple(episode.prompt), []).append(episode)
    shares = []
    for rank in range(run.world_size):
        rows: list[list[Episode]] = []
        longest = 0
        for episode in itertools.chain(*list(groups.values())[rank :: run.world_size]):
            longest = max(longest, episode.length)
            if not rows or (len(rows[-1]) + 1) * longest > budget:
                rows.append([])
                longest = episode.length
            rows[-1].append(episode)
        shares.append(rows)
    most = max(map(len, shares))
    return shares[run.rank] + [[]] * (most - len(shares[run.rank]))


def gather(items: list, run: Run) -> list:
    """The lists of all processes, in order of rank, one after the other."""
    if run.world_size == 1:
        return items
    found: list = [None] * run.world_size
    dist.all_gather_object(found, items)
    return [item for part in found for item in part]


@torch.no_grad()
def score(
    model: Transformer,
    episodes: list[Episode],
    name: Literal["old", "reference"],
    temperature: float,
    run: Run,
) -> None:
    """Write each completion's log-probabilities under a model into its field `name`, on every process."""
    found: dict[int, list[float]] = {}
    numbers = {id(episode): number for number, episode in enumerate(episodes)}
    for share in deal(episodes, run.config.micro_batch_size * run.config.seq_len, run):
        micro = make_micro(share or episodes[:1], [0.0] * max(1, len(share)), run.device)
        logprobs, _ = micro.logprobs(model, temperature)
        for row, episode in enumerate(share):
            start = len(episode.prompt) - 1
            found[numbers[id(episode)]] = logprobs[row, start : start + len(episode.tokens)].tolist()
    for number, logprobs in gather(list(found.items()), run):
        setattr(episodes[number], name, logprobs)


class Statistics:
    """Sums over the tokens of a rollout's updates, for the log."""

    def __init__(self, device: torch.device, has_reference: bool) -> None:
        names = ["tokens", "read", "entropy", "clip_low", "clip_high", "ratio", "ratio_square"]
        names += ["mismatch", "mismatch_k3"] + ["kl_k1", "kl_k2", "kl_k3"] * has_reference
        # All from the start: a process that gets nothing to do must still take part in the sums.
        self.sums = {name: torch.zeros((), device=device) for name in names}
        self.largest = torch.zeros((), device=device)
        self.updates: list[dict[str, float]] = []  # what core.optimizer.take_step said of each

    def add(
        self, micro: Micro, logprobs: Tensor, old: Tensor, entropy: Tensor, ratio: Tensor,
        clip_low: float, clip_high: float,
    ) -> None:  # fmt: skip
        """Count a forward: log-probabilities [n, T] now and before the first update, entropy, ratio."""
        mask = micro.targets != IGNORE
        off = (old - micro.sampled) * mask  # trainer and sampler, about the same model
        ratio = ratio.expand_as(mask)
        values = {
            "tokens": mask,
            "entropy": entropy,
            "clip_low": (ratio < 1 - clip_low) & (micro.advantages < 0),
            "clip_high": (ratio > 1 + clip_high) & (micro.advantages > 0),
            "ratio": ratio,
            "ratio_square": ratio**2,
            "mismatch": off.abs(),
            "mismatch_k3": off.exp() - off - 1,
        }
        if "kl_k1" in self.sums:
            delta = (micro.reference - logprobs) * mask
            values |= {"kl_k1": -delta, "kl_k2": 0.5 * delta**2, "kl_k3": delta.exp() - delta - 1}
        for name, value in values.items():
            self.sums[name] += (value * mask).sum()
        self.sums["read"] += len(micro.row.cells)
        self.largest = torch.maximum(self.largest, off.abs().max())

    def read(self, run: Run) -> dict[str, float]:
        """Means over the tokens of all processes, and over the updates."""
        sums = dict(zip(self.sums, run.sum(*self.sums.values()), strict=True))
        tokens, read = max(1.0, sums.pop("tokens")), max(1.0, sums.pop("read"))
        means = {name: value / tokens for name, value in sums.items()}
        means["ratio_variance"] = max(0.0, means.pop("ratio_square") - means["ratio"] ** 2)
        means["mismatch_max"] = max(gather([self.largest.item()], run))
        count = len(self.updates)
        mean = {name: sum(one[name] for one in self.updates) / count for name in ("loss", "grad_norm")}
        last = {name: self.updates[-1][name] for name in ("lr", "skipped")}
        work = {"not_trained": 1 - tokens / read, "updates": count, "trained_tokens": tokens}
        return {**mean, **last, **means, **work}


class Clock:
    """Seconds spent in each phase of a step, and processor seconds in all."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds = 0.0

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begun, begun_cpu = time.monotonic(), time.process_time()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - begun
        self.cpu_seconds += time.process_time() - begun_cpu

    def speed(self, episodes: list[Episode], trained_tokens: float, device: torch.device) -> dict[str, float]:
        """What the step took, for the log."""
        made = sum(len(episode.tokens) for episode in episodes)
        return {
            "generated_tokens_per_second": made / self.seconds["rollout"],
            "trained_tokens_per_second": trained_tokens / self.seconds["update"],
            "step_seconds": sum(self.seconds.values()),
            "peak_memory_bytes": peak_memory_bytes(device),
            **{f"seconds/{phase}": value for phase, value in self.seconds.items()},
        }


def describe(episodes: list[Episode], samples: int) -> dict[str, float]:
    """What a rollout was like, for the log."""
    rewards = torch.tensor([episode.reward for episode in episodes]).view(-1, samples)
    lengths = torch.tensor([float(len(episode.tokens)) for episode in episodes])
    finished = torch.tensor([episode.finished for episode in episodes])
    advantages = torch.tensor([episode.advantage for episode in episodes])
    equal = (rewards == rewards[:, :1]).all(1)
    values = {
        "reward": rewards.mean(),
        "reward_std": rewards.std(1).mean(),
        "all_right": (equal & (rewards[:, 0] > 0)).float().mean(),
        "all_wrong": (equal & (rewards[:, 0] <= 0)).float().mean(),
        "advantage_min": advantages.min(),
        "advantage_max": advantages.max(),
        "used": (advantages != 0).float().mean(),
        "length": lengths.mean(),
        "length_min": lengths.min(),
        "length_max": lengths.max(),
        "length_finished": lengths[finished].mean() if finished.any() else torch.tensor(0.0),
        "truncated": 1 - finished.float().mean(),
    }
    calls = sum(episode.calls for episode in episodes)
    if calls:
        failures = sum(episode.failures for episode in episodes)
        values |= {"tool_calls": calls / len(episodes), "tool_failures": failures / calls}
    return {name: float(value) for name, value in values.items()}


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Chance that one of k completions is right, without bias (arXiv 2107.03374, eq. 1)."""
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def write_samples(run: Run, step: int, episodes: list[Episode], tokenizer: Any) -> None:
    """Append two completions of the rollout to samples.jsonl, with what they earned."""
    if not run.main:
        return
    with open(run.folder / "samples.jsonl", "a") as file:
        for episode in (episodes[0], episodes[-1]):
            texts = {
                "prompt": tokenizer.decode(episode.prompt),
                "completion": tokenizer.decode(episode.tokens),
            }
            record = {"step": step, **texts, "reward": episode.reward, "advantage": episode.advantage}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
