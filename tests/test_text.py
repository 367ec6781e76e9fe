"""From documents to batches: files, errors, drills, streaming from the hub, and what batches promise."""

import gzip
import hashlib
import io
import json
import re
import subprocess
import sys
import types
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT

import data.sources
import data.text
from core.config import UsageError, UserError
from data.batches import BLOCK, Stream, quotas
from data.drills import catalogues, chinese_number, drills, english_number, read_catalogue
from data.sources import (
    BadRecord,
    HubUnreachable,
    cut,
    docstrings,
    documents,
    held_out_packages,
    package_of,
    parse_source,
    python_code,
    python_docs,
    python_files,
)
from data.text import Corpus, PackedBatches, prepare, val_batches
from data.tokenizer import Tokenizer, train_tokenizer
from kernels import make_bounds


def story(number: int) -> str:
    """A text of its own that passes the filters."""
    seed = hashlib.sha256(str(number).encode()).hexdigest()
    names = [seed[i : i + 5].translate(str.maketrans("0123456789", "ghijklmnop")) for i in range(0, 60, 5)]
    pairs = zip(names, names[1:], strict=False)
    said = ", ".join(f"and {name} went with {other} to the house of {name}s" for name, other in pairs)
    return f"The story of {names[0]} is this, that in the year of {names[1]} it rained, {said}."


