"""Text -> token files -> batches.

`prepare` runs once for a choice of sources, options and tokenizer, and finds its result again afterwards:

    documents (data/sources.py) -> filters (data/filters.py) -> train or validation -> token files and a manifest

A prepared folder holds, for each source and for train and val, NAME.SPLIT.bin (token ids, uint16 or uint32, every
document as BOS ids EOS) and NAME.SPLIT.npy (int64 [documents, 2]: tokens and UTF-8 bytes of each document), with the
tokenizer and manifest.json beside them. Written under another name and renamed when complete.

Batches are a pure function of (seed, step): nothing but the step number is needed to go on where a run stopped, and
every process computes its own rows of the same global batch, so the number of processes does not change the data.

    python data/text.py --data python-code:2 my_texts/ --out prepared/     prepare only, and print the manifest
"""

import hashlib
import json
import os
import shutil
import sys
import time
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

if __name__ == "__main__":  # run as a script, this folder is first on the path and must give way to the root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.config import UsageError, UserError, parse, run_main
from data.filters import Filters
from data.sources import (
    EMBEDDED,
    EMBEDDED_BYTES,
    BadRecord,
    Document,
    HubUnreachable,
    Source,
    documents,
    held_out_packages,
    hub_filesystem,
    parse_source,
    state_of,
)
from data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

__all__ = ["Batch", "Corpus", "HubUnreachable", "PackedBatches", "Stream", "parse_source", "prepare", "val_batches"]

VERSION = 1  # raise when documents are chosen, cut or stored in another way: prepared files are then made anew
CACHE = Path(__file__).resolve().parent / "cache"
TOKENIZER_BYTES = 8_000_000  # of text are enough to train a tokenizer on: more changes few merges
CHUNK = 2_000_000  # characters tokenised at a time
BLOCK = 1000  # sequences in which the mixture's shares come out exactly
IGNORED = -100  # target that no loss is taken on


class Processes(Protocol):
    """What is asked of core.run.Run: to add a number over all processes."""

    def sum(self, *values: float) -> list[float]: ...


# ---------------------------------------------------------------- preparation


@dataclass(frozen=True)
class Options:
    """What, besides sources and tokenizer, decides which documents are kept and where they go."""

    max_tokens: int = 0  # training tokens taken of each source; 0 = all (embedded sources: EMBEDDED_BYTES)
    val_fraction: float = 0.02  # of the documents (embedded: of the packages or subjects)
    val_data: tuple[str, ...] = ()  # validate on these sources instead of on a part of the others
    decontaminate: tuple[str, ...] = ()  # evaluation files; documents that share 13 words in a row are dropped
    languages: tuple[str, ...] = ()  # keep only these of en, zh, code, other; empty = all
    skip_bad: bool = False  # count unreadable lines and files instead of stopping


