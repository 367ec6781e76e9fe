"""Pictures of every mode and every kind of damage, exact resizing, and rows that are found, refused and
replaced."""

import importlib
import io
import json
import os
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core.config import UserError
from data.pictures import (
    BadPicture,
    check_data,
    load_picture,
    open_rows,
    parse_row,
    plan_epoch,
    prepare,
    scan,
)
from model import VISION_PRESETS, normalise

RNG = np.random.default_rng(0)
NOISE = Image.fromarray(RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8))
MEANS = tuple(VISION_PRESETS[name].mean for name in ("dinov2-large", "siglip-so400m-224"))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, data: bytes, text: bytes = b"") -> bytes:
    """A PNG by hand, so that its header may claim anything."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + (chunk(b"zTXt", text) if text else b"") + chunk(b"IDAT", data)
    return b"\x89PNG\r\n\x1a\n" + chunks + chunk(b"IEND", b"")


JPEG, PNG, GIF, WEBP = (encoded(NOISE, kind) for kind in ("JPEG", "PNG", "GIF", "WEBP"))
BMP, TIFF, PPM = (encoded(NOISE, kind) for kind in ("BMP", "TIFF", "PPM"))
BROKEN: dict[str, bytes] = {
    "empty": b"",
    "one byte": b"\xff",
    "text": b"this is no picture\n",
    "html error page": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="4" height="4"></svg>',
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    "random": RNG.bytes(3000),
    "jpeg magic, then noise": JPEG[:4] + RNG.bytes(3000),
    "jpeg cut in half": JPEG[: len(JPEG) // 2],
    "jpeg two bytes short": JPEG[:-2],
    "jpeg header only": JPEG[:200],
    "png cut in half": PNG[: len(PNG) // 2],
    "png without its header's checksum": PNG[:29] + b"\0\0\0\0" + PNG[33:],
    "png header only": PNG[:33],
    "png of broken zlib": png(20, 20, b"not zlib at all"),
    "png with too little data": png(200, 200, zlib.compress(b"\0" * 100)),
    "png 0 wide": png(0, 20, zlib.compress(b"")),
    "png bomb": png(20_000, 20_000, zlib.compress(b"\0" * 100_000)),
    "png bomb just past the limit": png(9_460, 9_460, zlib.compress(b"\0" * 100_000)),
    "png text bomb": png(8, 8, zlib.compress(b"\0" * 200), b"x\0\0" + zlib.compress(b"\0" * 80_000_000)),
    "gif cut": GIF[: len(GIF) // 2],
    "gif header only": GIF[:13],
    "webp cut": WEBP[: len(WEBP) // 2],
    "bmp cut": BMP[: len(BMP) // 2],
    "tiff cut": TIFF[: len(TIFF) // 2],
    "ppm cut": PPM[: len(PPM) // 2],
    "ppm without numbers": b"P6\nwide high\n255\n" + b"\0" * 100,
    "ico of nothing": b"\0\0\1\0\1\0" + b"\0" * 16,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_picture_is_one_line(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(BROKEN[kind])
    for source in (path, BROKEN[kind]):
        with pytest.raises(BadPicture) as caught:
            load_picture(source)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert capfd.readouterr().err == ""  # no warnings from below


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (
        tmp_path,
        tmp_path / "pipe",
        tmp_path / "missing",
        tmp_path / ("x" * 300),
        tmp_path / "nul\0",
    ):
        with pytest.raises(BadPicture):
            load_picture(path)


def test_every_mode_becomes_the_colours_one_sees() -> None:
    def colour(image: Image.Image, kind: str, **options: object) -> tuple[int, ...]:
        return load_picture(encoded(image, kind, **options)).getpixel((1, 1))

    assert colour(Image.new("RGB", (4, 4), (10, 20, 30)), "PNG") == (10, 20, 30)
    assert colour(Image.new("L", (4, 4), 77), "PNG") == (77, 77, 77)
    assert colour(Image.new("1", (4, 4), 1), "PNG") == (255, 255, 255)
    # Hidden under full transparency is red; what one sees is white. Half of black on white is grey.
    assert colour(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "PNG") == (255, 255, 255)
    assert colour(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), "PNG") == (127, 127, 127)
    assert colour(Image.new("LA", (4, 4), (0, 0)), "PNG") == (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 10, 60])
    assert colour(palette, "PNG") == (200, 10, 60)
    assert colour(palette, "PNG", transparency=1) == (255, 255, 255)
    assert colour(palette, "GIF") == (200, 10, 60)
    assert colour(Image.new("RGB", (4, 4), (9, 9, 9)), "PNG", transparency=(9, 9, 9)) == (255, 255, 255)
    deep = Image.fromarray(np.full((4, 4), 0x80FF, np.uint16))
    assert deep.mode == "I;16"
    assert colour(deep, "PNG") == (128, 128, 128)  # `convert` alone would clip to 255
    assert colour(deep, "TIFF") == (128, 128, 128)
    assert colour(Image.fromarray(np.full((4, 4), 40_000, np.int32)), "TIFF") == (155, 155, 155)
    assert colour(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF") == (127, 127, 127)
    assert colour(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF") == (0, 0, 0)
    red, green, blue = colour(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")
    assert red > 250 and green < 5 and blue < 5
    first, second = Image.new("RGB", (4, 4), (0, 0, 200)), Image.new("RGB", (4, 4), (200, 0, 0))
    assert colour(first, "GIF", save_all=True, append_images=[second]) == (0, 0, 200)
    assert colour(first, "WEBP", save_all=True, append_images=[second], lossless=True) == (0, 0, 200)


def test_camera_orientation_is_obeyed_unless_told_otherwise() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    file = encoded(NOISE, "JPEG", exif=exif)
    assert load_picture(file).size == (40, 60)
    assert load_picture(file, turn_upright=False).size == (60, 40)


ODD_SIZES = [
    (1, 1),
    (3, 700),
    (224, 224),
    (223, 225),
    (640, 481),
    (337, 1001),
    (1001, 336),
    (225, 90),
    (97, 31),
]


def torchvision_transforms():
    real = torch.library.register_fake
    try:  # a torchvision built for CUDA cannot register its operators on a CPU torch

        def skipping(name, *arguments, **keywords):
            if isinstance(name, str) and name.startswith("torchvision::"):
                return lambda function: function
            return real(name, *arguments, **keywords)

        torch.library.register_fake = skipping
        return importlib.import_module("torchvision.transforms")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision cannot be imported here: {error}")
    finally:
        torch.library.register_fake = real


def noise(size: tuple[int, int]) -> Image.Image:
    """A picture whose bytes are given by a formula."""
    values = np.arange(size[0] * size[1] * 3, dtype=np.uint64)
    return Image.fromarray((values * values * 40_503 >> 7).astype(np.uint8).reshape(size[1], size[0], 3))


@pytest.mark.parametrize("resize", ["naive", "crop", "letterbox"])
def test_equals_torchvision_bit_for_bit(resize: str) -> None:
    T = torchvision_transforms()
    bicubic = T.InterpolationMode.BICUBIC
    for side in (224, 384):
        for size in ODD_SIZES:
            image = noise(size)
            ours = prepare(image, side, resize, MEANS)
            for i, name in enumerate(("dinov2-large", "siglip-so400m-224")):
                config = VISION_PRESETS[name]
                across, down = (int((max(size) - length) / 2) for length in size)
                fill = tuple(int(255 * value) for value in config.mean)
                steps = {
                    "naive": [T.Resize((side, side), interpolation=bicubic)],
                    "crop": [T.Resize(side, interpolation=bicubic), T.CenterCrop(side)],
                    "letterbox": [
                        T.Pad((across, down, across, down), fill=fill),
                        T.Resize(side, interpolation=bicubic),
                        T.CenterCrop(side),
                    ],
                }[resize]
                wanted = T.Compose([*steps, T.ToTensor(), T.Normalize(config.mean, config.std)])(image)
                assert torch.equal(normalise(ours[i : i + 1], config)[0], wanted), (side, size, name)


# CRC-32 of the two encoders' bytes, as torchvision 0.29.1 over Pillow 13.0.0 gives them for `noise`.
GOLDEN = {"naive": 1219539578, "crop": 3478019331, "letterbox": 2353087225}


@pytest.mark.parametrize("resize", ["naive", "crop", "letterbox"])
def test_equals_what_torchvision_gave(resize: str) -> None:
    crc = 0
    for size in ODD_SIZES:
        crc = zlib.crc32(prepare(noise(size), 224, resize, MEANS).numpy().tobytes(), crc)
    assert crc == GOLDEN[resize]


def test_very_long_pictures_do_not_fill_memory() -> None:
    long = Image.new("RGB", (20_000, 1))
    assert prepare(long, 224, "naive", MEANS).shape == (2, 3, 224, 224)
    for resize in ("crop", "letterbox"):
        with pytest.raises(BadPicture, match=f"20000 x 1 pixels: too long for --resize {resize}"):
            prepare(long, 224, resize, MEANS)


# Rows


def conversation(question: str = "<image>\nWhat is it?", answer: str = "A cat.", **fields: object) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"image": "good.png", "conversations": turns, **fields}


def words(record: dict) -> list[list]:
    row = parse_row(record, Path)
    contents = [message["content"] for message in row.messages]
    return [[c] if isinstance(c, str) else [p.get("text", p["type"]) for p in c] for c in contents]


def test_placeholders_stand_where_they_were_written() -> None:
    assert words(conversation("<image>\nWhat is it?")) == [["image", "What is it?"], ["A cat."]]
    assert words(conversation("What is it?\n<image>")) == [["What is it?", "image"], ["A cat."]]
    assert words(conversation("What is it?")) == [["image", "What is it?"], ["A cat."]]
    two = conversation("Is <image> like <image>?", image=["a.png", "b.png"])
    assert words(two) == [["Is", "image", "like", "image", "?"], ["A cat."]]
    assert [str(p) for p in parse_row(two, Path).pictures] == ["a.png", "b.png"]


def test_words_that_look_like_placeholders_stay_words() -> None:
    text_only = {"conversations": conversation("How do I write <image> in HTML?", "<image>")["conversations"]}
    assert words(text_only) == [["How do I write <image> in HTML?"], ["<image>"]]
    assert words(conversation(answer="I see <image>."))[1] == ["I see <image>."]


BAD_RECORDS: dict[str, object] = {
    "a number": 3,
    "a list": [1, 2],
    "null": None,
    "no conversations": {"image": "good.png"},
    "conversations is text": {"conversations": "hello"},
    "turns are text": {"conversations": ["hello", "there"]},
    "nobody speaks": {"conversations": []},
    "question only": {"conversations": [{"from": "human", "value": "Why?"}]},
    "empty answer": conversation(answer="  "),
    "answer only": {"conversations": [{"from": "gpt", "value": "Because."}]},
    "two questions in a row": {
        "conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]
    },
    "unknown speaker": {"conversations": [{"from": "tool", "value": "a"}, {"from": "gpt", "value": "b"}]},
    "value is a number": {"conversations": [{"from": "human", "value": 1}, {"from": "gpt", "value": "b"}]},
    "no value": {"conversations": [{"from": "human"}, {"from": "gpt", "value": "b"}]},
    "image is a number": conversation(image=7),
    "image is a list of numbers": conversation(image=[7]),
    "image without a name": conversation(image=[""]),
    "more placeholders than pictures": conversation("<image> <image>"),
    "fewer placeholders than pictures": conversation("<image>", image=["good.png", "good.png"]),
    "several pictures, no placeholder": conversation("Which?", image=["good.png", "good.png"]),
    "path above the folder": conversation(image="../../etc/passwd"),
    "absolute path": conversation(image="/etc/passwd"),
    "missing picture": conversation(image="nowhere.png"),
    "truncated picture": conversation(image="cut.png"),
    "one of two pictures missing": conversation("<image><image>", image=["good.png", "nowhere.png"]),
}
BAD_LINES: dict[str, bytes] = {
    "not JSON": b"{nonsense}",
    "line cut": json.dumps(conversation()).encode()[:40],
    "two objects on a line": b'{"a": 1} {"b": 2}',
    "not UTF-8": b'{"conversations": "\xff\xfe"}',
    "deeply nested": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "endless number": b'{"a": ' + b"9" * 10_000 + b"}",
    **{name: json.dumps(record).encode() for name, record in BAD_RECORDS.items()},
}


def damaged_set(folder: Path, good: int) -> Path:
    """All kinds of damage among good rows, one to a line."""
    (folder / "good.png").write_bytes(PNG)
    (folder / "cut.png").write_bytes(PNG[:100])
    lines = [json.dumps(conversation(answer=f"Cat {i}.")).encode() for i in range(good)]
    for i, line in enumerate(BAD_LINES.values()):
        lines.insert(2 * i, line)
    (folder / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n\n")
    return folder / "rows.jsonl"


def test_check_data_names_each_broken_row_once(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    assert len(BROKEN) >= 25 and len(BAD_LINES) >= 30
    path = damaged_set(tmp_path, good=40)
    counts = check_data(open_rows(path))
    lines = capfd.readouterr().err.splitlines()
    assert counts["rows"] == 40 + len(BAD_LINES) and counts["pictures"] == 40
    assert counts["broken rows"] == len(BAD_LINES) == len(lines)
    for i, line in enumerate(lines):
        assert line.startswith(f"{path}:{2 * i + 1}: "), line


def test_broken_rows_are_replaced_the_same_way_in_any_order(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    path = damaged_set(tmp_path, good=40)
    total = 40 + len(BAD_LINES)

    def open_all(row) -> str:
        return row.messages[1]["content"] + str([load_picture(p).size for p in row.pictures])

    chosen = []
    for order in (range(total), reversed(range(total)), [*range(30, total), *range(30)]):
        rows = open_rows(path, seed=1, max_bad=0.6)
        picked = {i: rows.fetch(i, open_all) for i in order}
        assert set(rows.bad) == set(range(0, 2 * len(BAD_LINES), 2)) and len(picked) == total
        chosen.append(picked)
    assert chosen[0] == chosen[1] == chosen[2]
    assert len(capfd.readouterr().err.splitlines()) == 3 * len(BAD_LINES)


def test_too_many_broken_rows_stop_the_run(tmp_path: Path) -> None:
    rows = open_rows(damaged_set(tmp_path, good=100), max_bad=0.05)
    allowed = int(0.05 * len(rows))
    with pytest.raises(UserError, match=f"{allowed + 1} of {len(rows)} rows are broken, more than 5.0%"):
        for i in range(len(rows)):
            rows.fetch(i, lambda row: row)
    assert len(rows.bad) == allowed + 1


def test_json_list_is_read_by_byte_offset(tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(PNG)
    records = [conversation(f'It says "{i}" {{[\\', f"第{i}", id=i) for i in range(5)]
    for name, text in (
        ("plain", json.dumps(records)),
        ("pretty", json.dumps(records, indent=2, ensure_ascii=False)),
        ("bom", "\ufeff" + json.dumps(records, ensure_ascii=False)),
        ("lines", "\n\n".join(json.dumps(record) for record in records)),
    ):
        path = tmp_path / f"{name}.json"
        path.write_text(text, encoding="utf-8")
        rows = open_rows(path)
        assert len(rows) == 5
        assert [rows.record(i) for i in (4, 0, 2)] == [records[i] for i in (4, 0, 2)]
        assert rows.row(3).pictures == [tmp_path / "good.png"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.json", b"", "empty file"),
        ("blank.jsonl", b"\n \n", "no rows"),
        ("nothing.json", b"[]", "no rows"),
        ("open.json", b'[{"a": 1},\n{"b": ', "open.json:2: the list is broken here or never closed"),
        ("cut.json", b'[{"a": 1},\n{"b": 2}', "cut.json:2: the list is broken"),
        ("mixed.json", b'[{"a": 1},\n3,\n{"b": 2}]', "mixed.json:1: expected a list of objects"),
        ("tail.json", b'[{"a": 1}] and more', "tail.json:1: the list is broken"),
        ("rows.csv", b"a,b\n", "expected .json, .jsonl or .tar"),
        ("noise.tar", b"no tar at all" * 100, "not an uncompressed tar"),
        ("squeezed.tar", b"\x1f\x8b\x08\0" + b"\0" * 600, "not an uncompressed tar"),
        ("void.tar", b"\0" * 10240, "no rows"),
    ],
)
def test_files_broken_as_a_whole(name: str, content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        open_rows(tmp_path / name)
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        open_rows(tmp_path / "absent.json")


def test_tar_of_pairs(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    members = {
        "a/1.png": PNG,
        "a/1.json": json.dumps({"conversations": conversation()["conversations"]}).encode(),
        "a/2.jpg": JPEG,
        "a/2.txt": "一只猫".encode(),
        "a/3.json": json.dumps({"conversations": conversation("Hi")["conversations"]}).encode(),
        "a/4.jpg": JPEG,  # nothing is said about it
        "a/5.jpg": JPEG[:50],
        "a/5.txt": b"cut",
        "a/6.txt": b"\xff\xfe",
    }
    path = tmp_path / "pairs.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    rows = open_rows(path)
    assert [len(rows.row(i).pictures) for i in range(3)] == [1, 1, 0]
    assert load_picture(rows.row(0).pictures[0]).size == (60, 40)
    assert rows.row(1).messages[0]["content"] == [{"type": "image"}]
    assert rows.row(1).messages[1]["content"] == "一只猫"
    counts = check_data(open_rows(path))
    assert counts["broken rows"] == 3 and counts["pictures"] == 2
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(":")[1] for line in lines] == ["a/4", "a/5", "a/6"]
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(UserError, match="cut short"):
        open_rows(path)


def test_batches_are_of_one_modality_and_similar_length(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    lengths, pictures = rng.integers(1, 500, 3000), (rng.random(3000) < 0.7).astype(int)
    lengths[::100] = 0  # broken rows
    batches = plan_epoch(lengths, pictures, 16, seed=0, epoch=0)
    assert {len(batch) for batch in batches} == {16}
    mixed = [batch for batch in batches if len(set(pictures[batch])) > 1]
    assert len(mixed) <= 2
    seen = np.concatenate(batches)
    assert set(seen) == set(np.flatnonzero(lengths)) and len(seen) - len(set(seen)) < 16
    assert lengths[batches[0]].sum() == max(lengths[batch].sum() for batch in batches)
    padding = sum((lengths[b].max() - lengths[b]).sum() for b in batches) / lengths[seen].sum()
    shuffled = rng.permutation(seen).reshape(-1, 16)
    assert padding < 0.25 * sum((lengths[b].max() - lengths[b]).sum() for b in shuffled) / lengths[seen].sum()
    again, other = (plan_epoch(lengths, pictures, 16, seed=0, epoch=epoch) for epoch in (0, 1))
    assert all((a == b).all() for a, b in zip(batches, again, strict=True))
    assert any((a != b).any() for a, b in zip(batches, other, strict=True))


def test_scan_measures_rows(tmp_path: Path) -> None:
    path = damaged_set(tmp_path, good=40)
    rows = open_rows(path, max_bad=1.0)
    lengths, pictures = scan(rows, lambda row: len(str(row.messages)), range(len(rows)))
    assert (lengths[1:40:2] > 0).all() and (pictures[1:40:2] == 1).all()
    # Pictures are opened only when they are used, so those that are missing or cut count as usable here.
    unopened = {"missing picture", "truncated picture", "one of two pictures missing"}
    broken = [2 * i for i, name in enumerate(BAD_LINES) if name not in unopened]
    assert sorted(rows.bad) == broken and not lengths[broken].any()
