"""Pictures, and what is said about them.

Three layers, each usable alone:

1. `load_picture` opens a file that nobody has checked and gives plain RGB, or raises `BadPicture`.
2. `prepare` brings it to the encoder's size as bytes. The three ways are those of Prismatic (arXiv
   2402.07865, section 4.2), bit for bit what torchvision and timm compute, without either.
   `model.normalise` does the rest.
3. `open_rows` reads questions and answers: LLaVA JSON, the same as JSONL, or a tar of pairs (webdataset).
   Rows are found by their byte offset, so memory does not grow with the file; `Rows.fetch` replaces the
   broken ones.
"""

import hashlib
import io
import json
import mmap
import re
import sys
import tarfile
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from core.config import UserError

MAX_PIXELS = 89_478_485  # Pillow's own limit, 0.25 GiB as RGB; a file of 11 kB can claim more
FORMATS = "JPEG PNG GIF WEBP BMP TIFF PPM ICO TGA".split()  # no EPS: that would start Ghostscript
IMAGE = "<image>"  # where a picture stands, in LLaVA's files

# Pillow warns of odd metadata and of large pictures; the pixels decide, and too large is an error here.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

Source = Path | bytes | Image.Image | Callable[[], Image.Image]
Resize = Literal["naive", "crop", "letterbox"]


class BadPicture(ValueError):
    """A picture that cannot be used; the message is one line."""


class BadRow(ValueError):
    """A row of a data set that cannot be used; the message is one line."""


# ----------------------------------------------------------------------------------------------------------
# 1. Any file -> RGB


def load_picture(source: Source, turn_upright: bool = True) -> Image.Image:
    """Open a picture as RGB: first frame, upright, transparency laid on white, 16 bits scaled to 8.

    Args:
        source: a path, the bytes of a file, a picture already in memory, or a function that draws one.
        turn_upright: obey the camera's EXIF orientation. Prismatic does not: False repeats it exactly.

    Raises:
        BadPicture: if it is missing, empty, no picture, cut short, damaged, or larger than MAX_PIXELS.
    """
    name = str(source) if isinstance(source, Path) else "picture in memory"
    try:
        if callable(source):
            source = source()
        if isinstance(source, Image.Image):
            return to_rgb(source)
        if isinstance(source, Path) and not source.is_file():  # a pipe or a device would block for ever
            raise FileNotFoundError("no such file")
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            image.load()
            return to_rgb(ImageOps.exif_transpose(image) if turn_upright else image)
    # Pillow's readers meet broken bytes with almost any exception: OSError, SyntaxError, struct.error ...
    except Exception as error:
        raise BadPicture(f"{name}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Why a picture could not be read, short enough for a log and the same for the same kind of damage."""
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS:,} pixels"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture in a known format"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    text = " ".join(str(error).split())
    return f"damaged ({type(error).__name__}{': ' + text if text else ''})"[:160]


