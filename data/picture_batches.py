"""Conversations with pictures -> batches, as a pure function of (seed, step).

A picture takes as many places in a row of tokens as the vision tower sees patches (`model.PATCH`). The tower
is frozen, so what it says of a picture may be kept on disk and is then computed once.
"""

import hashlib
import json
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from data.chat import render
from data.packing import Batch, Item, make_batch
from data.pictures import BadRow, Resize, Row, Rows, load_picture, plan_epoch, prepare, scan
from data.readers import Message
from data.tokenizer import Tokenizer
from model import PATCH, VisionTower

VisionFormat = Literal["pure", "caption", "tulu", "moss"]


def render_pure(row: Row, tokenizer: Tokenizer, questions: bool = True) -> tuple[list[int], list[bool]]:
    """Prismatic's plain format, as Moxin-VLM was trained: ids and mask, one PATCH for each picture.

        <s>{picture}In: {question}⏎Out:{answer}</s>In: {question}⏎Out:{answer}</s>

    Turns are tokenised one by one, right-stripped; answers with their end token are trained. A tokenizer
    without a beginning-of-text token begins with its end token. Without `questions` (alignment) only answers
    remain.
    """
    begin = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    ids = [begin] + [PATCH] * len(row.pictures)
    mask = [False] * len(ids)
    for message in row.messages:
        text = " ".join(texts_in(message))
        if message["role"] == "assistant":
            answer = [*tokenizer.encode(text.rstrip()), tokenizer.eos_id]
            ids, mask = ids + answer, mask + [True] * len(answer)
        elif questions:
            question = tokenizer.encode(f"In: {text}\nOut:")
            ids, mask = ids + question, mask + [False] * len(question)
    return ids, mask


def render_row(
    row: Row, tokenizer: Tokenizer, chat_format: VisionFormat, patches: int, longest: int = 0
) -> Item:
    """Ids and loss mask of a row, each picture as `patches` times PATCH.

    Raises:
        BadRow: if at most `longest` tokens hold no whole picture or no answer (0 = any length).
    """
    if chat_format in ("pure", "caption"):
        ids, mask = render_pure(row, tokenizer, questions=chat_format == "pure")
    else:
        rendered = render(row.messages, tokenizer, chat_format)
        ids, mask = rendered.ids, rendered.mask
    times = np.where(np.array(ids) == PATCH, patches, 1)
    ids, mask = np.repeat(np.array(ids, np.int32), times), np.repeat(np.array(mask, bool), times)
    if 0 < longest < len(ids):
        if PATCH in ids[longest:] or not mask[:longest].any():
            raise BadRow(
                f"{len(ids)} tokens, of which the first {longest} hold no whole picture or no answer"
            )
        ids, mask = ids[:longest], mask[:longest]
    return Item(ids, mask)