def prepare(
    words: Sequence[str],
    tokenizer: Tokenizer | None = None,
    *,
    vocab_size: int = 8192,
    out: str | Path | None = None,
    run: Processes | None = None,
    **options: Any,
) -> tuple["Corpus", Tokenizer]:
    """Token files of the sources (words of --data), made now or found where they were made before.

    Without a tokenizer one of vocab_size ids is trained on the sources. One word that names a prepared folder opens
    that. options: fields of Options. With `run`, the first process of each machine works, the others wait for its
    files. Raises HubUnreachable, on all processes alike, if a hub data set that was not prepared before cannot be
    reached; UserError for bad input.
    """
    if len(words) == 1 and (Path(words[0]) / "manifest.json").is_file():
        tokenizer = tokenizer or load_tokenizer(words[0])
        return Corpus(words[0], tokenizer), tokenizer
    choice = Options(**options)
    sources, validation = (check_names([parse_source(word) for word in some]) for some in (words, choice.val_data))
    cache = Path(os.environ.get("NANOMOXIN_CACHE", CACHE))
    recipe = digest([VERSION, [state_of(source) for source in (*sources, *validation)], asdict(choice)])
    trained = cache / f"tokenizer-{digest([recipe, vocab_size])}"
    if tokenizer is None and trained.exists():
        tokenizer = load_tokenizer(trained)

    def place(tokenizer: Tokenizer) -> Path:
        return Path(out) if out else cache / f"text-{digest([recipe, tokenizer.fingerprint])}"

    ready = tokenizer is not None and (place(tokenizer) / "manifest.json").is_file()
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    unreachable = check_hub((*sources, *validation)) if first and not ready else None
    if (run.sum(unreachable is not None)[0] if run else unreachable is not None):
        raise unreachable or HubUnreachable("another process cannot reach the hub")

    if tokenizer is None:
        if first:
            with whole_folder(trained) as folder:
                train_tokenizer(sample_texts(sources, choice), vocab_size).save(folder)
        tokenizer = load_tokenizer(wait_for(trained))
    folder = place(tokenizer)
    if first and not ready:
        with whole_folder(folder) as building:
            build(building, recipe, sources, validation, tokenizer, choice)
    corpus = Corpus(wait_for(folder), tokenizer)
    if corpus.manifest["recipe"] != recipe:
        raise UserError(f"{folder} holds another choice of data or options; choose another folder or delete it")
    return corpus, tokenizer


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def check_names(sources: list[Source]) -> list[Source]:
    """Metrics and files go by a source's name, so it must be its own. Raises UsageError."""
    for name, times in Counter(source.name for source in sources).items():
        if times > 1:
            raise UsageError(f"--data: two sources are called {name!r}; rename one")
    return sources