def to_rgb(image: Image.Image) -> Image.Image:
    """Any of Pillow's modes -> RGB. `convert` alone clips 16 bits to white and shows hidden colours."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image).astype(np.float64))
        top = 1 if image.mode == "F" and values.max() <= 1 else 255 if values.max() <= 255 else 65535
        return Image.fromarray((values.clip(0, top) * 255 / top).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


# ----------------------------------------------------------------------------------------------------------
# 2. RGB -> the encoder's pixels


def prepare(image: Image.Image, size: int, resize: Resize, means: tuple[tuple[float, ...], ...]) -> Tensor:
    """Resize a picture for each encoder: [encoders, 3, size, size] uint8.

    Args:
        image: RGB.
        size: side of the result in pixels.
        resize: naive squeezes both sides (Moxin's choice); crop scales the short side and keeps the middle;
            letterbox pads to a square with the encoder's mean colour.
        means: each encoder's mean pixel in [0, 1]; only letterbox makes the encoders' pictures differ.

    Raises:
        BadPicture: if a picture is so long that an intermediate one would exceed MAX_PIXELS.
    """
    long, short = max(image.size), min(image.size)
    between = {"naive": 0, "crop": size * size * long // short, "letterbox": long * long}[resize]
    if between > MAX_PIXELS:
        raise BadPicture(f"{image.width} x {image.height} pixels: too long for --resize {resize}")
    views = []
    for mean in means if resize == "letterbox" else means[:1]:
        if resize == "naive":
            view = image.resize((size, size), Image.Resampling.BICUBIC)
        else:
            view = middle(short_side(letterbox(image, mean) if resize == "letterbox" else image, size), size)
        views.append(torch.from_numpy(np.array(view)).permute(2, 0, 1))  # [H, W, 3] -> [3, H, W]
    return torch.stack(views).expand(len(means), -1, -1, -1).contiguous()


def letterbox(image: Image.Image, mean: tuple[float, ...]) -> Image.Image:
    """Pad to a square, or one pixel off it: the border is the same, rounded down, on both sides."""
    across, down = (int((max(image.size) - side) / 2) for side in image.size)
    colour = tuple(int(255 * value) for value in mean)
    return ImageOps.expand(image, (across, down, across, down), fill=colour)


def short_side(image: Image.Image, size: int) -> Image.Image:
    """Scale so that the short side has `size` pixels; the long side is rounded down."""
    width, height = image.size
    if min(width, height) == size:
        return image
    scaled = int(size * max(width, height) / min(width, height))
    return image.resize((size, scaled) if width <= height else (scaled, size), Image.Resampling.BICUBIC)


def middle(image: Image.Image, size: int) -> Image.Image:
    """The square in the middle; Python's round, halves to even."""
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return image.crop((left, top, left + size, top + size))


# ----------------------------------------------------------------------------------------------------------
# 3. Rows: a conversation and its pictures


@dataclass
class Row:
    """One example. In `messages` a content is text, or a list of parts {"type": "image"} and {"type": "text",
    "text": ...}: only such a part stands for a picture, so text that says "<image>" stays text."""

    messages: list[dict[str, Any]]
    pictures: list[Source] = field(default_factory=list)
    number: int = 0  # in its data set


def parse_row(record: Any, find: Callable[[str], Source]) -> Row:
    """A LLaVA record {image?, conversations: [{from: human | gpt, value}]} as a Row.

    `image` is a name or a list of names; each needs its own <image> in the human's words, except that a
    single picture without one goes first. `find` turns a name into a source and raises BadRow.
    """
    if not isinstance(record, dict):
        raise BadRow(f"expected an object, got {type(record).__name__}")
    turns = record.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRow("no list of turns under 'conversations'")
    if turns and turns[0].get("from") == "gpt":
        turns = turns[1:]  # some of ShareGPT starts so; LLaVA drops that turn too
    for i, turn in enumerate(turns):
        speaker = ("human", "gpt")[i % 2]
        if turn.get("from") != speaker or not isinstance(turn.get("value"), str):
            raise BadRow(f"turn {i + 1}: expected 'from': '{speaker}' and a text under 'value'")
    if len(turns) < 2 or not any(turn["value"].strip() for turn in turns[1::2]):
        raise BadRow("no answer to learn from")

    names = record.get("image", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise BadRow("'image' is neither a file name nor a list of them")
    marks = sum(turn["value"].count(IMAGE) for turn in turns[::2])
    if names and marks not in (len(names), 0) or len(names) > 1 and not marks:
        raise BadRow(f"{len(names)} pictures but {marks} times {IMAGE} in the questions")

    messages = []
    for i, turn in enumerate(turns):
        pieces = turn["value"].split(IMAGE) if names and i % 2 == 0 else [turn["value"]]
        if names and not marks and i == 0:
            pieces = ["", *pieces]
        parts: list[dict[str, str]] = []
        for j, piece in enumerate(pieces):
            parts += [{"type": "image"}] if j else []
            parts += [{"type": "text", "text": piece.strip()}] if piece.strip() else []
        content = parts if len(pieces) > 1 else pieces[0].strip()
        messages.append({"role": ("user", "assistant")[i % 2], "content": content})
    return Row(messages, [find(name) for name in names])


class Rows:
    """A data set whose rows are read when they are asked for.

    Subclasses give `record(i)`, `find(name)`, `where(i)` and `fingerprint()`. Broken rows and pictures are
    named once on stderr, counted in `bad`, and replaced by `fetch`; more than `max_bad` of all rows is an
    error.
    """

    def __init__(self, length: int, seed: int = 0, max_bad: float = 0.01) -> None:
        self.length, self.seed, self.max_bad = length, seed, max_bad
        self.bad: dict[int, str] = {}  # row -> why

    def __len__(self) -> int:
        return self.length

    def record(self, i: int) -> Any:
        raise NotImplementedError

    def find(self, name: str) -> Source:
        raise NotImplementedError

    def where(self, i: int) -> str:
        raise NotImplementedError

    def fingerprint(self) -> Any:
        """What changes when the data set does."""
        raise NotImplementedError

    def kind(self, i: int) -> str:
        """What row i asks for, in data sets that tell."""
        return ""

    def shown_by(self, i: int) -> int:
        """The first row that has the pictures of row i: itself, unless rows share them."""
        return i

    def row(self, i: int) -> Row:
        """Row i with its pictures still unopened. Raises BadRow."""
        row = parse_row(self.record(i), self.find)
        row.number = i
        return row

    def fetch(self, i: int, use: Callable[[Row], Any], like: Sequence[int] | None = None) -> Any:
        """`use(row i)`, or of a replacement where row i is broken.

        The replacement depends on seed, row and attempt alone, so a resumed run or another number of
        processes meets the same one. `like` are the rows to choose from (those of the same modality; default
        all).

        Raises:
            UserError: if more than `max_bad` of the rows have proved broken.
        """
        pool = range(len(self)) if like is None else like
        for attempt in range(1000):
            digest = hashlib.sha256(f"{self.seed}/{i}/{attempt}".encode()).digest()
            chosen = int(pool[int.from_bytes(digest[:8], "big") % len(pool)]) if attempt else i
            if chosen in self.bad:
                continue
            try:
                return use(self.row(chosen))
            except (BadRow, BadPicture) as error:
                self.report(chosen, str(error))
        raise UserError(f"{self.where(i)}: broken, and so were 1000 replacements")

    def report(self, i: int, why: str) -> None:
        """Name a broken row and count it; raises UserError beyond `max_bad`."""
        self.bad[i] = why
        print(f"{self.where(i)}: {why}", file=sys.stderr, flush=True)
        if len(self.bad) > self.max_bad * len(self):
            share = f"{len(self.bad)} of {len(self)} rows are broken, more than {self.max_bad:.1%}"
            raise UserError(f"{share}: see --check_data, mend them or raise --max_bad")


class JsonRows(Rows):
    """LLaVA's JSON list, or one object a line, mapped into memory and indexed by byte offset."""

    def __init__(self, path: Path, folder: Path, seed: int = 0, max_bad: float = 0.01) -> None:
        self.path, self.folder = path, folder
        with open(path, "rb") as file:
            try:
                self.text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError:
                raise UserError(f"{path}: empty file") from None
        is_list = re.match(rb"(?:\xef\xbb\xbf)?\s*\[", self.text)
        spans = self.objects(is_list.end()) if is_list else self.lines()
        self.spans = np.array(list(spans), dtype=np.int64).reshape(-1, 2)
        if not len(self.spans):
            raise UserError(f"{path}: no rows")
        super().__init__(len(self.spans), seed, max_bad)

    def lines(self) -> Iterator[tuple[int, int]]:
        """Spans of the lines that are not blank."""
        start = 0
        while start < len(self.text):
            end = self.text.find(b"\n", start)
            end = len(self.text) if end < 0 else end
            if self.text[start:end].strip():
                yield start, end
            start = end + 1

    def objects(self, after: int) -> Iterator[tuple[int, int]]:
        """Spans of the objects in a JSON list, found by their outermost braces without parsing what is
        inside."""
        depth, start = 0, 0
        for token in re.finditer(rb'"(?:[^"\\]++|\\.)*+"|[{}]', self.text, re.DOTALL):
            depth += {b"{": 1, b"}": -1}.get(token[0], 0)
            if token[0] == b"{" and depth == 1:
                start = token.start()
                if self.text[after:start].strip(b" \t\r\n,"):
                    raise UserError(f"{self.path}:{self.line(after)}: expected a list of objects")
            elif token[0] == b"}" and depth == 0:
                after = token.end()
                yield start, after
        if self.text[after:].strip() != b"]":
            raise UserError(f"{self.path}:{self.line(start)}: the list is broken here or never closed")

    def line(self, position: int) -> int:
        return self.text[:position].count(b"\n") + 1

    def where(self, i: int) -> str:
        return f"{self.path}:{self.line(self.spans[i, 0])}"

    def fingerprint(self) -> list[int]:
        return [len(self.text), zlib.crc32(self.text[: 1 << 20]), zlib.crc32(self.text[-(1 << 20) :])]

    def record(self, i: int) -> Any:
        start, end = self.spans[i]
        try:
            return json.loads(self.text[start:end])
        except (ValueError, RecursionError) as error:
            raise BadRow(f"not JSON ({error})") from None

    def find(self, name: str) -> Source:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise BadRow(f"picture {name!r} lies outside the data set's folder")
        return self.folder / name


class TarRows(Rows):
    """Pairs in a tar file, as webdataset writes them: KEY.jpg beside KEY.json (a LLaVA record) or KEY.txt (a
    caption).

    Members are read in place; nothing is unpacked.
    """

    def __init__(self, path: Path, seed: int = 0, max_bad: float = 0.01) -> None:
        self.path = path
        self.members: dict[str, dict[str, tuple[int, int]]] = {}  # key -> suffix -> (offset, size)
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    folder, _, name = member.name.rpartition("/")
                    key, _, suffix = name.partition(".")
                    if member.isfile():
                        place = (member.offset_data, member.size)
                        self.members.setdefault(f"{folder}/{key}", {})[suffix.lower()] = place
        except tarfile.TarError as error:
            raise UserError(f"{path}: not an uncompressed tar file, or cut short ({error})") from None
        if not self.members:
            raise UserError(f"{path}: no rows")
        self.keys = list(self.members)
        super().__init__(len(self.keys), seed, max_bad)

    def where(self, i: int) -> str:
        return f"{self.path}:{self.keys[i].lstrip('/')}"

    def fingerprint(self) -> list[int]:
        return [self.path.stat().st_size, zlib.crc32(repr(self.members).encode())]

    def read(self, key: str, suffix: str) -> bytes:
        offset, size = self.members[key][suffix]
        with open(self.path, "rb") as file:
            file.seek(offset)
            return file.read(size)

    def record(self, i: int) -> Any:
        key = self.keys[i]
        pictures = [f"{key}.{suffix}" for suffix in self.members[key] if suffix not in ("json", "txt")]
        try:
            if "json" in self.members[key]:
                record = json.loads(self.read(key, "json"))
                return {**record, "image": pictures} if isinstance(record, dict) else record
            if "txt" in self.members[key]:
                caption = self.read(key, "txt").decode()
                turns = [{"from": "human", "value": IMAGE}, {"from": "gpt", "value": caption}]
                return {"image": pictures, "conversations": turns}
        except (ValueError, RecursionError) as error:
            raise BadRow(f"not readable ({error})") from None
        raise BadRow("a picture without .json or .txt")

    def find(self, name: str) -> Source:
        folder, _, file = name.rpartition("/")
        key, _, suffix = file.partition(".")
        return self.read(f"{folder}/{key}", suffix)


class JoinedRows(Rows):
    """Several data sets one after another."""

    def __init__(self, parts: list[Rows], seed: int = 0, max_bad: float = 0.01) -> None:
        self.parts = parts
        self.starts = np.cumsum([0] + [len(part) for part in parts])
        super().__init__(int(self.starts[-1]), seed, max_bad)

    def part(self, i: int) -> tuple[Rows, int]:
        number = int(np.searchsorted(self.starts, i, side="right")) - 1
        return self.parts[number], i - int(self.starts[number])

    def row(self, i: int) -> Row:
        part, place = self.part(i)
        row = part.row(place)
        row.number = i
        return row

    def where(self, i: int) -> str:
        part, place = self.part(i)
        return part.where(place)

    def fingerprint(self) -> list[Any]:
        return [part.fingerprint() for part in self.parts]


def open_rows(path: str | Path, folder: str | Path = "", seed: int = 0, max_bad: float = 0.01) -> Rows:
    """A LLaVA file (.json, .jsonl) or a tar of pairs; picture names are relative to `folder` (default: beside
    it).

    Raises UserError where the file is missing, empty, of another kind, or broken as a whole.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix == ".tar":
        return TarRows(path, seed, max_bad)
    if path.suffix in (".json", ".jsonl"):
        return JsonRows(path, Path(folder) if folder else path.parent, seed, max_bad)
    raise UserError(f"{path}: expected .json, .jsonl or .tar")


def scan(rows: Rows, measure: Callable[[Row], int], within: range) -> tuple[np.ndarray, np.ndarray]:
    """Length and number of pictures of every row; a broken row is reported and has length 0, as have those
    that are not `within`.

    `measure` gives a row's length; it need not be exact, since it only sorts rows into batches.
    """
    lengths, pictures = np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64)
    for i in within:
        try:
            row = rows.row(i)
            lengths[i], pictures[i] = max(1, measure(row)), len(row.pictures)
        except BadRow as error:
            rows.report(i, str(error))
    return lengths, pictures


def plan_epoch(
    lengths: np.ndarray, pictures: np.ndarray, batch_size: int, seed: int, epoch: int
) -> list[np.ndarray]:
    """The batches of one epoch: all with pictures or all without, of similar length, in random order.

    Rows are shuffled, cut into pools of 50 batches, sorted by length inside a pool, and cut into batches
    (LLaVA's `group_by_modality_length`, about a quarter faster than mixing). The longest batch comes first,
    so that memory runs out at once or never. Left-over rows of both kinds share the last batches, the very
    last filled up from the front. Depends on nothing but its arguments: a resumed run recomputes it.
    """
    generator = np.random.default_rng((seed, epoch))
    batches, rest = [], []
    for kind in (pictures > 0, pictures == 0):
        rows = generator.permutation(np.flatnonzero(kind & (lengths > 0)))
        whole = len(rows) // batch_size * batch_size
        for start in range(0, whole, 50 * batch_size):
            pool = rows[start : min(start + 50 * batch_size, whole)]
            pool = pool[np.argsort(-lengths[pool], kind="stable")]
            batches += list(pool.reshape(-1, batch_size))
        rest.append(rows[whole:])
    left = np.concatenate(rest)
    if len(left):
        everything = np.concatenate([left, *batches])
        left = np.resize(everything, -(-len(left) // batch_size) * batch_size)
        batches += list(left.reshape(-1, batch_size))
    order = generator.permutation(len(batches))
    longest = int(np.argmax([lengths[batches[i]].sum() for i in order]))
    order[[0, longest]] = order[[longest, 0]]
    return [batches[i] for i in order]


def check_data(rows: Rows) -> dict[str, int]:
    """Open every row and picture, name each broken one, and count: the figures of `--check_data`."""
    rows.max_bad = 1.0
    counts: Counter[str] = Counter(rows=len(rows))
    for i in tqdm(range(len(rows)), disable=not sys.stderr.isatty(), desc="checking"):
        try:
            row = rows.row(i)
            for source in row.pictures:
                load_picture(source)
        except (BadRow, BadPicture) as error:
            rows.report(i, str(error))
            continue
        counts["pictures"] += len(row.pictures)
        counts["text-only rows"] += not row.pictures
        counts["turns"] += len(row.messages) // 2
    counts["broken rows"] = len(rows.bad)
    return dict(counts)