class FeatureCache:
    """What the tower said of each picture, in one memory-mapped file of half-precision numbers.

    The file belongs to one tower and one data set (`key`); another pair gets another file. Processes on one
    machine share it: two of them may write the same picture, and then write the same.
    """

    def __init__(self, folder: Path, key: dict[str, Any], pictures: int, patches: int, dim: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        self.shape = (patches, dim)
        self.values = self._map(folder / f"{name}.features", np.float16, (pictures, patches, dim))
        self.known = self._map(folder / f"{name}.known", np.uint8, (pictures,))

    @staticmethod
    def _map(path: Path, dtype: type, shape: tuple[int, ...]) -> np.memmap:
        path.touch()
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if path.stat().st_size != size:
            with open(path, "r+b") as file:
                file.truncate(size)  # grown by a hole, which reads as zeros
        return np.memmap(path, dtype, "r+", shape=shape)

    def get(self, picture: int) -> Tensor | None:
        return torch.from_numpy(self.values[picture].copy()) if self.known[picture] else None

    def put(self, picture: int, features: Tensor) -> None:
        self.values[picture] = features.cpu().numpy()
        self.known[picture] = 1  # last, so that a kill leaves no half-written picture marked as known


@dataclass(frozen=True)
class Example:
    """A rendered row, and [pictures, patches, dim] of it (None without a picture)."""

    item: Item
    features: Tensor | None


@dataclass(frozen=True)
class Loaded:
    """A row on its way: rendered, its pictures' numbers in the cache, and those of them that were opened."""

    item: Item
    numbers: list[int]
    pixels: list[Tensor | None]  # uint8 [encoders, 3, S, S]; None = the cache knows it


class PictureBatches:
    """Rows in the order of training.

    Args:
        rows: the data set. tower: whose features the model reads.
        longest: rows are cut off after so many tokens, never inside a picture.
        cache: folder to keep features in; None = the tower looks at every picture anew.
        workers: threads that read pictures ahead.
        within: the rows to use (default all).
    """

    def __init__(
        self,
        rows: Rows,
        tokenizer: Tokenizer,
        tower: VisionTower,
        chat_format: VisionFormat = "tulu",
        resize: Resize = "naive",
        longest: int = 0,
        batch_size: int = 1,
        seed: int = 0,
        cache: Path | None = None,
        workers: int = 2,
        within: range | None = None,
    ) -> None:
        self.rows, self.tokenizer, self.tower = rows, tokenizer, tower
        self.chat_format, self.resize, self.longest = chat_format, resize, longest
        self.batch_size, self.seed = batch_size, seed
        self.device = next(tower.parameters()).device
        self.means = tuple(config.mean for config in tower.configs)
        within = within or range(len(rows))
        self.lengths, self.pictures = scan(rows, text_bytes, within)
        used = self.lengths > 0
        self.alike = {sees: np.flatnonzero(used & ((self.pictures > 0) == sees)) for sees in (False, True)}
        self.first = np.concatenate([[0], np.cumsum(self.pictures)])  # number of each row's first picture
        self.steps_per_epoch = len(plan_epoch(self.lengths, self.pictures, batch_size, seed, 0))
        total = int(self.first[-1])
        key = {"rows": rows.fingerprint(), "within": [within.start, within.stop], "pictures": total}
        key |= {"tower": tower_name(tower), "resize": resize}
        self.cache = FeatureCache(cache, key, total, tower.tokens, tower.dim) if cache and total else None
        self.pool = ThreadPoolExecutor(workers)
        self.ahead: dict[tuple[int, int, int], list[Future]] = {}
        self.plans: dict[int, list[np.ndarray]] = {}

    def order(self, step: int) -> np.ndarray:
        """Row numbers of one optimizer step, over all processes."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch not in self.plans:
            self.plans = {epoch: plan_epoch(self.lengths, self.pictures, self.batch_size, self.seed, epoch)}
        return self.plans[epoch][place]

    def words(self, i: int) -> Item:
        """Row i rendered, its pictures left closed, or a replacement."""
        return self.rows.fetch(i, self.render, self.alike[self.pictures[i] > 0])

    def render(self, row: Row) -> Item:
        return render_row(row, self.tokenizer, self.chat_format, self.tower.tokens, self.longest)

    def all(self) -> list[Example]:
        """Every row in use, in order."""
        return self.see([self.load(int(i)) for i in np.flatnonzero(self.lengths)])

    def kinds(self) -> list[str]:
        """What kind of question each of them asks, where the data set says."""
        return [self.rows.kind(int(i)) for i in np.flatnonzero(self.lengths)]

    def load(self, i: int) -> Loaded:
        """Row i rendered and its pictures opened, or a replacement of the same kind."""
        return self.rows.fetch(i, self.open, self.alike[self.pictures[i] > 0])

    def open(self, row: Row) -> Loaded:
        item = self.render(row)
        first = int(self.first[self.rows.shown_by(row.number)])
        numbers = [first + k for k in range(len(row.pictures))]
        pixels = []
        for number, source in zip(numbers, row.pictures, strict=True):
            known = self.cache is not None and self.cache.known[number]
            picture = (
                None
                if known
                else prepare(load_picture(source), self.tower.image_size, self.resize, self.means)
            )
            pixels.append(picture)
        return Loaded(item, numbers, pixels)

    def step(self, step: int, share: slice) -> list[Example]:
        """This process's examples of an optimizer step. Starts to read those of the next one."""
        wanted = (step, share.start, share.stop)
        futures = self.ahead.pop(wanted, None) or self.start(step, share)
        self.ahead = {(step + 1, share.start, share.stop): self.start(step + 1, share)}
        return self.see([future.result() for future in futures])

    def start(self, step: int, share: slice) -> list[Future]:
        return [self.pool.submit(self.load, int(i)) for i in self.order(step)[share]]

    def see(self, loaded: list[Loaded], at_once: int = 32) -> list[Example]:
        """The tower looks at the pictures that the cache does not know."""
        new = [
            (number, pixels) for row in loaded for number, pixels in zip(row.numbers, row.pixels, strict=True)
        ]
        new = [(number, pixels) for number, pixels in new if pixels is not None]
        seen: dict[int, Tensor] = {}
        for start in range(0, len(new), at_once):
            part = new[start : start + at_once]
            features = self.tower(torch.stack([pixels for _, pixels in part]).to(self.device))
            for (number, _), one in zip(part, features.half(), strict=True):
                seen[number] = one
                if self.cache is not None:
                    self.cache.put(number, one)
        examples = []
        for row in loaded:
            features = [seen[n] if n in seen else self.cache.get(n).to(self.device) for n in row.numbers]
            examples.append(Example(row.item, torch.stack(features) if features else None))
        return examples


def texts_in(message: Message) -> list[str]:
    """The words of a message, its pictures left out."""
    content = message["content"]
    return (
        [content]
        if isinstance(content, str)
        else [part["text"] for part in content if part["type"] == "text"]
    )


def texts_of(row: Row) -> list[str]:
    return [text for message in row.messages for text in texts_in(message)]


def text_bytes(row: Row) -> int:
    """A row's bytes: near enough to its tokens, in English and in Chinese, to sort by.

    By characters, Chinese rows would be the shortest, and most batches would be of one language.
    """
    return sum(len(text.encode()) for text in texts_of(row))


def tower_name(tower: VisionTower) -> int:
    """A number that changes with the tower's weights (a checksum of some of them) and type."""
    parts = [encoder.blocks[-1].mlp.fc2.weight.detach().float().cpu().numpy() for encoder in tower.encoders]
    return zlib.crc32(
        b"".join(part.tobytes() for part in parts) + str(tower.encoders[0].pos_embed.dtype).encode()
    )


def collate(examples: list[Example], device: torch.device) -> tuple[Batch, Tensor | None]:
    """Examples side by side, padded on the right, and their pictures in the order of their places."""
    width = max(len(example.item.ids) for example in examples)
    batch = make_batch([[example.item] for example in examples], width).to(device)
    features = [example.features for example in examples if example.features is not None]
    return batch, torch.cat(features).to(device) if features else None
