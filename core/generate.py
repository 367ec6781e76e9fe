"""Sampling from a model: many prompts and samples in one batch, slots refilled as answers end; streaming.

A batch is a set of slots. Prompts are prefilled once, however many samples they have; every decoding step
advances all occupied slots by one token; a slot whose sample has ended takes the next one in the queue.

Each sample draws from its own stream of uniform numbers, a function of (seed, prompt index, sample index), by
inverting the cumulative distribution. So a completion does not depend on what else is in the batch, on its
order or on the batch size.
"""

import codecs
import hashlib
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from core.config import UserError
from core.decode import Cache, Decoder, Memory, Prefill
from model import PATCH, Transformer

PREFILL_TOKENS = 16_384  # most tokens in one prefill forward


@dataclass
class Completion:
    """One sample. `tokens` include the stop id that ended it; `logprobs` are of the distribution sampled from
    (at temperature 0: of the plain softmax). finish_reason: stop | length | context (it is full)."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str = ""


@dataclass(frozen=True)
class Sampling:
    """The distribution to sample from, and where to stop."""

    temperature: float = 1.0  # 0 = the most probable token
    top_p: float = 1.0  # the smallest set of most probable tokens that holds this much; 1 = all
    top_k: int = 0  # this many most probable tokens; 0 = all
    min_p: float = 0.0  # tokens at least this fraction as probable as the best; 0 = all
    repetition_penalty: float = 1.0  # lowers the logits of tokens seen (Keskar et al. 2019); 1 = none
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    contrast: float = 0.0  # go on from two prompts at once: logits + contrast x (logits - avoided logits)

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("contrast", self.contrast >= 0, "at least 0"),
        ):
            if not valid:
                raise UserError(f"{name} must be {expected}, got {getattr(self, name)}")


# The distribution


def distribution(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """Log-probabilities [n, V] float32 to sample from, -inf where excluded; `seen` [n, V] marks tokens to
    penalise."""
    logits = logits.float()
    if seen is not None:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.temperature not in (0, 1):
        logits = logits / sampling.temperature
    if sampling.top_k:
        worst = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < worst, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # mass of the tokens more probable
        excluded = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, order, before >= sampling.top_p)
        logits = logits.masked_fill(excluded, float("-inf"))
    if sampling.min_p:
        best = logits.max(-1, keepdim=True).values
        logits = logits.masked_fill(logits < best + torch.tensor(sampling.min_p).log(), float("-inf"))
    return logits.log_softmax(-1)


def uniforms(seed: int, samples: list[tuple[int, int]], count: int) -> Tensor:
    """The first numbers of the streams of some (prompt, sample), in (0, 1), float64 [samples, count]
    (SplitMix64, Steele et al. 2014).

    In int64 arithmetic, which wraps; the constants are its three odd 64-bit ones, written as signed numbers.
    """
    names = (f"{seed}/{prompt}/{sample}".encode() for prompt, sample in samples)
    digests = (hashlib.blake2b(name, digest_size=8).digest() for name in names)
    starts = torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests])

    def shifted(x: Tensor, bits: int) -> Tensor:
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    z = starts[:, None] + torch.arange(1, count + 1) * -7046029254386353131
    z = (z ^ shifted(z, 30)) * -4658895280553007687
    z = (z ^ shifted(z, 27)) * -7723592293110705685
    return (shifted(z ^ shifted(z, 31), 11).double() + 0.5) * 2.0**-53


def draw(logprobs: Tensor, uniform: Tensor) -> Tensor:
    """Token [n] at which the cumulative distribution passes `uniform` [n].

    Summed in float64: a float32 sum over 10^5 tokens would be off by more than the rare ones are worth.
    """
    cumulative = logprobs.exp().cumsum(-1, dtype=torch.double)
    return torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:]).squeeze(-1)


# The loop


@dataclass
class Slot:
    """What one row of the batch is working on."""

    prompt: int
    sample: int
    length: int  # tokens so far, prompt included
    end: int  # length at which it must stop
    completion: Completion = field(default_factory=Completion)


class Batch:
    """The slots, and on the device each slot's last token, its position, and its stream of uniform
    numbers."""

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        max_new_tokens: int,
        num_samples: int,
        seed: int,
        max_batch: int,
        tokenizer: Any,
        features: Sequence[Tensor | None] | None,
        cuda_graph: bool = False,
        memory: Memory | None = None,
    ) -> None:
        self.model, self.prompts, self.sampling, self.tokenizer = model, prompts, sampling, tokenizer
        self.max_new_tokens, self.seed, self.features = max_new_tokens, seed, features
        self.memory = memory  # of a prompt that is alone
        self.stop_ids = frozenset(sampling.stop_ids)
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            raise RuntimeError("the model is sharded: generate inside core.parallel.unsharded(model)")
        self.device = next(model.parameters()).device
        # The GPU is asked for its tokens only now and then; what a slot draws after its end is dropped.
        self.stride = 16 if self.device.type == "cuda" else 1
        self.cuda_graph = cuda_graph and self.device.type == "cuda"
        config = model.config
        for number, prompt in enumerate(prompts):
            if not prompt:
                raise UserError(f"prompt {number} is empty: give at least a first token")
            lowest = 0 if features is None else PATCH
            if not lowest <= min(prompt) <= max(prompt) < config.vocab_size:
                raise UserError(
                    f"prompt {number} has ids outside 0..{config.vocab_size - 1}: wrong tokenizer?"
                )
            if len(prompt) >= config.max_seq_len and not config.sliding_window:
                reason = f"{len(prompt)} tokens fill the model's context of {config.max_seq_len}"
                raise UserError(f"prompt {number}: {reason}; shorten it")
        # Past its window a model attends to nothing, so one that has a window can go on for ever.
        self.limit = max(map(len, prompts)) + max_new_tokens
        if not config.sliding_window:
            self.limit = min(self.limit, config.max_seq_len)
        self.capacity = min(self.limit, config.sliding_window or self.limit)
        self.vocab_size = min(config.vocab_size, tokenizer.vocab_size) if tokenizer else config.vocab_size
        # With a contrast, prompts 2i and 2i + 1 share an answer: their slots stand side by side throughout.
        self.sides = 2 if sampling.contrast else 1
        starts = range(0, len(prompts), self.sides)
        sides = range(self.sides)
        self.queue = deque((p + side, s) for p in starts for s in range(num_samples) for side in sides)
        first: dict[tuple, int] = {}  # a prompt given several times is read once
        self.same = [first.setdefault((*prompt, features and p), p) for p, prompt in enumerate(prompts)]
        self.prefilled: dict[int, tuple[Prefill, int, Tensor]] = {}  # prompt -> where, row, last logits [V]
        self.decoder: Decoder | None = None
        n = min(max(1, max_batch // self.sides) * self.sides, len(self.queue))
        self.slots: list[Slot | None] = [None] * n
        self.refill = max(1, n // 8)  # free slots worth a prefill
        self.tokens, self.positions, self.steps = torch.zeros(3, n, dtype=torch.long, device=self.device)
        self.uniforms = torch.zeros(n, max_new_tokens + self.stride, dtype=torch.double, device=self.device)
        penalise = sampling.repetition_penalty != 1
        self.seen = (
            torch.zeros(n, self.vocab_size, dtype=torch.bool, device=self.device) if penalise else None
        )

    @torch.no_grad()
    def run(self) -> Iterator[Slot]:
        """Yields the slot of every token drawn, the token being the last of the slot's completion."""
        while True:
            # Prompts are read a few at a time, which is cheaper than one by one.
            free = [row for row, slot in enumerate(self.slots) if slot is None]
            if self.queue and len(free) >= min(self.refill, len(self.queue)):
                yield from self.admit(free)
                continue
            self.compact()
            active = len(self.slots) - len(free)
            if not active:
                return
            used = max(slot.length for slot in self.slots[:active]) + self.stride - 1
            drawn = [self.step(active, min(used, self.capacity)) for _ in range(self.stride)]
            tokens, logprobs = (torch.stack(x).tolist() for x in zip(*drawn, strict=True))
            for step_tokens, step_logprobs in zip(tokens, logprobs, strict=True):
                for row in range(active):
                    if self.slots[row] is not None:
                        yield self.record(row, step_tokens[row], step_logprobs[row])

    def admit(self, free: list[int]) -> Iterator[Slot]:
        """Give the free rows to the next samples in the queue and draw their first tokens."""
        new = [self.queue.popleft() for _ in free[: len(self.queue)]]
        missing = {self.same[p] for p, _ in new} - self.prefilled.keys()
        self.prefill(sorted(missing, key=lambda p: len(self.prompts[p])))
        rows = free[: len(new)]
        together: dict[Prefill, list[tuple[int, int]]] = {}  # slots and their prompts' lines in a prefill
        for row, (p, s) in zip(rows, new, strict=True):
            prefill, line, _ = self.prefilled[self.same[p]]
            together.setdefault(prefill, []).append((row, line))
            length = len(self.prompts[p])
            self.slots[row] = Slot(p, s, length, min(length + self.max_new_tokens, self.limit))
            if self.seen is not None:
                self.seen[row] = False
                words = [token for token in self.prompts[p] if token != PATCH]
                self.seen[row, torch.tensor(words, device=self.device)] = True
        for prefill, pairs in together.items():
            self.decoder.cache.insert([row for row, _ in pairs], prefill, [line for _, line in pairs])
        index = torch.tensor(rows, device=self.device)
        self.positions[index] = torch.tensor([len(self.prompts[p]) for p, _ in new], device=self.device)
        self.steps[index] = 0
        streams = uniforms(self.seed, [(p // self.sides, s) for p, s in new], self.uniforms.shape[1])
        self.uniforms[index] = streams.to(self.device)
        logits = torch.stack([self.prefilled[self.same[p]][2] for p, _ in new])
        tokens, logprobs = self.draw(logits, index)
        waiting = {self.same[p] for p, _ in self.queue}
        self.prefilled = {p: entry for p, entry in self.prefilled.items() if p in waiting}
        for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
            yield self.record(row, token, logprob)

    def prefill(self, prompts: list[int]) -> None:
        """Run prompts, as many at a time as make PREFILL_TOKENS."""
        while prompts:
            lengths = list(accumulate(len(self.prompts[p]) for p in prompts))
            count = max(1, bisect_right(lengths, PREFILL_TOKENS))
            batch, prompts = prompts[:count], prompts[count:]
            known = 0 if self.memory is None else self.memory.known(self.prompts[batch[0]])
            whole = [len(self.prompts[p]) for p in batch]
            prefill = Prefill(self.model.config, whole, self.device, self.memory, known)
            new = [token for p in batch for token in self.prompts[p][known:]]
            seen = [] if self.features is None else [f for p in batch if (f := self.features[p]) is not None]
            pictures = {"features": unread(torch.cat(seen), new).to(self.device)} if PATCH in new else {}
            tokens = torch.tensor([new], device=self.device)
            hidden = self.model.hidden_states(tokens, positions=prefill.positions, cache=prefill, **pictures)
            last = torch.tensor(lengths[:count], device=self.device) - known - 1
            for line, (p, logits) in enumerate(zip(batch, self.model.head(hidden[0, last]), strict=True)):
                self.prefilled[p] = (prefill, line, logits)
            if self.decoder is None:
                self.decoder = Decoder(self.model, Cache(prefill, len(self.slots), self.capacity), self.limit)

    def step(self, n: int, used: int) -> tuple[Tensor, Tensor]:
        """Advance the first n slots by one token. Returns tokens [n] and log-probabilities [n]."""
        if self.cuda_graph:
            n = min(1 << (n - 1).bit_length(), len(self.slots))  # few sizes, few recordings; rows past n idle
            logits = self.decoder.replay(self.tokens[:n], self.positions[:n])
        else:
            logits = self.decoder(self.tokens[:n], self.positions[:n], used)
        self.positions[:n].add_(1)
        self.steps[:n].add_(1)
        return self.draw(logits, slice(0, n))

    def draw(self, logits: Tensor, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Sample the rows' next tokens from logits [n, V]; returns them and their log-probabilities."""
        seen = None if self.seen is None else self.seen[rows]
        if self.sampling.contrast:
            asked, avoided = logits.float().unflatten(0, (-1, 2)).unbind(1)
            logits = (asked + self.sampling.contrast * (asked - avoided)).repeat_interleave(2, dim=0)
        logprobs = distribution(logits[:, : self.vocab_size], self.sampling, seen)
        if self.sampling.temperature > 0:
            step = self.steps[rows, None].clamp(max=self.uniforms.shape[1] - 1)  # an idle row's goes on
            tokens = draw(logprobs, self.uniforms[rows].gather(1, step).squeeze(1))
        else:
            tokens = logprobs.argmax(-1)
        self.tokens[rows] = tokens
        if seen is not None:
            self.seen[rows] = seen.scatter(-1, tokens[:, None], True)
        return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)

    def record(self, row: int, token: int, logprob: float) -> Slot:
        """Append a token to its completion; frees the slot where that ends it."""
        slot, sampling = self.slots[row], self.sampling
        slot.length += 1
        done = slot.completion
        done.tokens.append(token)
        done.logprobs.append(logprob)
        if token in self.stop_ids or sampling.stop_strings and self.ends_with_stop(done.tokens):
            done.finish_reason = "stop"
        elif slot.length >= slot.end:
            done.finish_reason = "length" if len(done.tokens) == self.max_new_tokens else "context"
        if done.finish_reason:
            self.slots[row] = None
        return slot

    def ends_with_stop(self, tokens: list[int]) -> bool:
        longest = max(len(stop.encode()) for stop in self.sampling.stop_strings)
        # Special tokens aside, a token is a byte or more.
        tail = self.tokenizer.decode_bytes(tokens[-longest - 8 :])
        return any(stop.encode() in tail for stop in self.sampling.stop_strings)

    def compact(self) -> None:
        """Move the last occupied slots into the free ones, so that a step computes no row in vain."""
        active = sum(slot is not None for slot in self.slots)
        holes = [row for row in range(active) if self.slots[row] is None]
        tail = [row for row in range(active, len(self.slots)) if self.slots[row] is not None]
        for hole, row in zip(holes, tail, strict=True):
            self.decoder.cache.move(row, hole)
            for state in (self.tokens, self.positions, self.steps, self.uniforms, self.seen):
                if state is not None:
                    state[hole] = state[row]
            self.slots[hole], self.slots[row] = self.slots[row], None


def unread(features: Tensor, tokens: list[int]) -> Tensor:
    """Of features [pictures, patches, dim] the last pictures, those whose places are among the tokens."""
    return features[features.shape[0] - tokens.count(PATCH) // features.shape[1] :]


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 256,
    num_samples: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
    max_batch: int = 64,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop_strings: Sequence[str] = (),
    tokenizer: Any = None,
    features: Sequence[Tensor | None] | None = None,
    cuda_graph: bool = False,
    avoided: Sequence[Sequence[int]] = (),
    contrast: float = 0.0,
) -> list[list[Completion]]:
    """Sample `num_samples` completions of each prompt (a list of token ids); result[prompt][sample].

    At most `max_batch` are worked on at a time. `tokenizer` is needed for stop strings; with it, ids that it
    does not have (padding rows of the vocabulary) are never drawn. A VLM's prompts may hold PATCH; `features`
    then gives each prompt's pictures as the tower saw them, [pictures, patches, dim], or None. `cuda_graph`
    replays each step as one launch, worth its recording in long runs; it does nothing on a CPU. With a
    `contrast`, each prompt is led away from its equally long counterpart in `avoided`: logits + contrast x
    (logits - avoided logits). Raises UserError for prompts that do not fit.
    """
    sampling = Sampling(
        temperature, top_p, top_k, min_p, repetition_penalty, tuple(stop_ids), tuple(stop_strings), contrast
    )
    done: list[list[Completion]] = [[Completion(finish_reason="length")] * num_samples for _ in prompts]
    if not prompts or max_new_tokens < 1:
        return done
    if stop_strings and tokenizer is None:
        raise UserError("stop_strings need the tokenizer")
    if contrast:
        prompts = interleave(prompts, avoided)
    batch = Batch(
        model,
        prompts,
        sampling,
        max_new_tokens,
        num_samples,
        seed,
        max_batch,
        tokenizer,
        features,
        cuda_graph,
    )
    for slot in batch.run():
        done[slot.prompt // batch.sides][slot.sample] = slot.completion  # both sides draw the same tokens
    return done


def interleave(asked: Sequence[Sequence[int]], avoided: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """a0 b0 a1 b1 ... Raises UserError for prompts that cannot share an answer's positions."""
    if [len(prompt) for prompt in asked] != [len(prompt) for prompt in avoided]:
        raise UserError("contrast: each prompt needs one to avoid, of the same number of tokens")
    return [prompt for pair in zip(asked, avoided, strict=True) for prompt in pair]


def stream(
    model: Transformer,
    prompt: Sequence[int],
    tokenizer: Any,
    sampling: Sampling,
    max_new_tokens: int = 256,
    seed: int = 0,
    features: Tensor | None = None,
    avoided: Sequence[int] = (),
    memory: Memory | None = None,
) -> Iterator[tuple[str, Completion]]:
    """One completion as it comes: its new text, and the completion so far (one object, which grows).

    Text comes in whole characters, without special tokens and stop strings, and is held back while it may yet
    turn out to begin a stop string. What `memory` knows of the prompt is not read again, and afterwards it
    knows all that was read here (with a contrast it is left alone).
    """
    special, stops = set(tokenizer.special_tokens.values()), sampling.stop_strings
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    prompts = interleave([prompt], [avoided]) if sampling.contrast else [prompt]
    pictures = [features] * len(prompts)
    memory = None if sampling.contrast else memory
    batch = Batch(
        model, prompts, sampling, max_new_tokens, 1, seed, len(prompts), tokenizer, pictures, memory=memory
    )
    batch.stride = 1  # every token as soon as it is there
    held, completion = "", Completion()
    try:
        for slot in batch.run():
            if slot.prompt:  # the avoided side's copy of the token
                continue
            completion = slot.completion
            token, last = completion.tokens[-1], bool(completion.finish_reason)
            held += decoder.decode(b"" if token in special else tokenizer.decode_bytes([token]), final=last)
            ready = min([held.find(stop) for stop in stops if stop in held], default=len(held))
            if not last:
                ready -= max(
                    (k for stop in stops for k in range(len(stop)) if held.endswith(stop[:k])), default=0
                )
            yield held[:ready], completion
            held = held[ready:]
    finally:  # also where it is stopped; the token drawn last has not been read
        if memory is not None and completion.tokens:
            memory.keep([*prompt, *completion.tokens[:-1]], batch.decoder.cache)
