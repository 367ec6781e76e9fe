"""Where text comes from: words of --data -> documents, one at a time.

    python-code python-docs drills     the embedded corpus: what is on every machine that has our requirements
    a file or folder                   .txt .md .py .jsonl .json .parquet (field `text` or `content`) .gz .zst
    hub/OWNER/NAME[/folder or glob]    a data set of the Hugging Face hub, streamed, never downloaded whole

Each may end in `:weight`, its share of the mixture. The Python sources are read in place from the standard
library and the installed packages: code as it stands, and the prose of the docstrings. They come in the
order of a hash of the file's name, code from the front and docstrings from the back, so that a cut anywhere
is a fair sample and a sample of each does not say the same things twice.
"""

import functools
import gzip
import hashlib
import inspect
import io
import json
import re
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from core.config import UsageError, UserError, nearest
from data.drills import catalogues, drills

PACKAGES = ("python-code", "python-docs")
EMBEDDED = (*PACKAGES, "drills")
EMBEDDED_BYTES = {
    "python-code": 12_000_000,
    "python-docs": 7_200_000,
    "drills": 4_800_000,
}  # taken unless told more
PLAIN, LINES, TABLES = (".txt", ".md", ".py"), (".jsonl", ".json", ".ndjson"), (".parquet",)
PIECE = 100_000  # characters; a longer plain file is cut at line ends
HELD_OUT = re.compile(r"(?:^|[^a-z])(?:test|valid|validation|dev|eval)(?:[^a-z]|$)")
HUB_SECONDS = 10  # to wait for the hub before giving up


class HubUnreachable(UserError):
    """The hub cannot be reached or has no such data set; a caller may train on something else instead."""


class BadRecord(UserError):
    """A line or file that cannot be read; with --skip_bad it is counted instead."""


@dataclass(frozen=True)
class Source:
    """One word of --data: `name` is what metrics and files call it."""

    word: str
    name: str
    weight: float


@dataclass(frozen=True)
class Document:
    """group: what is held out together (a package, a subject; empty = the document alone).
    kind: what it is, en, zh, code or drill; empty = to be found out."""

    text: str
    group: str = ""
    kind: Literal["en", "zh", "code", "drill", ""] = ""


def parse_source(word: str) -> Source:
    """`NAME_OR_PATH[:weight]`. Raises UsageError for a bad weight, an unknown name or a path that is not
    there."""
    place, colon, weight = word.rpartition(":")
    if not colon:
        place, weight = word, "1"
    try:
        share = float(weight)
    except ValueError:
        place, share = word, 1.0  # the colon belongs to the path
    if not 0 < share < float("inf"):
        raise UsageError(f"--data {word!r}: the weight after the colon must be a number above 0")
    if place in EMBEDDED:
        return Source(place, place, share)
    if place.startswith("hub/"):
        parts = place.split("/")
        if len(parts) < 3 or not all(parts[1:3]):
            raise UsageError(f"--data {word!r}: expected hub/OWNER/NAME[/folder or glob]")
        return Source(place, "-".join(parts[2:]).replace("*", ""), share)
    if not Path(place).exists():
        hint = nearest(place, EMBEDDED)
        known = f"hub/OWNER/NAME or {', '.join(EMBEDDED)}"
        raise UsageError(f"--data {place!r}: no such file or folder{hint} (otherwise one of {known})")
    return Source(place, Path(place).resolve().name.partition(".")[0] or "data", share)


def documents(source: Source) -> Iterator[Document | BadRecord]:
    """Every document of a source in a fixed order. What cannot be read comes as a BadRecord, not raised."""
    if source.word == "python-code":
        return python_code()
    if source.word == "python-docs":
        return python_docs()
    if source.word == "drills":
        return all_drills()
    if source.word.startswith("hub/"):
        return hub_documents(source.word)
    return local_documents(Path(source.word))