STORIES = [story(number) for number in range(300)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(STORIES[:50], 400)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOMOXIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_stories(file: Path, texts: list[str], key: str = "text") -> Path:
    file.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return file


# Words of --data


def test_parse_source(tmp_path: Path) -> None:
    file = write_stories(tmp_path / "my.file.jsonl", STORIES[:3])
    assert parse_source("drills:0.5").weight == 0.5 and parse_source("drills").weight == 1
    assert parse_source(f"{file}:3") == data.sources.Source(str(file), "my", 3.0)
    hub = parse_source("hub/allenai/c4/en/c4-train.*.json.gz:2")
    assert (hub.word, hub.weight) == ("hub/allenai/c4/en/c4-train.*.json.gz", 2.0) and "/" not in hub.name
    for word in ("drills:0", "drills:-1", "drills:nan", "nowhere.txt", "hub/only-one", "drils"):
        with pytest.raises(UsageError, match="--data"):
            parse_source(word)
    with pytest.raises(UsageError, match="did you mean drills"):
        parse_source("drils")


def test_two_sources_with_one_name(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_stories(tmp_path / folder / "x.jsonl", STORIES[:5])
    with pytest.raises(UsageError, match="two sources are called 'x'"):
        prepare((str(tmp_path / "a/x.jsonl"), str(tmp_path / "b/x.jsonl")), tokenizer)


# Preparation


def test_prepared_files_hold_the_documents(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write_stories(tmp_path / "stories.jsonl", [*STORIES, STORIES[0], "short"])
    corpus, _ = prepare((str(file),), tokenizer, val_fraction=0.1)
    entry = corpus.manifest["sources"][0]
    assert entry["filters"] == {"kept": 300, "duplicate": 1, "too short": 1}
    assert entry["languages"] == {"en": 300}
    texts = {}
    for split, streams in (("train", corpus.train), ("val", corpus.val)):
        stream = streams["stories"]
        told = entry[split]
        ids = [stream.tokens[a : a + n] for a, n in zip(stream.starts, stream.lengths, strict=True)]
        assert all(i[0] == tokenizer.bos_id and i[-1] == tokenizer.eos_id for i in ids)
        texts[split] = [tokenizer.decode(i[1:-1].tolist()) for i in ids]
        content = (corpus.folder / f"stories.{split}.bin").read_bytes()
        assert told["sha256"] == hashlib.sha256(content).hexdigest() and told["tokens"] * 2 == len(content)
        assert told["bytes"] == stream.bytes == sum(len(text.encode()) for text in texts[split])
        assert told["documents"] == len(ids)
    assert sorted(texts["train"] + texts["val"]) == sorted(STORIES)
    assert 10 <= len(texts["val"]) <= 60
    assert "stories" in corpus.table() and "duplicate 1" in corpus.table()


def test_prepared_once(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_stories(tmp_path / "stories.jsonl", STORIES[:40])
    first, _ = prepare((f"{file}:2",), tokenizer)
    monkeypatch.setattr(data.text, "build", None)
    again, _ = prepare((f"{file}:5",), tokenizer)  # the weight does not change the files
    assert again.folder == first.folder and again.fingerprint == first.fingerprint
    opened, loaded = prepare((str(first.folder),))  # a prepared folder is a source too
    assert opened.fingerprint == first.fingerprint and loaded.fingerprint == tokenizer.fingerprint
    assert opened.mixture((str(first.folder),)) == first.weights == {"stories": 2.0}
    assert opened.mixture((f"{file}:7",)) == {"stories": 7.0}
    monkeypatch.undo()
    monkeypatch.setenv("NANOMOXIN_CACHE", str(tmp_path / "cache"))
    write_stories(file, STORIES[:41])
    assert prepare((str(file),), tokenizer)[0].folder != first.folder


def test_tokenizer_is_trained_on_the_training_part(tmp_path: Path, cache: Path) -> None:
    file = write_stories(tmp_path / "stories.jsonl", STORIES)
    corpus, tokenizer = prepare((str(file),), vocab_size=350)
    assert tokenizer.vocab_size == 350
    other, same = prepare((str(file),), vocab_size=350, max_tokens=2000)
    assert same.fingerprint == tokenizer.fingerprint and other.folder != corpus.folder
    assert 2000 <= len(other.train["stories"].tokens) < 20_000
    assert sorted(path.name.partition("-")[0] for path in cache.iterdir()) == ["text", "text", "tokenizer"]


def test_interrupted_preparation_leaves_nothing(
    tmp_path: Path, tokenizer: Tokenizer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_stories(tmp_path / "stories.jsonl", STORIES[:40])

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.text.TokenWriter, "flush", full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        prepare((str(file),), tokenizer)
    assert not list(cache.iterdir())


def test_separate_validation_sources(tmp_path: Path, tokenizer: Tokenizer) -> None:
    train = write_stories(tmp_path / "train.jsonl", STORIES[:50])
    val = write_stories(tmp_path / "val.jsonl", STORIES[45:60])
    corpus, _ = prepare((str(train),), tokenizer, val_data=(str(val),))
    assert list(corpus.train) == ["train"] and list(corpus.val) == ["val"]
    assert len(corpus.val["val"].lengths) == 15
    assert len(corpus.train["train"].lengths) == 45  # what is in validation too does not stay in training


def test_decontamination(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write_stories(tmp_path / "stories.jsonl", STORIES[:40])
    exam = tmp_path / "exam.jsonl"
    exam.write_text(json.dumps({"question": {"stem": STORIES[7]}, "choices": ["no", STORIES[9]]}) + "\n")
    corpus, _ = prepare((str(file),), tokenizer, decontaminate=(str(exam),))
    assert corpus.manifest["sources"][0]["filters"] == {"kept": 38, "contaminated": 2}
    with pytest.raises(UsageError, match="--decontaminate"):
        prepare((str(file),), tokenizer, decontaminate=(str(tmp_path / "nowhere.jsonl"),))


def test_large_vocabularies_take_four_bytes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write_stories(tmp_path / "stories.jsonl", STORIES[:20])
    large = train_tokenizer(STORIES[:5], 300)
    large.special_tokens["</s>"] = large.eos_id = 70_000
    large.vocab_size = 70_001
    dtype = data.text.token_type(large)
    assert dtype is np.uint32 and data.text.token_type(tokenizer) is np.uint16
    writer = data.text.TokenWriter(tmp_path / "x", large)
    writer.add(STORIES[0])
    writer.close()
    assert np.fromfile(tmp_path / "x.bin", np.uint32)[-1] == 70_000
    assert file.exists()


# Kinds of files


def test_every_kind_of_file(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"content": text}) + "\n" for text in STORIES[:2]).encode()
    (tmp_path / "a.txt").write_text(STORIES[0])
    (tmp_path / "b.md").write_text("\ufeff" + STORIES[1])
    (tmp_path / "c.py").write_text("x = 1\n")
    (tmp_path / "d.jsonl").write_bytes(lines)
    (tmp_path / "e.json.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    found = list(documents(parse_source(str(tmp_path))))
    assert [d.text for d in found] == [STORIES[0], STORIES[1], "x = 1\n", *STORIES[:2], *STORIES[:2]]
    assert [d.kind for d in found] == ["", "", "code", "", "", "", ""]


def test_zstandard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zstandard = pytest.importorskip("zstandard")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in STORIES[:2]).encode()
    file = tmp_path / "a.jsonl.zst"
    file.write_bytes(zstandard.compress(lines))
    assert [d.text for d in documents(parse_source(str(file)))] == STORIES[:2]
    file.write_bytes(b"not zstandard")
    with pytest.raises(UserError, match="a.jsonl.zst: damaged"):
        list(documents(parse_source(str(file))))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(UserError, match="pip install zstandard"):
        list(documents(parse_source(str(file))))


def test_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a reader of the library's shape, since the library is not among the requirements."""

    class Value(str):
        def as_py(self) -> str:
            return str(self)

    class Table:
        def __init__(self, stream: io.BufferedReader) -> None:
            names = stream.read().decode().split()
            self.schema_arrow = types.SimpleNamespace(names=names)

        def iter_batches(self, batch_size: int, columns: list[str]) -> Any:
            assert columns == ["content"]
            yield types.SimpleNamespace(column=lambda index: [Value(text) for text in STORIES[:3]])

    file = tmp_path / "a.parquet"
    file.write_text("id content")
    monkeypatch.setitem(sys.modules, "pyarrow", types.ModuleType("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", types.SimpleNamespace(ParquetFile=Table))
    assert [d.text for d in documents(parse_source(str(file)))] == STORIES[:3]
    file.write_text("id words")
    with pytest.raises(UserError, match="no column `text` or `content`, only id, words"):
        list(documents(parse_source(str(file))))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match="pip install pyarrow"):
        list(documents(parse_source(str(file))))


def test_real_parquet(tmp_path: Path) -> None:
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(arrow.table({"id": [1, 2], "text": STORIES[:2]}), tmp_path / "a.parquet")
    assert [d.text for d in documents(parse_source(str(tmp_path / "a.parquet")))] == STORIES[:2]


def test_a_long_text_is_cut_at_line_ends(tmp_path: Path) -> None:
    text = "\n".join(STORIES)
    pieces = list(cut(text, 5000))
    assert "".join(pieces) == text and all(piece.endswith("\n") for piece in pieces[:-1]) and len(pieces) > 10
    (tmp_path / "long.txt").write_text(text)
    assert len(list(documents(parse_source(str(tmp_path / "long.txt"))))) >= 15


# Bad input


def test_bad_lines_stop_or_are_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write_stories(tmp_path / "stories.jsonl", STORIES[:20])
    with file.open("a") as lines:
        lines.write('{"text": "broken\n\n{"words": 1}\n{"text": 7}\n[1]\n')
    with file.open("ab") as lines:
        lines.write(b'{"text": "\xff"}\n')
    with pytest.raises(BadRecord, match=r"stories.jsonl:21: .*--skip_bad"):
        prepare((str(file),), tokenizer)
    corpus, _ = prepare((str(file),), tokenizer, skip_bad=True)
    assert corpus.manifest["sources"][0]["filters"] == {"kept": 20, "bad": 5}


def test_undecodable_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_bytes("good line\nand another\nbad \xff line".encode("latin-1"))
    with pytest.raises(UserError, match=r"a.txt:3: byte 26 is not UTF-8"):
        prepare((str(tmp_path / "a.txt"),), tokenizer)


def test_damaged_and_empty_files(tmp_path: Path, tokenizer: Tokenizer) -> None:
    whole = gzip.compress(json.dumps({"text": "x" * 5000}).encode())
    for name, content, message in (
        ("cut.jsonl.gz", whole[: len(whole) // 2], "damaged"),
        ("fake.jsonl.gz", b"plain", "damaged"),
        ("none.jsonl", b"", "it is empty"),
        ("short.jsonl", b'{"text": "too short"}\n', "too short: 1"),
        ("picture.png", b"x", "cannot read this kind of file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            prepare((str(tmp_path / name),), tokenizer)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="nothing to read"):
        prepare((str(tmp_path / "folder"),), tokenizer)


def test_damaged_prepared_folder(tmp_path: Path, tokenizer: Tokenizer) -> None:
    file = write_stories(tmp_path / "stories.jsonl", STORIES[:30])
    corpus, _ = prepare((str(file),), tokenizer, out=tmp_path / "made")
    with pytest.raises(UserError, match="another tokenizer"):
        Corpus(tmp_path / "made", train_tokenizer(STORIES[:9], 300))
    with pytest.raises(UserError, match="other options"):
        prepare((str(file),), tokenizer, out=tmp_path / "made", val_fraction=0.5)
    tokens = tmp_path / "made" / "stories.train.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"stories.train.bin: .* bytes, not .*delete"):
        prepare((str(file),), tokenizer, out=tmp_path / "made")
    (tmp_path / "made" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="manifest.json: cannot be read"):
        prepare((str(tmp_path / "made"),), tokenizer)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        prepare((str(file),), tokenizer, out=tmp_path / "taken")
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "mine"


# The embedded corpus


def test_whole_packages_are_held_out() -> None:
    packages = held_out_packages(0.02)
    sizes: dict[str, int] = {}
    for name, _, size in python_files():
        sizes[package_of(name)] = sizes.get(package_of(name), 0) + size
    assert 0.005 < sum(sizes[package] for package in packages) / sum(sizes.values()) <= 0.02
    assert packages == held_out_packages(0.02) and "torch" not in packages
    code, docs = list(islice(python_code(), 40)), list(islice(python_docs(), 40))
    assert {d.group for d in code + docs} <= set(sizes)
    assert not {d.text for d in code} & {d.text for d in docs}


def test_docstrings() -> None:
    function = 'def f():\n    r"""One.\n\n    Two:\n        3\n    """\n    x = """no"""\n'
    text = f'import os\n"""Module.\n\nMore."""\n{function}'
    assert docstrings(text) == ["Module.\n\nMore.", "One.\n\nTwo:\n    3"]
    assert docstrings('x = """open') == []


def test_embedded_corpus(tokenizer: Tokenizer) -> None:
    corpus, _ = prepare(("python-code:5", "python-docs:3", "drills:2"), tokenizer, max_tokens=20_000)
    for name, stream in corpus.train.items():
        assert len(stream.tokens) >= 20_000 and len(corpus.val[name].tokens) > 100
    assert corpus.weights == {"python-code": 5, "python-docs": 3, "drills": 2}
    bits = corpus.unigram_bits_per_byte()
    assert set(bits) == set(corpus.train) and all(1 < value < 8 for value in bits.values())


def test_drills_are_true_and_the_same_everywhere() -> None:
    some = list(islice(drills(), 2000))
    assert some[:50] == list(islice(drills(), 50))
    checked = 0
    for _, text in some:
        for left, sign, right, result in re.findall(r"^(\d+) ([-+*/%]) (\d+) = (\d+)$", text, re.MULTILINE):
            a, b, c = int(left), int(right), int(result)
            operations = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__truediv__}
            assert c == {**operations, "%": int.__mod__}[sign](a, b), text
            checked += 1
        for a, b, c in re.findall(r"(\d+)加(\d+)(?:等于多少？|等于|是|，我)(\d+)", text):
            assert int(a) + int(b) == int(c), text
            checked += 1
    assert checked > 1000
    languages = [bool(re.search("[\u4e00-\u9fff]", text)) for _, text in some]
    assert 0.3 < np.mean(languages) < 0.9


def test_number_names() -> None:
    assert [chinese_number(n) for n in (0, 10, 15, 20, 105, 110, 1005, 1010, 10_010, 12_345)] == [
        "零", "十", "十五", "二十", "一百零五",
        "一百一十", "一千零五", "一千零一十", "一万零一十", "一万二千三百四十五",
    ]  # fmt: skip
    assert english_number(12_345) == "twelve thousand three hundred and forty-five"
    assert [english_number(n) for n in (0, 13, 40, 99)] == ["zero", "thirteen", "forty", "ninety-nine"]


def test_message_catalogues(tmp_path: Path) -> None:
    """A file made by hand after the format's description: two messages, one of them with a plural."""
    originals, translations = (
        [b"", b"file\0files", b"Open"],
        ["头".encode(), "文件".encode(), "打开".encode()],
    )
    table = 28
    body, entries = b"", []
    for text in originals + translations:
        entries.append((len(text), table + 8 * 6 + len(body)))
        body += text + b"\0"
    header = np.array([0x950412DE, 0, 3, table, table + 24, 0, 0], "<u4").tobytes()
    content = header + np.array(entries, "<u4").tobytes() + body
    assert read_catalogue(content) == [("", "头"), ("file", "文件"), ("Open", "打开")]
    folder = tmp_path / "zh_CN" / "LC_MESSAGES"
    folder.mkdir(parents=True)
    (folder / "app.mo").write_bytes(content)
    assert list(catalogues((tmp_path,))) == [("app", "file\n文件\n\nOpen\n打开")]
    assert read_catalogue(b"something else") == []


# The hub


class FakeHub:
    """Files in memory, as the hub's file system shows them; remembers which were opened."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files, self.opened = files, []

    def find(self, place: str) -> list[str]:
        return [name for name in self.files if name.startswith(place)]

    def glob(self, pattern: str) -> list[str]:
        return [name for name in self.files if Path(name).match(pattern)]

    def open(self, name: str, mode: str) -> io.BytesIO:
        self.opened.append(name)
        return io.BytesIO(self.files[name])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    files = {
        f"datasets/me/set/part-{i}.jsonl.gz": gzip.compress(
            "".join(json.dumps({"text": text}) + "\n" for text in STORIES[50 * i : 50 * i + 50]).encode()
        )
        for i in range(6)
    }
    files |= {"datasets/me/set/README.md": b"about", "datasets/me/set/zh/a.txt": STORIES[0].encode()}
    files |= {"datasets/me/set/test/a.txt": STORIES[1].encode(), "datasets/me/set/zh/validation.txt": b"x"}
    fake = FakeHub(files)
    for module in (data.sources, data.text):
        monkeypatch.setattr(module, "hub_filesystem", lambda repository: fake)
    return fake


def test_hub_set_is_streamed_and_cut(hub: FakeHub, tokenizer: Tokenizer) -> None:
    corpus, _ = prepare(("hub/me/set:2",), tokenizer, max_tokens=6000)
    assert corpus.weights == {"set": 2.0}
    assert hub.opened[0] == "datasets/me/set/part-0.jsonl.gz" and len(hub.opened) < 6
    assert len(corpus.train["set"].tokens) >= 6000
    whole, _ = prepare(("hub/me/set/part-*.jsonl.gz",), tokenizer)
    assert sum(whole.manifest["sources"][0][split]["documents"] for split in ("train", "val")) == 300
    assert [d.text for d in documents(parse_source("hub/me/set/zh"))] == [STORIES[0]]
    assert [d.text for d in documents(parse_source("hub/me/set/test"))] == [STORIES[1]]
    with pytest.raises(UserError, match="no .jsonl"):
        list(documents(parse_source("hub/me/set/nothing")))


def test_hub_unreachable(tokenizer: Tokenizer) -> None:
    """Tests run with the hub switched off, which fails like a missing network."""
    with pytest.raises(HubUnreachable, match="hub data set me/set cannot be reached") as caught:
        prepare(("hub/me/set",), tokenizer)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 1


def test_broken_connection(
    hub: FakeHub, tokenizer: Tokenizer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str, mode: str) -> None:
        raise ConnectionResetError("reset by peer")

    monkeypatch.setattr(hub, "open", broken)
    with pytest.raises(UserError, match="the connection broke .reset by peer") as caught:
        prepare(("hub/me/set",), tokenizer)
    assert not isinstance(caught.value, HubUnreachable) and not list(cache.iterdir())


def test_all_processes_hear_of_an_unreachable_hub(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SecondProcess:
        def sum(self, *values: float) -> list[float]:
            assert values == (False,)
            return [1.0]

    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(HubUnreachable, match="another process"):
        prepare(("hub/me/set",), tokenizer, run=SecondProcess())


# Batches


def stream_of(lengths: list[int], name: str = "s", dtype: type = np.uint16) -> Stream:
    """Documents whose tokens are all different: 0, 1, 2 ... over the whole stream."""
    sizes = np.array(lengths)
    tokens = np.arange(sizes.sum()).astype(dtype)
    return Stream(
        name, tokens, np.cumsum(sizes) - sizes, sizes, np.ones(70_000, np.int64), int(sizes.sum()), eos_id=7
    )


def fields_of(batch: data.text.Batch) -> list[torch.Tensor]:
    return [batch.tokens, batch.targets, batch.doc_ids, batch.positions]


LENGTHS = np.random.default_rng(0).integers(1, 90, 200).tolist()


def test_batch_is_a_pure_function_of_seed_and_step() -> None:
    streams = {"a": stream_of(LENGTHS, "a"), "b": stream_of([2500], "b")}
    weights = {"a": 3.0, "b": 1.0}
    used = PackedBatches(streams, weights, 32, 8, seed=1)
    for step in range(60):
        used.batch(step)
    for step in (0, 13, 59, 30):
        fresh = PackedBatches(streams, weights, 32, 8, seed=1)
        for one, two in zip(fields_of(used.batch(step)), fields_of(fresh.batch(step)), strict=True):
            assert torch.equal(one, two)
    other = PackedBatches(streams, weights, 32, 8, seed=2)
    assert not torch.equal(other.batch(0).tokens, used.batch(0).tokens)


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_the_global_batch(world_size: int) -> None:
    batches = PackedBatches({"a": stream_of(LENGTHS)}, {"a": 1.0}, 16, 8, seed=0)
    share = 8 // world_size
    for step in (0, 40):
        whole = batches.batch(step)
        parts = [batches.batch(step, slice(r * share, (r + 1) * share)) for r in range(world_size)]
        for i, field in enumerate(fields_of(whole)):
            assert torch.equal(field, torch.cat([fields_of(part)[i] for part in parts]))
        assert whole.bytes == sum(part.bytes for part in parts) == sum(part.bytes for part in whole.split(3))
        assert torch.equal(whole.rows(slice(2, 4)).targets, whole.targets[2:4])


def test_targets_positions_and_documents() -> None:
    stream = stream_of(LENGTHS)
    begins = set(stream.starts.tolist())
    batches = PackedBatches({"a": stream}, {"a": 1.0}, 32, 4, seed=0)
    for step in range(20):
        batch = batches.batch(step)
        whole, half = torch.int64, torch.int32
        assert [field.dtype for field in fields_of(batch)] == [whole, whole, half, whole]
        rows = zip(*(field.tolist() for field in fields_of(batch)), strict=True)
        for tokens, targets, doc_ids, positions in rows:
            for t in range(32):
                if t == 0 or tokens[t] in begins:
                    assert positions[t] == 0 and doc_ids[t] == (0 if t == 0 else doc_ids[t - 1] + 1)
                else:  # within a document the stream's tokens count up
                    assert tokens[t] == tokens[t - 1] + 1 and positions[t] == positions[t - 1] + 1
                    assert doc_ids[t] == doc_ids[t - 1]
                following = tokens[t + 1] if t < 31 else None
                if following is not None:
                    assert targets[t] == (-100 if following in begins else following)
                elif targets[t] != -100:
                    assert targets[t] == tokens[t] + 1
        make_bounds(32, doc_ids=batch.doc_ids)


def test_an_epoch_reads_every_window_once_and_the_next_in_another_order() -> None:
    stream = stream_of(LENGTHS)
    windows = (sum(LENGTHS) - 1) // 32
    batches = PackedBatches({"a": stream}, {"a": 1.0}, 32, 1, seed=0)
    epochs = [[batches.batch(e * windows + i).tokens[0] for i in range(windows)] for e in range(2)]
    for epoch in epochs:
        seen = torch.cat(epoch)
        assert len(seen.unique()) == len(seen) == windows * 32  # nothing twice
    assert not torch.equal(epochs[0][0], epochs[1][0])
    assert len(batches.layouts) == 2


def test_mixture_is_exact_and_even() -> None:
    streams = {name: stream_of([5000], name) for name in "abc"}
    for name, offset in (("b", 10_000), ("c", 20_000)):
        streams[name] = Stream(**{**vars(streams[name]), "tokens": streams[name].tokens + np.uint16(offset)})
    weights = {"a": 0.62, "b": 0.3, "c": 0.08}
    batches = PackedBatches(streams, weights, 16, 10, seed=3)
    drawn = dict.fromkeys(weights, 0)
    for step in range(130):
        for name, tokens in batches.ledger(step).items():
            assert tokens == drawn[name] * 16
            assert abs(drawn[name] - step * 10 * weights[name]) <= 3  # never far from its share
        first = batches.batch(step).tokens[:, 0]
        for name, low in (("a", 0), ("b", 10_000), ("c", 20_000)):
            drawn[name] += int(((first >= low) & (first < low + 10_000)).sum())
    assert batches.ledger(BLOCK // 10) == {"a": 620 * 16, "b": 300 * 16, "c": 80 * 16}


def test_quotas() -> None:
    assert quotas([1, 1, 1], 10).tolist() == [4, 3, 3]
    assert quotas([5, 3, 2], 1000).tolist() == [500, 300, 200]
    assert quotas([0.001, 1], 7).sum() == 7


def test_batches_refuse_what_cannot_be() -> None:
    streams = {"a": stream_of([20]), "b": stream_of(LENGTHS, "b")}
    with pytest.raises(UserError, match="s: 20 training tokens do not fill one sequence of 32"):
        PackedBatches(streams, {"a": 1.0}, 32, 4, seed=0)
    with pytest.raises(UsageError, match="no prepared source is called 'c'"):
        PackedBatches(streams, {"c": 1.0}, 8, 4, seed=0)
    with pytest.raises(UsageError, match="weight"):
        PackedBatches(streams, {"a": 1.0, "b": 1e-9}, 8, 4, seed=0)


def test_validation_batches_are_fixed_and_count_bytes() -> None:
    stream = stream_of(LENGTHS)
    stream.byte_lengths[:] = np.arange(len(stream.byte_lengths)) % 5
    batches = list(val_batches(stream, 32, 10**9, rows=8))
    again = list(val_batches(stream, 32, 10**9, rows=8))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(batches, again, strict=True))
    assert all(batch.tokens.shape == (8, 32) for batch in batches)
    targets = torch.cat([batch.targets for batch in batches])
    kept = targets[targets >= 0]
    assert len(kept.unique()) == len(kept) > 0.9 * sum(LENGTHS) - 32 - len(LENGTHS)
    assert sum(batch.bytes for batch in batches) == int((kept % 5).sum())
    assert len(list(val_batches(stream, 32, 500, rows=8))) == 2  # 15 windows


def test_validation_on_less_than_one_window() -> None:
    stream = stream_of([5, 4])
    (batch,) = val_batches(stream, 32, 1000, rows=2)
    assert batch.tokens.shape == (2, 32) and batch.bytes == 7 == int((batch.targets >= 0).sum())
    make_bounds(32, doc_ids=batch.doc_ids)


# Command line


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    file = write_stories(tmp_path / "stories.jsonl", STORIES[:60])
    arguments = ["--data", str(file), "--vocab_size", "300", "--out", str(tmp_path / "made")]
    monkeypatch.setattr(sys, "argv", ["data/text.py", *arguments])
    data.text.main()
    shown = capsys.readouterr().out
    assert "stories" in shown and "kept 60" in shown
    assert prepare((str(tmp_path / "made"),))[1].vocab_size == 300
    for wrong, code in (
        (("--data", "nowhere"), 2),
        (("--val_fraction", "x"), 2),
        (("--data", "hub/me/set"), 1),
    ):
        monkeypatch.setattr(sys, "argv", ["data/text.py", *wrong])
        with pytest.raises(UserError) as caught:
            data.text.main()
        assert caught.value.exit_code == code and "\n" not in str(caught.value)


def test_command_as_a_script() -> None:
    line = [sys.executable, "data/text.py", "--dta", "drills"]
    wrong = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1
    assert wrong.stderr.startswith("error: unknown argument '--dta', did you mean --data?")