def check_hub(sources: Iterable[Source]) -> HubUnreachable | None:
    """Why a hub source cannot be had, if so: asked before any work starts."""
    try:
        for source in sources:
            if source.word.startswith("hub/"):
                hub_filesystem("/".join(source.word.split("/")[1:3]))
    except HubUnreachable as error:
        return error
    return None


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that takes its real name only when the block ends well. UserError if it cannot."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        if not (folder.is_dir() and any(folder.iterdir())):  # else another process was faster: same content
            partial.replace(folder)
    except OSError as error:
        raise UserError(f"cannot prepare data in {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def wait_for(folder: Path) -> Path:
    """Until another process has made the folder. If that one fails, the launcher ends this one too."""
    while not folder.exists():
        time.sleep(0.5)
    return folder


def kept_documents(
    source: Source, rules: Filters, choice: Options, bad: Counter[str]
) -> Iterator[tuple[Document, bool]]:
    """The documents that pass, each with whether it is held out for validation.

    Packages of the embedded sources are chosen by size, so that validation has its share of the bytes; elsewhere a
    hash decides, and the first document is always held out, so that validation is never empty.
    """
    packages = held_out_packages(choice.val_fraction) if source.word in ("python-code", "python-docs") else None
    number = 0
    for document in documents(source):
        if isinstance(document, BadRecord):
            if not choice.skip_bad:
                raise document
            bad["bad"] += 1
            continue
        if not rules.accept(document.text, document.kind):
            continue
        if packages is not None:
            held_out = document.group in packages
        else:
            key = zlib.crc32((document.group or document.text).encode("utf-8", "replace"))
            held_out = key < choice.val_fraction * 2**32 or (not document.group and number == 0)
        number += 1
        yield document, held_out and not choice.val_data


def sample_texts(sources: Sequence[Source], choice: Options) -> Iterator[str]:
    """Training text of each source, by weight, TOKENIZER_BYTES in all: what the tokenizer learns from."""
    rules, total = Filters(languages=choice.languages), sum(source.weight for source in sources)
    for source in sources:
        room = TOKENIZER_BYTES * source.weight / total
        for document, held_out in kept_documents(source, rules, choice, Counter()):
            if not held_out:
                room -= len(document.text.encode("utf-8", "replace"))
                yield document.text
            if room <= 0:
                break


def evaluation_texts(files: Iterable[str]) -> Iterator[str]:
    """Everything written in evaluation files: each text of each JSON line, or the whole of a plain file."""
    for file in files:
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--decontaminate {file}: cannot be read ({error})") from None
        if not file.endswith(".jsonl"):
            yield "\n".join(lines)
            continue
        for number, line in enumerate(lines, 1):
            try:
                waiting = [json.loads(line)]
            except ValueError as error:
                raise UserError(f"{file}:{number}: not JSON ({error})") from None
            while waiting:
                value = waiting.pop()
                if isinstance(value, str):
                    yield value
                elif isinstance(value, dict | list):
                    waiting += value.values() if isinstance(value, dict) else value


class TokenWriter:
    """Appends documents to NAME.SPLIT.bin and, when closed, writes their lengths to NAME.SPLIT.npy."""

    def __init__(self, stem: Path, dtype: type[np.unsignedinteger]) -> None:
        self.stem, self.dtype = stem, dtype
        self.file = open(f"{stem}.bin", "wb")
        self.hash = hashlib.sha256()
        self.lengths = array("q")  # tokens, bytes, tokens, bytes, ...
        self.tokens = 0

    def add(self, ids: list[int], size: int) -> None:
        content = np.asarray(ids, dtype=self.dtype).tobytes()
        self.file.write(content)
        self.hash.update(content)
        self.lengths.extend((len(ids), size))
        self.tokens += len(ids)

    def close(self) -> dict[str, Any]:
        """What the manifest says of this split."""
        self.file.close()
        lengths = np.array(self.lengths, dtype=np.int64).reshape(-1, 2)
        np.save(f"{self.stem}.npy", lengths)
        size = int(lengths[:, 1].sum())
        return dict(documents=len(lengths), bytes=size, tokens=self.tokens, sha256=self.hash.hexdigest())


def build(
    folder: Path, recipe: str, sources: list[Source], validation: list[Source], tokenizer: Tokenizer, choice: Options
) -> None:
    """Filter, split and tokenise everything into `folder`. Memory: CHUNK characters and the filters' indexes.

    Validation sources come first, so that a training document which repeats one is the one that goes.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    rules = Filters(evaluation_texts(choice.decontaminate), choice.languages)
    entries = {}
    for source in (*validation, *sources):
        splits = ("val",) if source in validation else ("train",) if validation else ("train", "val")
        writers = {split: TokenWriter(folder / f"{source.name}.{split}", dtype) for split in splits}
        bad: Counter[str] = Counter()
        rules.counts, rules.languages = Counter(), Counter()
        fill(writers, source, rules, tokenizer, choice, bad)
        counts = dict(rules.counts + bad)
        for split, writer in writers.items():
            if not writer.tokens:
                raise UserError(f"{source.word}: no {split} document left of it ({counts or 'nothing to read'})")
        entries[f"{source.name}.{splits[0]}"] = {
            "name": source.name,
            "word": source.word,
            "weight": source.weight,
            "filters": counts,
            "languages": dict(rules.languages),
            **{split: writer.close() for split, writer in writers.items()},
        }
    tokenizer.save(folder)
    manifest = {
        "recipe": recipe,
        "tokenizer": tokenizer.fingerprint,
        "dtype": np.dtype(dtype).name,
        "options": asdict(choice),
        "held_out_packages": sorted(held_out_packages(choice.val_fraction)) if uses_packages(sources) else [],
        "sources": list(entries.values()),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", "utf-8")


def uses_packages(sources: list[Source]) -> bool:
    return any(source.word in ("python-code", "python-docs") for source in sources)


def fill(
    writers: dict[str, TokenWriter], source: Source, rules: Filters, tokenizer: Tokenizer, choice: Options, bad: Counter
) -> None:
    """One source's documents into its writers, until it ends or enough was taken."""
    prefix = [] if tokenizer.bos_id in (None, tokenizer.eos_id) else [tokenizer.bos_id]
    limit = EMBEDDED_BYTES.get(source.word, 0) if not choice.max_tokens else 0
    chunk: dict[str, list[str]] = {split: [] for split in writers}
    waiting = taken = 0

    def flush() -> None:
        for split, texts in chunk.items():
            for text, ids in zip(texts, tokenizer.encode_many(texts), strict=True):
                writers[split].add([*prefix, *ids, tokenizer.eos_id], len(text.encode("utf-8", "replace")))
            texts.clear()

    full = False
    for document, held_out in kept_documents(source, rules, choice, bad):
        split = "val" if held_out or "train" not in writers else "train"
        if split == "val" or not full:
            chunk[split].append(document.text)
            waiting += len(document.text)
            taken += len(document.text)
        if waiting > CHUNK or choice.max_tokens and waiting > choice.max_tokens:
            flush()
            waiting = 0
        main = writers.get("train", writers.get("val"))
        full = bool(choice.max_tokens and main.tokens >= choice.max_tokens or limit and taken >= limit)
        if full and all(writer.tokens or chunk[s] for s, writer in writers.items()):
            break
    flush()


# ---------------------------------------------------------------- prepared data


@dataclass(frozen=True)
class Stream:
    """The documents of one source and split, one after the other in one file.

    tokens [tokens] uint16 or uint32, memory-mapped; lengths and starts [documents] int64 in tokens, BOS and EOS
    included; byte_lengths [vocab] int32: the UTF-8 bytes that each id stands for.
    """

    name: str
    tokens: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    byte_lengths: np.ndarray
    bytes: int
    eos_id: int


class Corpus:
    """A prepared folder: train and val streams by source name, weights, and the manifest they come from."""

    def __init__(self, folder: str | Path, tokenizer: Tokenizer) -> None:
        self.folder = Path(folder)
        try:
            self.manifest = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder}: not a prepared folder, its manifest.json cannot be read ({error})") from None
        if self.manifest["tokenizer"] != tokenizer.fingerprint:
            raise UserError(f"{self.folder} was prepared with another tokenizer; prepare it again in another folder")
        self.byte_lengths = np.array(tokenizer.byte_lengths(), dtype=np.int32)
        self.eos_id = tokenizer.eos_id
        self.fingerprint = digest(self.manifest)
        entries = self.manifest["sources"]
        self.train = {e["name"]: self._open(e, "train") for e in entries if "train" in e}
        self.val = {e["name"]: self._open(e, "val") for e in entries if "val" in e}
        self.weights = {e["name"]: e["weight"] for e in entries if "train" in e}

    def _open(self, entry: dict[str, Any], split: str) -> Stream:
        """Raises UserError if a file does not have the size that the manifest says."""
        stem, told, dtype = self.folder / f"{entry['name']}.{split}", entry[split], np.dtype(self.manifest["dtype"])
        path = Path(f"{stem}.bin")
        size = path.stat().st_size if path.exists() else 0
        if size != told["tokens"] * dtype.itemsize:
            wanted = told["tokens"] * dtype.itemsize
            raise UserError(f"{path}: {size} bytes, the manifest says {wanted}; delete {self.folder} to prepare it again")
        lengths = np.load(f"{stem}.npy", allow_pickle=False)[:, 0]
        starts = np.cumsum(lengths) - lengths
        tokens = np.memmap(path, dtype=dtype, mode="r")
        return Stream(entry["name"], tokens, starts, lengths, self.byte_lengths, told["bytes"], self.eos_id)

    def unigram_bits_per_byte(self) -> dict[str, float]:
        """What a model that knows only how frequent each token is reaches on the validation data: a control.

        Frequencies of the source's own first 5 M training tokens, one added to each.
        """
        result = {}
        for name, stream in self.val.items():
            known = self.train.get(name, next(iter(self.train.values())))
            counts = 1.0 + np.bincount(known.tokens[:5_000_000], minlength=len(self.byte_lengths))
            begins = np.zeros(len(stream.tokens), dtype=bool)
            begins[stream.starts] = True  # the first token of a document is given, not predicted
            bits = -np.log2(counts / counts.sum())[stream.tokens[~begins]]
            result[name] = float(bits.sum() / stream.bytes)
        return result

    def table(self) -> str:
        """The manifest for the eye."""
        lines = [f"{'source':24}{'split':7}{'documents':>11}{'bytes':>15}{'tokens':>14}{'bytes/token':>13}"]
        for entry in self.manifest["sources"]:
            for split in ("train", "val"):
                if split in entry:
                    told = entry[split]
                    ratio = told["bytes"] / told["tokens"]
                    lines.append(
                        f"{entry['name']:24}{split:7}{told['documents']:>11,}{told['bytes']:>15,}{told['tokens']:>14,}{ratio:>13.2f}"
                    )
            counted = ", ".join(f"{what} {count:,}" for what, count in sorted(entry["filters"].items()))
            spoken = ", ".join(f"{what} {count:,}" for what, count in sorted(entry["languages"].items()))
            lines.append(f"    documents: {counted}; kept by language: {spoken}")
        if self.manifest["held_out_packages"]:
            lines.append(f"    held-out packages: {' '.join(self.manifest['held_out_packages'])}")
        return "\n".join(lines)


