"""Comparisons of two answers: read in the schemas people publish, rendered, packed side by side.

    schema                   chosen and rejected are                              for example
    messages                 conversations, equal but for their last messages     tulu-3 preference mixture
    messages with a prompt   the answers; prompt, messages, conversations,        TRL, LLaMA-Factory
                             question or instruction beside them
    HH-RLHF                  texts of Human: and Assistant: turns                 hh-rlhf
    UltraFeedback            completions with overall_score: best and worst       UltraFeedback
    data/pairs.py            conversations, beside all responses compared

A record that cannot be read stops the reading with `file:line: what`, or with skip_bad is counted. One that
teaches nothing (equal answers, no verdict, over length) is left out, counted and named.
"""

import json
import math
import re
import zlib
from collections import Counter
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from core.checkpoint import read_config, resolve_folder
from core.config import UserError, require
from core.run import Run
from data.chat import ChatFormat, chat_template, render
from data.demonstrations import Pupil, small_shape
from data.packing import Batch, Item, make_batch, pack
from data.prompts import Prompt, category_of, prompt_messages
from data.readers import Message, Reading, from_messages, records
from data.tokenizer import Tokenizer
from kernels import Bounds, make_bounds
from model import Config as Shape


@dataclass(kw_only=True)
class PairConfig(Pupil):
    """Options of a stage that learns from comparisons."""

    data: tuple[str, ...] = ()  # files of pairs, or hub/OWNER/NAME; empty = made here, of sorted digits
    skip_bad: bool = False  # count unreadable records instead of stopping
    too_long: Literal["drop", "cut"] = "drop"  # pairs with an answer over seq_len; cut loses its end token
    val_fraction: float = 0.1  # share of the prompts held out
    epochs: float = 1.0  # passes over the pairs; 0 = --steps
    warmup_ratio: float = 0.1  # share of the steps that warm up
    made_prompts: int = 3000  # prompts answered where there is no --data
    num_samples: int = 4  # answers to each
    max_new_tokens: int = 32  # longest answer sampled, here and to watch
    eval_prompts: str = ""  # prompts to answer before and after; empty = those held out
    eval_samples: int = 4  # answers to each of at most 200

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.val_fraction < 1, "--val_fraction must be between 0 and 1")
        require(
            bool(self.init_from) or self.warm_steps > 0 and not self.data,
            f"give --init_from: a fine-tuned model to go on from{' with --data' if self.data else ''}",
        )
        require(
            bool(self.data) or not self.init_from,
            "--init_from needs --data: pairs (data/pairs.py makes them)",
        )

    @property
    def shape(self) -> Shape:
        """Of the model that will be trained."""
        if self.init_from:
            return read_config(resolve_folder(self.init_from))
        return small_shape(self, self.vocab_size)

    def planned(self, pairs: int) -> Self:
        """With the steps and the warm-up that so many pairs make."""
        steps = math.ceil(self.epochs * pairs / self.batch_size) or self.steps
        return replace(self, steps=steps, warmup_steps=round(self.warmup_ratio * steps))


# A larger model made on the spot, for one GPU.
SMALL = dict(
    warm_steps=300,
    warm_batch=256,
    warm_lr=1e-3,
    layers=6,
    dim=384,
    heads=6,
    made_prompts=8000,
    seq_len=64,
    batch_size=128,
    micro_batch_size=256,
    schedule="linear",
)


@dataclass(frozen=True)
class Pair:
    """Two answers to a prompt, the better one first, and where they were read."""

    prompt: Prompt
    chosen: Message
    rejected: Message
    place: str = ""


@dataclass
class PairReading(Reading):
    """What came out of files of pairs, and what was remarked on the way."""

    pairs: list[Pair] = field(default_factory=list)


def read_pairs(sources: tuple[str, ...], skip_bad: bool = False) -> PairReading:
    """All pairs of files, folders or hub data sets."""
    reading = PairReading()
    for place, record in (found for source in sources for found in records(source)):
        try:
            pair = convert(json.loads(record) if isinstance(record, str) else record, place)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            what = f"no field {error}" if isinstance(error, KeyError) else str(error)
            if not skip_bad:
                raise UserError(f"{place}: {what}; mend the record or pass --skip_bad") from None
            reading.counts["bad"] += 1
            reading.remarks.append(f"{place}: {what}")
            continue
        useless = (
            "no verdict" if pair is None else "equal answers" if pair.chosen == pair.rejected else "read"
        )
        reading.counts[useless] += 1
        if useless == "read":
            reading.pairs.append(pair)
        else:
            reading.remarks.append(f"{place}: {useless}")
    if not reading.pairs:
        raise UserError(f"{', '.join(sources)}: no usable pair ({'; '.join(reading.summary(1))})")
    return reading


