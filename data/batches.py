"""Prepared token files -> batches, as a pure function of (seed, step).

Nothing but the step number is needed to go on where a run stopped, and every process computes its own rows of
the same global batch, so the number of processes does not change the data.
"""

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from core.config import UsageError, UserError

BLOCK = 1000  # sequences in which the mixture's shares come out exactly
IGNORED = -100  # target that no loss is taken on


@dataclass(frozen=True)
class Stream:
    """The documents of one source and split, one after the other in one file.

    tokens [tokens] uint16 or uint32, memory-mapped; starts, lengths [documents] int64, in tokens, BOS and EOS
    included; byte_lengths [vocab] int64, the UTF-8 bytes that each id stands for; bytes of all documents.
    """

    name: str
    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    byte_lengths: np.ndarray
    bytes: int
    eos_id: int


@dataclass(frozen=True)
class Batch:
    """n sequences of T tokens with their targets.

    tokens, targets [n, T] int64 (targets -100 where the next token begins another document);
    doc_ids [n, T] int32, 0, 1, 2 ... within a sequence; positions [n, T] int64, from 0 in each document;
    byte_lengths [vocab] int64, see Stream.
    """

    tokens: Tensor
    targets: Tensor
    doc_ids: Tensor
    positions: Tensor
    byte_lengths: np.ndarray

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of the targets, for losses in bits per byte."""
        targets = self.targets.cpu().numpy()
        return int(self.byte_lengths[targets[targets >= 0]].sum())

    def rows(self, chosen: slice) -> "Batch":
        parts = (self.tokens, self.targets, self.doc_ids, self.positions)
        return Batch(*(part[chosen] for part in parts), self.byte_lengths)

    def split(self, n: int) -> Iterator["Batch"]:
        """Micro-batches of n sequences."""
        for start in range(0, len(self.tokens), n):
            yield self.rows(slice(start, start + n))

    def to(self, device: torch.device | str) -> "Batch":
        parts = (self.tokens, self.targets, self.doc_ids, self.positions)
        return Batch(*(part.to(device, non_blocking=True) for part in parts), self.byte_lengths)


class Layout:
    """One epoch of a stream: its documents in a shuffled order, cut into windows that are shuffled again.

    The second shuffle keeps the windows of one long document from following each other. Memory: 24 bytes a
    document and 8 bytes a window.
    """

    def __init__(self, stream: Stream, seq_len: int, seed: Sequence[int]) -> None:
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(stream.lengths))
        self.stream, self.seq_len = stream, seq_len
        self.ends = np.cumsum(stream.lengths[order])  # of each document, in the shuffled order
        self.shift = stream.starts[order] - (self.ends - stream.lengths[order])  # from there to the file
        self.windows = rng.permutation(windows_in(stream, seq_len))

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, ...]:
        """Windows [n] -> tokens, targets, doc_ids, positions, each [n, T] (see Batch)."""
        n, length = len(numbers), min(self.seq_len + 1, int(self.ends[-1]))
        starts = self.windows[numbers] * self.seq_len
        stops = starts + length
        # A window is made of pieces of one document or more. Find the pieces, then expand them to tokens.
        first = np.searchsorted(self.ends, starts, side="right")
        last = np.searchsorted(self.ends, stops - 1, side="right")
        window = np.repeat(np.arange(n), last - first + 1)
        number = running(last - first + 1)  # of the piece in its window
        document = first[window] + number
        begins = np.where(number > 0, self.ends[document - 1], starts[window])
        lengths = np.minimum(self.ends[document], stops[window]) - begins
        positions = running(lengths)
        index = np.repeat(begins + self.shift[document], lengths) + positions
        tokens = self.stream.tokens[index].astype(np.int64).reshape(n, length)
        positions = positions.reshape(n, length)
        doc_ids = np.repeat(number.astype(np.int32), lengths).reshape(n, length)
        # With documents kept apart nothing tells what the next one begins with, so that is no target.
        targets = np.where(positions[:, 1:] > 0, tokens[:, 1:], IGNORED)
        return tokens[:, :-1], targets, doc_ids[:, :-1], positions[:, :-1]


def running(lengths: np.ndarray) -> np.ndarray:
    """[2, 3] -> [0, 1, 0, 1, 2]."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def windows_in(stream: Stream, seq_len: int) -> int:
    """Windows of seq_len tokens and one target more; at least one, which may be short (validation only)."""
    return max(1, (len(stream.tokens) - 1) // seq_len)


class PackedBatches:
    """Batches of packed documents from a weighted mixture.

    Sequence i of the run (row i % batch_size of step i // batch_size) takes slot i % BLOCK of a fixed
    schedule, in which each source has its exact quota, evenly spread. So which sequence of which source it
    is, and how many tokens each source gave before any step, are closed forms.
    """

    def __init__(
        self, streams: dict[str, Stream], weights: dict[str, float], seq_len: int, batch_size: int, seed: int
    ) -> None:
        unknown = sorted(set(weights) - set(streams))
        if unknown:
            raise UsageError(f"no prepared source is called {unknown[0]!r}; there are {', '.join(streams)}")
        self.names, self.streams = list(weights), [streams[name] for name in weights]
        self.seq_len, self.batch_size, self.seed = seq_len, batch_size, seed
        for stream in self.streams:
            if len(stream.tokens) <= seq_len:
                have = f"{len(stream.tokens)} training tokens"
                raise UserError(f"{stream.name}: {have} do not fill one sequence of {seq_len}")
        self.quotas = quotas(list(weights.values()), BLOCK)
        if self.quotas.min() == 0:
            raise UsageError(f"--data: each weight must be at least 1/{BLOCK} of their sum: {weights}")
        # The j-th of a source's q sequences wants to stand at (j + 1/2) / q of the block.
        wishes = [((j + 0.5) / q, source, j) for source, q in enumerate(self.quotas) for j in range(q)]
        self.source_of, self.turn_of = np.array([wish[1:] for wish in sorted(wishes)]).T  # [BLOCK] each
        self.layouts: dict[tuple[int, int], Layout] = {}

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """The global batch of a step, or only these rows of it, at the price of the rows."""
        sequences = step * self.batch_size + np.arange(self.batch_size)[rows or slice(None)]  # [n]
        block, slot = np.divmod(sequences, BLOCK)
        source = self.source_of[slot]
        turn = block * self.quotas[source] + self.turn_of[slot]  # sequences its source gave before it
        shape = (len(sequences), self.seq_len)
        parts = [np.empty(shape, dtype) for dtype in (np.int64, np.int64, np.int32, np.int64)]
        for one in np.unique(source).tolist():
            epoch, number = np.divmod(turn, windows_in(self.streams[one], self.seq_len))
            for this in np.unique(epoch[source == one]).tolist():
                chosen = (source == one) & (epoch == this)
                for part, values in zip(parts, self.layout(one, this).read(number[chosen]), strict=True):
                    part[chosen] = values
        return Batch(*map(torch.from_numpy, parts), self.streams[0].byte_lengths)

    def layout(self, source: int, epoch: int) -> Layout:
        """Kept for this epoch of the source and the one before, which may have its last rows in the batch."""
        if (source, epoch) not in self.layouts:
            for key in [key for key in self.layouts if key[0] == source and key[1] != epoch - 1]:
                del self.layouts[key]
            stream = self.streams[source]
            seed = (self.seed, zlib.crc32(stream.name.encode()), epoch)
            self.layouts[source, epoch] = Layout(stream, self.seq_len, seed)
        return self.layouts[source, epoch]

    def ledger(self, step: int) -> dict[str, int]:
        """Tokens drawn from each source in the steps before `step`."""
        blocks, rest = divmod(step * self.batch_size, BLOCK)
        begun = np.bincount(self.source_of[:rest], minlength=len(self.names))
        tokens = (blocks * self.quotas + begun) * self.seq_len
        return dict(zip(self.names, tokens.tolist(), strict=True))


def quotas(weights: Sequence[float], total: int) -> np.ndarray:
    """Whole numbers with the sum `total`, as near to the weights' shares as can be (largest remainders)."""
    exact = np.array(weights) / sum(weights) * total
    whole = np.floor(exact).astype(np.int64)
    whole[np.argsort(whole - exact, kind="stable")[: total - whole.sum()]] += 1
    return whole


def val_batches(stream: Stream, seq_len: int, max_tokens: int, rows: int = 16) -> Iterator[Batch]:
    """The same validation batches every time: about max_tokens of the documents, in a fixed shuffled order.

    Every batch has `rows` sequences; the last is filled up with sequences whose targets are all ignored. Bits
    per byte = sum of nats / (ln 2 x sum of `bytes`). The end of a document is predicted too and has no bytes.
    """
    layout = Layout(stream, seq_len, (0,))
    count = min(len(layout.windows), max(1, max_tokens // seq_len))
    layout.windows = np.arange(count)
    for start in range(0, count, rows):
        parts = layout.read(np.arange(start, min(start + rows, count)))
        fillers = (stream.eos_id, IGNORED, int(parts[2].max()) + 1, 0)  # a document of its own
        missing = (0, seq_len - parts[0].shape[1], 0, rows - len(parts[0]))
        filled = [pad(torch.from_numpy(p), missing, value=v) for p, v in zip(parts, fillers, strict=True)]
        yield Batch(*filled, stream.byte_lengths)