# ---------------------------------------------------------------- batches


@dataclass(frozen=True)
class Batch:
    """n sequences of T tokens with their targets.

    tokens, targets [n, T] int64 (targets -100 where the next token begins another document);
    doc_ids [n, T] int32, 0, 1, 2 ... within a sequence; positions [n, T] int64, from 0 in each document;
    sizes [n] int64, the UTF-8 bytes of each sequence's targets.
    """

    tokens: Tensor
    targets: Tensor
    doc_ids: Tensor
    positions: Tensor
    sizes: Tensor

    @property
    def bytes(self) -> int:
        return int(self.sizes.sum())

    def rows(self, chosen: slice) -> "Batch":
        return Batch(*(getattr(self, f.name)[chosen] for f in fields(self)))

    def split(self, n: int) -> Iterator["Batch"]:
        """Micro-batches of n sequences."""
        for start in range(0, len(self.tokens), n):
            yield self.rows(slice(start, start + n))

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))


class Layout:
    """One epoch of a stream: its documents in a shuffled order, cut into windows that are shuffled again.

    The second shuffle keeps the windows of one long document from following each other in a batch. Memory: 24 bytes
    a document and 8 a window.
    """

    def __init__(self, stream: Stream, seq_len: int, seed: Sequence[int]) -> None:
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(stream.lengths))
        self.stream, self.seq_len = stream, seq_len
        self.ends = np.cumsum(stream.lengths[order])  # of each document, in the shuffled order
        self.shift = stream.starts[order] - (self.ends - stream.lengths[order])  # from there to the file
        self.windows = rng.permutation(windows_in(stream, seq_len))

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, ...]:
        """Windows [n] -> tokens, targets, doc_ids, positions [n, T] and sizes [n] (see Batch)."""
        n, length = len(numbers), min(self.seq_len + 1, int(self.ends[-1]))
        starts = self.windows[numbers] * self.seq_len
        stops = starts + length
        # Each window is a few pieces of documents: find the pieces, then expand them to tokens.
        first = np.searchsorted(self.ends, starts, side="right")
        last = np.searchsorted(self.ends, stops - 1, side="right")
        pieces = last - first + 1  # [n]
        window = np.repeat(np.arange(n), pieces)
        number = running(pieces)  # of the piece in its window
        document = first[window] + number
        begins = np.where(number > 0, self.ends[document - 1], starts[window])
        lengths = np.minimum(self.ends[document], stops[window]) - begins
        positions = running(lengths)
        index = np.repeat(begins + self.shift[document], lengths) + positions
        # The gather itself: all the rest is bookkeeping on pieces.
        tokens = self.stream.tokens[index].astype(np.int64).reshape(n, length)
        positions = positions.reshape(n, length)
        doc_ids = np.repeat(number.astype(np.int32), lengths).reshape(n, length)
        targets = np.where(positions[:, 1:] > 0, tokens[:, 1:], IGNORED)
        sizes = np.where(targets >= 0, self.stream.byte_lengths[tokens[:, 1:]], 0).sum(axis=1, dtype=np.int64)
        return tokens[:, :-1], targets, doc_ids[:, :-1], positions[:, :-1], sizes


