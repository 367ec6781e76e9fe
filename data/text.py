"""Text -> token files, once for each choice of sources, options and tokenizer.

    documents (data/sources.py) -> filters (data/filters.py) -> train or validation -> token files, manifest

A prepared folder holds, for each source and for train and val, NAME.SPLIT.bin (token ids, uint16 or uint32,
every document as BOS ids EOS) and NAME.SPLIT.npy (int64 [documents, 2]: tokens and UTF-8 bytes of each
document), with the tokenizer and manifest.json beside them. It is written under another name and renamed when
complete, and found again by a fingerprint of everything that decided its content. data/batches.py reads it.

    python data/text.py --data python-code:2 my_texts/ --out prepared/      prepare only, print the manifest
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

if __name__ == "__main__":  # run as a script, this folder is first on the path and must give way to the root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.config import UsageError, UserError, parse, run_main
from data.batches import Batch, PackedBatches, Stream, val_batches
from data.filters import Filters
from data.sources import (
    EMBEDDED,
    EMBEDDED_BYTES,
    PACKAGES,
    BadRecord,
    HubUnreachable,
    Source,
    documents,
    held_out_packages,
    hub_filesystem,
    parse_source,
    state_of,
)
from data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

# All that a training script needs of its text, under one name.
__all__ = ["Batch", "Corpus", "HubUnreachable", "PackedBatches", "parse_source", "prepare", "val_batches"]

VERSION = 1  # raised when documents are chosen, cut or stored in another way, so that files are made anew
CACHE = Path(__file__).resolve().parent / "cache"
TOKENIZER_BYTES = 8_000_000  # of text to train a tokenizer on: with more, few merges change
CHUNK = 500_000  # characters tokenised at a time, at most


class Processes(Protocol):
    """What is asked of core.run.Run: to add a number over all processes."""

    def sum(self, *values: float) -> list[float]: ...


@dataclass(frozen=True)
class Options:
    """What, besides sources and tokenizer, decides which documents are kept and where they go."""

    max_tokens: int = 0  # training tokens taken of each source, about; 0 = all (embedded: EMBEDDED_BYTES)
    val_fraction: float = 0.02  # of the documents (embedded: of the packages or subjects)
    val_data: tuple[str, ...] = ()  # validate on these sources instead of on a part of the others
    decontaminate: tuple[str, ...] = ()  # evaluation files; documents with 13 of their words in a row go
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

    Without a tokenizer one of vocab_size ids is trained on the sources. One word that names a prepared folder
    opens that. options: fields of Options. With `run`, the first process of each machine works and the others
    wait for its files. Raises HubUnreachable, on all processes alike, if a hub data set that was not prepared
    before cannot be reached; UserError for bad input.
    """
    if len(words) == 1 and (Path(words[0]) / "manifest.json").is_file():
        tokenizer = tokenizer or load_tokenizer(words[0])
        return Corpus(words[0], tokenizer), tokenizer
    choice = Options(**options)
    sources, validation = unique_sources(words), unique_sources(choice.val_data)
    states = [state_of(source) for source in (*sources, *validation)]
    cache = Path(os.environ.get("NANOMOXIN_CACHE", CACHE))
    # How much is taken of each source does not change what the tokenizer is trained on.
    trained = cache / f"tokenizer-{digest(VERSION, states, asdict(choice) | {'max_tokens': 0}, vocab_size)}"
    if tokenizer is None and trained.exists():
        tokenizer = load_tokenizer(trained)
    recipe = digest(VERSION, states, asdict(choice))

    def place(tokenizer: Tokenizer) -> Path:
        return Path(out) if out else cache / f"text-{digest(recipe, tokenizer.fingerprint)}"

    ready = tokenizer is not None and (place(tokenizer) / "manifest.json").is_file()
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    unreachable = check_hub((*sources, *validation)) if first and not ready else None
    if run.sum(unreachable is not None)[0] if run else unreachable is not None:
        raise unreachable or HubUnreachable("another process cannot reach the hub")

    if tokenizer is None:
        if first:
            with whole_folder(trained) as folder:
                train_tokenizer(sample_texts(sources, choice), vocab_size).save(folder)
        tokenizer = load_tokenizer(wait_for(trained / "tokenizer.json").parent)
    folder = place(tokenizer)
    if first and not ready:
        with whole_folder(folder) as partial:
            build(partial, recipe, sources, validation, tokenizer, choice)
    corpus = Corpus(wait_for(folder / "manifest.json").parent, tokenizer)
    if corpus.manifest["recipe"] != recipe:
        raise UserError(f"{folder} holds other data or was made with other options; choose another folder")
    return corpus, tokenizer


def digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def unique_sources(words: Sequence[str]) -> list[Source]:
    """Each source once, whatever its weights. Raises UsageError if two that differ have the same name."""
    sources = list({source.word: source for source in map(parse_source, words)}.values())
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
    """A folder to write into, which gets its real name only when the block ends well."""
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and holds something else; choose another folder")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        if not folder.exists() or not any(folder.iterdir()):  # else another run was faster: the same content
            partial.replace(folder)
    except OSError as error:
        raise UserError(f"cannot prepare data in {folder}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def wait_for(file: Path) -> Path:
    """Until another process has made the file. If that one fails, the launcher ends this one too."""
    while not file.exists():
        time.sleep(0.5)
    return file


# ---------------------------------------------------------------- choosing


def kept_documents(source: Source, rules: Filters, choice: Options) -> Iterator[tuple[str, bool]]:
    """(text, whether it is held out for validation) of every document that passes the rules.

    Packages are held out by their size, so that validation gets its share of the bytes; elsewhere a hash
    decides, and the first document is always held out, so that validation is never empty.
    """
    packages = held_out_packages(choice.val_fraction) if source.word in PACKAGES else None
    first = True
    for document in documents(source):
        if isinstance(document, BadRecord):
            if not choice.skip_bad:
                raise document
            rules.counts["bad"] += 1
        elif rules.accept(document.text, document.kind):
            key = zlib.crc32((document.group or document.text).encode("utf-8", "replace"))
            held_out = key < choice.val_fraction * 2**32 or first and not document.group
            if packages is not None:
                held_out = document.group in packages
            first = False
            yield document.text, held_out and not choice.val_data


def sample_texts(sources: Sequence[Source], choice: Options) -> Iterator[str]:
    """Training text of each source, by weight, TOKENIZER_BYTES in all: what a tokenizer learns from."""
    rules, total = Filters(languages=choice.languages), sum(source.weight for source in sources)
    for source in sources:
        room = given = TOKENIZER_BYTES * source.weight / total
        for text, held_out in kept_documents(source, rules, choice):
            if not held_out:
                room -= byte_length(text)
                yield text
            if room <= 0:
                break
        if room == given:
            dropped = f"the filters dropped it all: {dict(rules.counts)}" if rules.counts else "it is empty"
            raise UserError(f"--data {source.word}: no text to train a tokenizer on ({dropped})")


def evaluation_texts(files: Iterable[str]) -> Iterator[str]:
    """Everything written in evaluation files: each text of each JSON line, or the whole of a plain file."""
    for file in files:
        try:
            content = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--decontaminate {file}: cannot be read ({error})") from None
        if not file.endswith(".jsonl"):
            yield content
            continue
        for number, line in enumerate(content.split("\n"), 1):
            try:
                waiting = [json.loads(line)] if line.strip() else []
            except ValueError as error:
                raise UserError(f"{file}:{number}: not JSON ({error})") from None
            while waiting:
                value = waiting.pop()
                if isinstance(value, str):
                    yield value
                elif isinstance(value, dict | list):
                    waiting += value.values() if isinstance(value, dict) else value


def byte_length(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


# ---------------------------------------------------------------- writing


class TokenWriter:
    """Appends documents to NAME.SPLIT.bin and, when closed, writes their lengths to NAME.SPLIT.npy."""

    def __init__(self, stem: Path, tokenizer: Tokenizer, chunk: int = CHUNK) -> None:
        """chunk: characters tokenised at a time."""
        self.stem, self.tokenizer, self.chunk = stem, tokenizer, chunk
        self.prefix = [] if tokenizer.bos_id in (None, tokenizer.eos_id) else [tokenizer.bos_id]
        self.file = open(f"{stem}.bin", "wb")
        self.hash = hashlib.sha256()
        self.lengths = array("q")  # tokens, bytes, tokens, bytes, ...
        self.waiting: list[str] = []
        self.waiting_length = self.bytes = self.tokens = 0

    def add(self, text: str) -> None:
        self.waiting.append(text)
        self.waiting_length += len(text)
        self.bytes += byte_length(text)
        if self.waiting_length > self.chunk:
            self.flush()

    def flush(self) -> None:
        """Many texts at a time, so that the tokenizer can work on several cores."""
        for text, ids in zip(self.waiting, self.tokenizer.encode_many(self.waiting), strict=True):
            document = [*self.prefix, *ids, self.tokenizer.eos_id]
            content = np.array(document, dtype=token_type(self.tokenizer)).tobytes()
            self.file.write(content)
            self.hash.update(content)
            self.lengths.extend((len(document), byte_length(text)))
            self.tokens += len(document)
        self.waiting, self.waiting_length = [], 0

    def close(self) -> dict[str, Any]:
        """What the manifest says of these documents."""
        self.flush()
        self.file.close()
        lengths = np.array(self.lengths, dtype=np.int64).reshape(-1, 2)
        np.save(f"{self.stem}.npy", lengths)
        counts = {"documents": len(lengths), "bytes": self.bytes, "tokens": self.tokens}
        return {**counts, "sha256": self.hash.hexdigest()}


def token_type(tokenizer: Tokenizer) -> type[np.unsignedinteger]:
    return np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32


def build(
    folder: Path,
    recipe: str,
    sources: list[Source],
    validation: list[Source],
    tokenizer: Tokenizer,
    choice: Options,
) -> None:
    """Filter, split and tokenise everything into `folder`. Memory: CHUNK characters and the filters' indexes.

    Validation sources come first, so that a training document that repeats one is the one to go.
    """
    rules = Filters(evaluation_texts(choice.decontaminate), choice.languages)
    entries = []
    chunk = min(CHUNK, choice.max_tokens or CHUNK)
    for source in (*validation, *sources):
        splits = ("val",) if source in validation else ("train",) if validation else ("train", "val")
        writers = {
            split: TokenWriter(folder / f"{source.name}.{split}", tokenizer, chunk) for split in splits
        }
        rules.start_source()
        fill(writers, source, rules, choice)
        told = {split: writer.close() for split, writer in writers.items()}
        for split in splits:
            if not told[split]["documents"]:
                left = ", ".join(f"{what}: {count}" for what, count in rules.counts.items()) or "it is empty"
                raise UserError(f"--data {source.word}: no document for {split} in it ({left})")
        entry = {"name": source.name, "word": source.word, "weight": source.weight}
        entries.append(entry | {"filters": dict(rules.counts), "languages": dict(rules.languages)} | told)
    tokenizer.save(folder)
    manifest = {
        "recipe": recipe,
        "tokenizer": tokenizer.fingerprint,
        "dtype": np.dtype(token_type(tokenizer)).name,
        "options": asdict(choice),
        "sources": entries,
    }
    if any(source.word in PACKAGES for source in sources):
        manifest["held_out_packages"] = sorted(held_out_packages(choice.val_fraction))
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", "utf-8")


def fill(writers: dict[str, TokenWriter], source: Source, rules: Filters, choice: Options) -> None:
    """One source's documents into its writers, until it ends or enough was taken."""
    main = writers.get("train", writers.get("val"))
    most_bytes = EMBEDDED_BYTES.get(source.word, 0)
    for text, held_out in kept_documents(source, rules, choice):
        if choice.max_tokens:
            full = main.tokens >= choice.max_tokens
        else:
            full = 0 < most_bytes <= main.bytes
        if full and all(writer.bytes for writer in writers.values()):
            break
        if held_out:
            writers["val"].add(text)
        elif not full:
            main.add(text)


# ---------------------------------------------------------------- prepared data


class Corpus:
    """A prepared folder: train and val streams by source name, weights, and the manifest they come from."""

    def __init__(self, folder: str | Path, tokenizer: Tokenizer) -> None:
        self.folder = Path(folder)
        try:
            self.manifest = json.loads((self.folder / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder}/manifest.json: cannot be read ({error})") from None
        if self.manifest["tokenizer"] != tokenizer.fingerprint:
            raise UserError(
                f"{self.folder} was prepared with another tokenizer; prepare the data again with this one"
            )
        self.byte_lengths = np.array(tokenizer.byte_lengths(), dtype=np.int64)
        self.eos_id = tokenizer.eos_id
        self.fingerprint = digest(self.manifest)
        entries = self.manifest["sources"]
        self.train = {entry["name"]: self._open(entry, "train") for entry in entries if "train" in entry}
        self.val = {entry["name"]: self._open(entry, "val") for entry in entries if "val" in entry}
        self.weights = {entry["name"]: entry["weight"] for entry in entries if "train" in entry}

    def _open(self, entry: dict[str, Any], split: str) -> Stream:
        """Raises UserError if a file does not have the size that the manifest says."""
        path, dtype = self.folder / f"{entry['name']}.{split}.bin", np.dtype(self.manifest["dtype"])
        size, wanted = path.stat().st_size if path.exists() else 0, entry[split]["tokens"] * dtype.itemsize
        if size != wanted:
            raise UserError(
                f"{path}: {size:,} bytes, not {wanted:,}; delete {self.folder} to prepare it again"
            )
        lengths = np.load(path.with_suffix(".npy"), allow_pickle=False)[:, 0]
        return Stream(
            name=entry["name"],
            tokens=np.memmap(path, dtype=dtype, mode="r"),
            starts=np.cumsum(lengths) - lengths,
            lengths=lengths,
            byte_lengths=self.byte_lengths,
            bytes=entry[split]["bytes"],
            eos_id=self.eos_id,
        )

    def mixture(self, words: Sequence[str]) -> dict[str, float]:
        """Weights by source name of some words of --data (of a prepared folder: those it was made with)."""
        if len(words) == 1 and (Path(words[0]) / "manifest.json").is_file():
            return self.weights
        return {source.name: source.weight for source in map(parse_source, words)}

    def unigram_bits_per_byte(self) -> dict[str, float]:
        """What a model that knows only how frequent each token is reaches on the validation data: a control.

        Frequencies of the source's own first 5 M training tokens, one added to each.
        """
        result = {}
        for name, stream in self.val.items():
            known = self.train.get(name, next(iter(self.train.values())))
            counts = 1.0 + np.bincount(known.tokens[:5_000_000], minlength=len(self.byte_lengths))
            predicted = np.delete(stream.tokens, stream.starts)  # the first token of a document is given
            bits = -np.log2(counts / counts.sum())[predicted]
            result[name] = float(bits.sum() / stream.bytes)
        return result

    def table(self) -> str:
        """The manifest for the eye."""
        lines = [f"{'source':24}{'split':7}{'documents':>11}{'bytes':>15}{'tokens':>14}{'bytes/token':>13}"]
        for entry in self.manifest["sources"]:
            for split in ("train", "val"):
                if split in entry:
                    count, size, tokens = (entry[split][key] for key in ("documents", "bytes", "tokens"))
                    shown = f"{count:>11,}{size:>15,}{tokens:>14,}{size / tokens:>13.2f}"
                    lines.append(f"{entry['name']:24}{split:7}{shown}")
            for title in ("filters", "languages"):
                counted = sorted(entry[title].items())
                lines.append(f"    {title}: " + ", ".join(f"{what} {count:,}" for what, count in counted))
        if "held_out_packages" in self.manifest:
            lines.append(f"    held-out packages: {' '.join(self.manifest['held_out_packages'])}")
        return "\n".join(lines)


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
    decontaminate: tuple[str, ...] = ()  # evaluation files; documents with 13 of their words in a row go
    languages: tuple[str, ...] = ()  # keep only these of en, zh, code, other
    skip_bad: bool = False  # count unreadable lines and files instead of stopping


def main() -> None:
    config = parse(Config, {"default": {}}, about=__doc__)
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else None
    options = {field.name: getattr(config, field.name) for field in fields(Options)}
    corpus, _ = prepare(
        config.data, tokenizer, vocab_size=config.vocab_size, out=config.out or None, **options
    )
    print(corpus.table())
    print(f"{corpus.folder}: {time.process_time():.0f} CPU seconds")


if __name__ == "__main__":
    run_main(main)
