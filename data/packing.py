"""Rendered conversations -> batches, as a pure function of (seed, step).

A step takes the next `batch_size` conversations of a shuffled epoch. Packed, several of them share a row,
each with positions from 0 and attention kept inside it; unpacked, each has a row of its own. Both give the
same loss and gradients: packing changes how much of a row is padding, nothing else. The rows of a step are
dealt to the processes, the same number to each.
"""

import functools
import math
import zlib
from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IGNORED = -100  # target that no loss is taken on
PADDING = -1  # doc_id of positions behind the last conversation of a row


@dataclass(frozen=True)
class Item:
    """One rendered conversation: ids [n] int32, mask [n] bool."""

    ids: np.ndarray
    mask: np.ndarray

    def without(self, tokens: tuple[int, ...]) -> "Item":
        keep = ~np.isin(self.ids, tokens)
        return Item(self.ids[keep], self.mask[keep])


@dataclass(frozen=True)
class Batch:
    """n rows of T tokens. tokens, targets (-100 = not counted), positions, doc_ids: [n, T] int64."""

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    doc_ids: Tensor

    def to(self, device: torch.device) -> "Batch":
        parts = (self.tokens, self.targets, self.positions, self.doc_ids)
        return Batch(*(part.to(device, non_blocking=True) for part in parts))


def pack(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing bin packing: rows of item numbers, each at most capacity long."""
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows that have exactly this much room left
    rooms: list[int] = []  # rooms with a non-empty list above, sorted
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[item]
        if length > capacity:
            raise ValueError(f"item {item} has {length} tokens, more than a row of {capacity}")
        place = bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            row = by_room[room].pop()
            if not by_room[room]:
                del rooms[place]
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(item)
        left = room - length
        if not by_room[left]:
            insort(rooms, left)
        by_room[left].append(row)
    return rows


def make_batch(rows: list[list[Item]], width: int) -> Batch:
    """Rows of conversations side by side. Targets: the next token of the same conversation, if trained."""
    tokens, positions = torch.zeros(2, len(rows), width, dtype=torch.long)
    targets, doc_ids = torch.full_like(tokens, IGNORED), torch.full_like(tokens, PADDING)
    for row, items in enumerate(rows):
        start = 0
        for number, item in enumerate(items):
            ids, mask = torch.from_numpy(item.ids).long(), torch.from_numpy(item.mask)
            here = slice(start, start + len(ids))
            tokens[row, here] = ids
            targets[row, start : start + len(ids) - 1] = torch.where(mask[1:], ids[1:], IGNORED)
            positions[row, here] = torch.arange(len(ids))
            doc_ids[row, here] = number
            start += len(ids)
    return Batch(tokens, targets, positions, doc_ids)


def micro_batches(
    items: list[Item], seq_len: int, packed: bool, size: int, rank: int = 0, world_size: int = 1
) -> list[Batch]:
    """This process's share of the items as micro-batches of at most `size` rows.

    Every process gets the same number of them, empty ones included: a forward of a sharded model is made by
    all. Rows of like length go together, and a micro-batch is as wide as its longest row, in steps of 64.
    """
    lengths = [len(item.ids) for item in items]
    rows = pack(lengths, seq_len) if packed else [[number] for number in range(len(items))]
    rows.sort(key=lambda row: -sum(lengths[number] for number in row))
    rows += [[] for _ in range(-len(rows) % world_size)]
    own = [[items[number] for number in row] for row in rows[rank::world_size]]
    found = []
    for start in range(0, len(own), size):
        micro = own[start : start + size]
        longest = max(sum(len(item.ids) for item in row) for row in micro)
        found.append(make_batch(micro, min(seq_len, 64 * max(1, math.ceil(longest / 64)))))
    return found


class Packer:
    """The training conversations in the order of training.

    sources: (conversations, weight): an epoch holds each source `weight` times over, a fraction as a random
    part. dropped: tokens that a conversation loses with probability `dropout`, drawn anew in each epoch
    (quality tags).
    """

    def __init__(
        self,
        sources: list[tuple[list[Item], float]],
        batch_size: int,
        seed: int,
        dropped: tuple[int, ...] = (),
        dropout: float = 0.0,
    ) -> None:
        self.sources, self.batch_size, self.seed = sources, batch_size, seed
        self.dropped, self.dropout = dropped, dropout
        self.items = [item for items, _ in sources for item in items]
        self.epoch_size = sum(round(len(items) * weight) for items, weight in sources)

    def fingerprint(self) -> int:
        """Changes with any token of any conversation."""
        return functools.reduce(lambda crc, item: zlib.crc32(item.ids.tobytes(), crc), self.items, 0)

    @functools.lru_cache(maxsize=2)  # noqa: B019  one packer lives as long as its run
    def order(self, epoch: int) -> np.ndarray:
        """Item numbers of one epoch, shuffled."""
        rng = np.random.default_rng((self.seed, epoch))
        chosen, start = [], 0
        for items, weight in self.sources:
            count, whole = round(len(items) * weight), len(items)
            copies = [np.arange(whole)] * (count // whole) + [rng.permutation(whole)[: count % whole]]
            chosen.append(start + np.concatenate(copies))
            start += whole
        return rng.permutation(np.concatenate(chosen))

    def step(self, number: int) -> list[Item]:
        """The conversations of one optimizer step."""
        found = []
        for place in range(number * self.batch_size, (number + 1) * self.batch_size):
            epoch, position = divmod(place, self.epoch_size)
            item = self.items[self.order(epoch)[position]]
            if self.dropped and np.random.default_rng((self.seed, 1, place)).random() < self.dropout:
                item = item.without(self.dropped)
            found.append(item)
        return found