def state_of(source: Source) -> list[Any]:
    """What tells whether a source has changed since it was prepared: file names, sizes and times.

    A hub data set is known by its name alone, so that what was prepared can be used without the network.
    """
    if source.word in PACKAGES:
        return [source.word, *((str(name), size) for name, _, size in python_files())]
    if source.word == "drills":
        return [source.word, hashlib.sha256(Path(__file__).with_name("drills.py").read_bytes()).hexdigest()]
    if source.word.startswith("hub/"):
        return [source.word]
    files = local_files(Path(source.word))
    return [source.word, *((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)]


# ---------------------------------------------------------------- embedded


@functools.cache
def python_files() -> list[tuple[str, Path, int]]:
    """(name as package/file.py, path, bytes) of every installed Python file, by the hash of its name."""
    found = {}
    for root in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for path in Path(root).rglob("*.py"):
            name = path.relative_to(root).as_posix()
            if not name.startswith("site-packages/"):
                found[name] = (path, path.stat().st_size)
    order = sorted(found, key=lambda name: hashlib.sha256(name.encode()).digest())
    return [(name, *found[name]) for name in order]


def package_of(name: str) -> str:
    return name.partition("/")[0].removesuffix(".py")


def held_out_packages(fraction: float) -> set[str]:
    """Whole packages for validation with about `fraction` of all bytes: by the order of a hash."""
    sizes: dict[str, int] = {}
    for name, _, size in python_files():
        sizes[package_of(name)] = sizes.get(package_of(name), 0) + size
    room, chosen = fraction * sum(sizes.values()), set()
    largest = room / 4  # several packages rather than one large one
    for package in sorted(sizes, key=lambda name: hashlib.sha256(f"held out {name}".encode()).digest()):
        if sizes[package] <= min(room, largest):
            chosen.add(package)
            room -= sizes[package]
    return chosen


def python_code() -> Iterator[Document]:
    for name, path, _ in python_files():
        text = source_text(path)
        if text:
            yield Document(text, package_of(name), "code")


def python_docs() -> Iterator[Document]:
    """The docstrings of a file, one after the other."""
    for name, path, _ in reversed(python_files()):
        text = "\n\n".join(docstrings(source_text(path)))
        if text:
            yield Document(text, package_of(name), "en")


def source_text(path: Path) -> str:
    """A Python file, empty if it is not UTF-8 (some packages ship such files to test decoders)."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def docstrings(text: str) -> list[str]:
    """Strings in three double quotes that stand as statements of their own, without their indentation.

    Splitting at the quotes is many times faster than parsing. A file whose quotes do not pair up is left out.
    """
    parts = text.split('"""')
    if len(parts) % 2 == 0:
        return []
    lead = [part.rpartition("\n")[2].strip() for part in parts[:-1:2]]
    return [
        inspect.cleandoc(body) for before, body in zip(lead, parts[1::2], strict=True) if before in ("", "r")
    ]


def all_drills() -> Iterator[Document]:
    """Generated drills, with the installed Chinese message catalogues spread among them."""
    words = catalogues()
    for number, (subject, text) in enumerate(drills()):
        yield Document(text, subject, "drill")
        if number % 10 == 0:
            found = next(words, None)
            if found:
                yield Document(found[1], found[0], "drill")


# ---------------------------------------------------------------- files


def local_files(path: Path) -> list[Path]:
    """The readable files of a folder in order of name, or the file itself. UserError if there is none."""
    known = (*PLAIN, *LINES, *TABLES)
    if path.is_file():
        if kind_of(path.name) not in known:
            raise UserError(
                f"{path}: cannot read this kind of file; expected {' '.join(known)}, or with .gz, .zst"
            )
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file() and kind_of(file.name) in known)
    if not files:
        raise UserError(
            f"{path}: nothing to read in this folder; expected {' '.join(known)}, or with .gz, .zst"
        )
    return files


def kind_of(name: str) -> str:
    """The ending of a file name that tells its format: .jsonl of a.jsonl.gz."""
    return Path(name.removesuffix(".gz").removesuffix(".zst")).suffix


def local_documents(path: Path) -> Iterator[Document | BadRecord]:
    files = local_files(path)
    for file in files:
        with file.open("rb") as stream:
            yield from read_stream(stream, str(file), alone=len(files) == 1)


def read_stream(stream: IO[bytes], name: str, alone: bool = False) -> Iterator[Document | BadRecord]:
    """Documents of one open file. alone: it is all of its source, so a plain text is cut to leave some for
    validation. Raises UserError if the file is damaged."""
    kind = kind_of(name)
    damage: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, zlib.error)
    if name.endswith(".gz"):
        stream = gzip.open(stream)
    elif name.endswith(".zst"):
        zstandard = optional("zstandard", name)
        stream = io.BufferedReader(
            zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True)
        )
        damage += (zstandard.ZstdError,)
    try:
        if kind in TABLES:
            yield from read_parquet(stream, name)
        elif kind in LINES:
            yield from read_lines(stream, name)
        else:
            yield from read_plain(stream, name, alone)
    except damage as error:
        raise UserError(f"{name}: damaged, or not what its ending says ({error})") from None