def convert(record: dict[str, Any], place: str = "") -> Pair | None:
    """One record of any known schema; None where nobody said which answer is better. Raises ValueError."""
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, found {type(record).__name__}")
    if "completions" in record and "chosen" not in record:
        ranked = sorted(record["completions"], key=lambda one: float(one["overall_score"]))
        if len(ranked) < 2 or float(ranked[0]["overall_score"]) == float(ranked[-1]["overall_score"]):
            return None
        record = {**record, "chosen": ranked[-1]["response"], "rejected": ranked[0]["response"]}
    if "responses" in record and record.get("chosen") is None:
        return None
    sides = []
    for name in ("chosen", "rejected"):
        if record.get(name) is None:
            raise ValueError(f"the {name} side is missing")
        sides.append(conversation(record[name], record))
    (*prompt, chosen), (*other, rejected) = sides
    if prompt != other:
        raise ValueError("the two sides answer different prompts")
    for name, message in (("chosen", chosen), ("rejected", rejected)):
        if message["role"] != "assistant" or not isinstance(message["content"], str):
            raise ValueError(f"the {name} side does not end in an assistant's text")
    if not prompt or prompt[-1]["role"] != "user":
        raise ValueError("no user message to answer")
    if not chosen["content"].strip():
        raise ValueError("the chosen side is empty")
    known = {name: str(record[name]) for name in ("answer", "task") if "answer" in record and name in record}
    return Pair(Prompt(prompt, **known, category=category_of(record)), chosen, rejected, place)


def conversation(side: Any, record: dict[str, Any]) -> list[Message]:
    """One side of a record as a whole conversation."""
    if isinstance(side, str) and "\n\nHuman:" in side:
        turns = re.split(r"\n\n(Human|Assistant):", side)[1:]
        roles = {"Human": "user", "Assistant": "assistant"}
        pairs = zip(turns[::2], turns[1::2], strict=True)
        return [{"role": roles[name], "content": text.strip()} for name, text in pairs]
    if isinstance(side, str):
        side = [{"role": "assistant", "content": side}]
    elif isinstance(side, dict):
        side = [side]
    given = from_messages({"messages": side})
    return given if given[0]["role"] != "assistant" else [*prompt_messages(record), *given]