def running(lengths: np.ndarray) -> np.ndarray:
    """[2, 3] -> [0, 1, 0, 1, 2]."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def windows_in(stream: Stream, seq_len: int) -> int:
    """Windows of seq_len tokens and one target more; at least one, which may be short (validation only)."""
    return max(1, (len(stream.tokens) - 1) // seq_len)


class PackedBatches:
    """Batches of packed documents from a weighted mixture, as a pure function of the step.

    Sequence i of the run (row i % batch_size of step i // batch_size) takes slot i % BLOCK of the mixture's fixed
    schedule, in which each source has its exact quota, evenly spread. So the k-th sequence of a source, and how many
    there were before any step, are closed forms.
    """

    def __init__(
        self, streams: dict[str, Stream], weights: dict[str, float], seq_len: int, batch_size: int, seed: int
    ) -> None:
        unknown = set(weights) - set(streams)
        if unknown:
            raise UsageError(f"no prepared source is called {sorted(unknown)[0]!r}; there are {', '.join(streams)}")
        self.streams = [streams[name] for name in weights]
        self.names, self.seq_len, self.batch_size, self.seed = list(weights), seq_len, batch_size, seed
        for stream in self.streams:
            if len(stream.tokens) <= seq_len:
                raise UserError(f"{stream.name}: {len(stream.tokens)} training tokens do not fill one sequence of {seq_len}")
        self.quotas = quotas(list(weights.values()), BLOCK)
        if min(self.quotas) == 0:
            raise UsageError(f"--data: a weight below 1/{2 * BLOCK} of the sum is not supported: {weights}")
        # The j-th of q sequences of a source wants to stand at (j + 1/2) / q of the block.
        wishes = [((j + 0.5) / q, s, j) for s, q in enumerate(self.quotas) for j in range(q)]
        self.source_of, self.turn_of = np.array([(s, j) for _, s, j in sorted(wishes)]).T  # [BLOCK] each
        self.layouts: dict[tuple[int, int], Layout] = {}

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """The global batch of a step, or the given rows of it: equal to slicing the whole, at the price of the rows."""
        sequences = step * self.batch_size + np.arange(self.batch_size)[rows or slice(None)]
        block, slot = np.divmod(sequences, BLOCK)
        source = self.source_of[slot]
        turn = block * self.quotas[source] + self.turn_of[slot]  # how many sequences its source gave before it
        T = self.seq_len
        parts = [np.empty((len(sequences), T), d) for d in (np.int64, np.int64, np.int32, np.int64)]
        parts.append(np.empty(len(sequences), np.int64))
        for s in np.unique(source):
            epoch, number = np.divmod(turn, windows_in(self.streams[s], T))
            for e in np.unique(epoch[source == s]):
                chosen = (source == s) & (epoch == e)
                for part, values in zip(parts, self.layout(int(s), int(e)).read(number[chosen]), strict=True):
                    part[chosen] = values
        return Batch(*map(torch.from_numpy, parts))

    def layout(self, source: int, epoch: int) -> Layout:
        """Kept for this epoch of the source and the one before, of which the batch may hold the last rows."""
        if (source, epoch) not in self.layouts:
            stale = [key for key in self.layouts if key[0] == source and key[1] != epoch - 1]
            for key in stale:
                del self.layouts[key]
            stream = self.streams[source]
            seed = (self.seed, zlib.crc32(stream.name.encode()), epoch)
            self.layouts[source, epoch] = Layout(stream, self.seq_len, seed)
        return self.layouts[source, epoch]

    def ledger(self, step: int) -> dict[str, int]:
        """Tokens drawn from each source in the steps before `step`."""
        blocks, rest = divmod(step * self.batch_size, BLOCK)
        begun = np.bincount(self.source_of[:rest], minlength=len(self.names))
        return {n: int(t) for n, t in zip(self.names, (blocks * self.quotas + begun) * self.seq_len, strict=True)}


def quotas(weights: Sequence[float], total: int) -> np.ndarray:
    """Whole numbers with the given sum, as near to the weights as can be (largest remainders)."""
    exact = np.array(weights) / sum(weights) * total
    whole = np.floor(exact).astype(np.int64)
    short = np.argsort(whole - exact, kind="stable")[: total - whole.sum()]
    whole[short] += 1
    return whole


def val_batches(stream: Stream, seq_len: int, max_tokens: int, rows: int = 16) -> Iterator[Batch]:
    """The same validation batches every time: about max_tokens of the documents in a fixed shuffled order.

    Every batch has `rows` sequences; the last is filled up with sequences whose targets are all ignored. Bits per
    byte = nats of all targets / (ln 2 x the batches' bytes); the end of a document is predicted but has no bytes.
    """
    layout = Layout(stream, seq_len, (0,))
    layout.windows = np.arange(len(layout.windows))[: max(1, max_tokens // seq_len)]
    for start in range(0, len(layout.windows), rows):
        numbers = np.arange(start, min(start + rows, len(layout.windows)))
        tokens, targets, doc_ids, positions, sizes = map(torch.from_numpy, layout.read(numbers))
        missing, short = rows - len(numbers), seq_len - tokens.shape[1]
        pad = (0, short, 0, missing)
        last = doc_ids[:, -1:].expand(-1, short)
        doc_ids = torch.nn.functional.pad(torch.cat((doc_ids, last), 1), (0, 0, 0, missing))
        yield Batch(
            torch.nn.functional.pad(tokens, pad, value=stream.eos_id),
            torch.nn.functional.pad(targets, pad, value=IGNORED),
            doc_ids,
            torch.nn.functional.pad(positions, pad),
            torch.nn.functional.pad(sizes, (0, missing)),
        )


@dataclass(kw_only=True)
class Config:
    preset: str = "default"
    data: tuple[str, ...] = EMBEDDED  # sources as NAME_OR_PATH[:weight]
    out: str = ""  # prepared folder to write; empty = in the cache
    tokenizer: str = ""  # folder or file; empty = train one on the data
    vocab_size: int = 8192  # of the tokenizer trained
    max_tokens: int = 0  # training tokens taken of each source; 0 = all (embedded: 24 MB in all)
    val_fraction: float = 0.02  # share of the documents held out for validation
    val_data: tuple[str, ...] = ()  # validate on these sources instead
    decontaminate: tuple[str, ...] = ()  # evaluation files of which no 13 words in a row may stay in the data
    languages: tuple[str, ...] = ()  # keep only these of en, zh, code, other
    skip_bad: bool = False  # count unreadable lines and files instead of stopping


def main() -> None:
    config = parse(Config, {"default": {}}, about=__doc__)
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else None
    options = {field.name: getattr(config, field.name) for field in fields(Options)}
    started = time.process_time()
    corpus, _ = prepare(
        config.data, tokenizer, vocab_size=config.vocab_size, out=config.out or None, **options
    )
    print(corpus.table())
    print(f"{corpus.folder}: {time.process_time() - started:.0f} CPU seconds")


if __name__ == "__main__":
    run_main(main)