def read_plain(stream: IO[bytes], name: str, alone: bool) -> Iterator[Document | BadRecord]:
    """A text file, in pieces if it is long."""
    content = stream.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + content[: error.start].count(b"\n")
        yield BadRecord(
            f"{name}:{line}: byte {error.start} is not UTF-8; convert the file or pass --skip_bad"
        )
        return
    size = min(PIECE, max(1000, len(text) // 20)) if alone else PIECE
    for piece in cut(text, size):
        yield Document(piece, kind="code" if kind_of(name) == ".py" else "")


def cut(text: str, size: int) -> Iterator[str]:
    """A long text in pieces of `size` characters or a little more, each ending with a line. They join to
    the text."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + size) + 1 or len(text)
        yield text[start:end]
        start = end


def read_lines(stream: IO[bytes], name: str) -> Iterator[Document | BadRecord]:
    """One JSON object a line, the text under `text` or `content`."""
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            text = record["text"] if "text" in record else record["content"]
            if not isinstance(text, str):
                raise TypeError(f"the text is {type(text).__name__}, not a string")
            yield Document(text)
        except (ValueError, KeyError, TypeError) as error:
            what = "no field `text` or `content`" if isinstance(error, KeyError) else str(error)
            yield BadRecord(f"{name}:{number}: {what}; mend the line or pass --skip_bad")


def read_parquet(stream: IO[bytes], name: str) -> Iterator[Document]:
    """A few rows in memory at a time, and of the columns only the text."""
    parquet = optional("pyarrow.parquet", name)
    try:
        table = parquet.ParquetFile(stream)
    except ValueError as error:
        raise UserError(f"{name}: damaged, or not what its ending says ({error})") from None
    columns = table.schema_arrow.names
    column = next((one for one in ("text", "content") if one in columns), None)
    if column is None:
        raise UserError(f"{name}: no column `text` or `content`, only {', '.join(columns)}")
    for batch in table.iter_batches(batch_size=256, columns=[column]):
        for value in batch.column(0):
            yield Document(value.as_py() or "")


def optional(module: str, name: str) -> Any:
    """A package that only some files need; UserError says which and how to get it."""
    package = module.partition(".")[0]
    try:
        return __import__(module, fromlist=["_"])
    except ImportError:
        raise UserError(f"{name}: reading it needs the package {package}: pip install {package}") from None


# ---------------------------------------------------------------- hub


def hub_filesystem(repository: str) -> Any:
    """The hub as a file system. Raises HubUnreachable in about HUB_SECONDS if the data set cannot be had."""
    from huggingface_hub import HfApi, HfFileSystem
    from huggingface_hub.errors import HTTPError

    try:
        HfApi().dataset_info(repository, timeout=HUB_SECONDS)
    except (HTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise HubUnreachable(f"hub data set {repository} cannot be reached: {reason}") from None
    return HfFileSystem()


def hub_documents(word: str) -> Iterator[Document | BadRecord]:
    """Documents of hub/OWNER/NAME[/folder or glob], file after file in order of name, read as they arrive.

    Files that are called test or validation are left out, unless the folder or glob says so.
    """
    from huggingface_hub.errors import HTTPError

    _, owner, name, *rest = word.split("/")
    files = hub_filesystem(f"{owner}/{name}")
    place = "/".join(("datasets", owner, name, *rest))
    try:
        found = files.glob(place) if "*" in place else files.find(place)
        known = [path for path in sorted(found) if kind_of(path) in (".txt", *LINES, *TABLES)]
        if not HELD_OUT.search("/".join(rest)):
            known = [
                path for path in known if not HELD_OUT.search(path.removeprefix(f"datasets/{owner}/{name}"))
            ]
        if not known:
            raise UserError(f"--data {word}: no .jsonl, .json, .parquet or .txt file there")
        for path in known:
            with files.open(path, "rb") as stream:
                yield from read_stream(stream, path)
    except (HTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--data {word}: the connection broke ({reason}); start again") from None