def split(pairs: list[Pair], fraction: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """(training, held out): a share of the prompts, so that no prompt is on both sides."""

    def key(pair: Pair) -> int:
        return zlib.crc32(f"{seed}/{json.dumps(pair.prompt.messages, sort_keys=True)}".encode())

    keys = sorted({key(pair) for pair in pairs})
    if len(keys) < 2:
        raise UserError("all pairs have the same prompt: nothing can be held out")
    held_out = set(keys[: max(1, round(fraction * len(keys)))])
    return [p for p in pairs if key(p) not in held_out], [p for p in pairs if key(p) in held_out]


# Rendering


@dataclass(frozen=True)
class PairItem:
    """A rendered pair. Masks count the last answer alone, its end token included."""

    chosen: Item
    rejected: Item

    @property
    def ids(self) -> np.ndarray:
        return np.concatenate((self.chosen.ids, self.rejected.ids))


def render_answer(messages: list[Message], tokenizer: Tokenizer, chat_format: ChatFormat) -> Item:
    """A conversation whose mask counts what the model wrote in its last turn."""
    rendered = render(messages, tokenizer, chat_format)
    last = np.array(rendered.turns) == max(rendered.turns)
    return Item(np.array(rendered.ids, np.int32), np.array(rendered.mask, bool) & last)


def render_pairs(
    pairs: list[Pair], tokenizer: Tokenizer, config: PairConfig
) -> tuple[list[PairItem], Counter, list[str]]:
    """Pairs as ids; counts of what the length limit did, and a remark for each that it left out."""
    items, counts, remarks = [], Counter(), []
    for pair in pairs:
        whole = [
            render_answer([*pair.prompt.messages, side], tokenizer, config.chat_format)
            for side in (pair.chosen, pair.rejected)
        ]
        longest = max(len(side.ids) for side in whole)
        cut = [Item(side.ids[: config.seq_len], side.mask[: config.seq_len]) for side in whole]
        fits = longest <= config.seq_len
        if fits or config.too_long == "cut" and all(side.mask.any() for side in cut):
            counts["pairs" if fits else "pairs cut"] += 1
            items.append(PairItem(*cut))
        else:
            counts["pairs over length"] += 1
            remarks.append(f"{pair.place}: over length: {longest} tokens, --seq_len {config.seq_len}")
    return items, counts, remarks


@dataclass
class PairData:
    """What a run learns from and is judged by."""

    tokenizer: Tokenizer
    train: list[PairItem]
    val: list[PairItem]
    prompts: list[Prompt]  # of the held-out pairs, each once, that leave room for an answer
    counts: dict[str, int]


def load_pairs(sources: tuple[str, ...], tokenizer: Tokenizer, config: PairConfig, run: Run) -> PairData:
    """Read, hold out, render, and say what was left out."""
    written = tokenizer.chat_template or ""
    for name, marker in (("moss", "<|MOSS|>"), ("tulu", "<|user|>")):
        if marker in written:
            require(
                config.chat_format == name,
                f"the model was trained in the {name} format: --chat_format {name}",
            )
    tokenizer.chat_template = chat_template(tokenizer, config.chat_format)
    reading = read_pairs(sources, config.skip_bad)
    counts, items = Counter(reading.counts), []
    for pairs in split(reading.pairs, config.val_fraction, config.seed):
        rendered, done, remarks = render_pairs(pairs, tokenizer, config)
        counts.update(done)
        reading.remarks += remarks
        items.append(rendered)
        if not rendered:
            raise UserError(f"no pair within --seq_len {config.seq_len}: {remarks[0]}; or --too_long cut")
    run.say(f"{', '.join(sources)}: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
    for remark in reading.remarks[:3]:
        run.say(f"  {remark}")
    prompts = {json.dumps(pair.prompt.messages): pair.prompt for pair in pairs}  # pairs: the held-out ones
    lengths = [
        len(render(p.messages, tokenizer, config.chat_format, add_generation_prompt=True).ids)
        for p in prompts.values()
    ]
    room = config.seq_len - config.max_new_tokens
    asked = [p for p, length in zip(prompts.values(), lengths, strict=True) if length <= room]
    if len(asked) < len(prompts):
        left = len(prompts) - len(asked)
        run.say(f"  {left} of {len(prompts)} held-out prompts leave no room for an answer and are not asked")
    return PairData(tokenizer, *items, asked, dict(counts))


def fingerprint(pairs: list[PairItem]) -> str:
    """Changes with any id or mask of any pair, and with their order."""
    digest = sha256()
    for side in (side for pair in pairs for side in (pair.chosen, pair.rejected)):
        digest.update(len(side.ids).to_bytes(4, "little") + side.ids.tobytes() + side.mask.tobytes())
    return digest.hexdigest()[:16]


# Batches


@dataclass(frozen=True)
class PairBatch:
    """Some pairs packed into rows, both answers of a pair in the same row.

    numbers: which pairs they are. place [n, T]: 2 x pair + side of each position, 2 x pairs on padding.
    ends, lengths [pairs, 2]: where each answer's last counted token is in the flattened rows, and how many
    are counted.
    """

    batch: Batch
    numbers: list[int]
    place: Tensor
    ends: Tensor
    lengths: Tensor

    def bounds(self, window: int) -> Bounds:
        """Nobody sees another answer than its own."""
        return make_bounds(self.batch.tokens.shape[1], window, self.batch.doc_ids)

    def sums(self, values: Tensor) -> Tensor:
        """values [n, T], 0 where nothing counts -> their sum over each answer, [pairs, 2] float64."""
        total = torch.zeros(2 * len(self.numbers) + 1, dtype=torch.double, device=values.device)
        return total.index_add(0, self.place.flatten(), values.double().flatten())[:-1].view(-1, 2)

    def to(self, device: torch.device) -> "PairBatch":
        places = (part.to(device, non_blocking=True) for part in (self.place, self.ends, self.lengths))
        return PairBatch(self.batch.to(device), self.numbers, *places)


def micro_batches(pairs: list[PairItem], config: PairConfig, run: Run) -> list[PairBatch]:
    """This process's share, on its device."""
    found = pair_batches(pairs, config.seq_len, config.micro_batch_size, run.rank, run.world_size)
    return [micro.to(run.device) for micro in found]


def pair_batches(
    pairs: list[PairItem], seq_len: int, size: int, rank: int = 0, world_size: int = 1
) -> list[PairBatch]:
    """This process's share of the pairs as micro-batches of at most `size` rows of 2 x seq_len tokens.

    As in data/packing.py: every process gets the same number of them, empty ones included, and rows of like
    length go together.
    """
    lengths = [len(pair.ids) for pair in pairs]
    rows = pack(lengths, 2 * seq_len)
    rows.sort(key=lambda row: -sum(lengths[number] for number in row))
    rows += [[] for _ in range(-len(rows) % world_size)]
    own = rows[rank::world_size]
    return [make_pair_batch(own[start : start + size], pairs) for start in range(0, len(own), size)]


def make_pair_batch(rows: list[list[int]], pairs: list[PairItem]) -> PairBatch:
    """Rows of pair numbers side by side."""
    sides = [[side for n in row for side in (pairs[n].chosen, pairs[n].rejected)] for row in rows]
    longest = max(sum(len(side.ids) for side in row) for row in sides)
    batch = make_batch(sides, 64 * max(1, math.ceil(longest / 64)))
    numbers = [number for row in rows for number in row]
    before = np.cumsum([0, *(2 * len(row) for row in rows)])  # answers in the rows before
    place = torch.where(
        batch.doc_ids < 0, 2 * len(numbers), batch.doc_ids + torch.tensor(before[:-1])[:, None]
    )
    ends, width = [], batch.tokens.shape[1]
    for number, row in enumerate(sides):
        start = number * width
        for side in row:
            ends.append(start + int(np.flatnonzero(side.mask)[-1]))
            start += len(side.ids)
    lengths = [int(side.mask.sum()) for row in sides for side in row]
    shaped = (torch.tensor(values, dtype=torch.long).view(-1, 2) for values in (ends, lengths))
    return PairBatch(batch, numbers, place, *shaped)
