"""Tokenizers against a naive trainer and the reference libraries; extension, hostile text and files."""

import argparse
import base64
import importlib.util
import inspect
import json
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import regex
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st

from core.config import UsageError, UserError
from data.bpe import apply_merges
from data.tokenizer import (
    GPT2_PATTERN,
    PATTERN,
    SPECIAL_TOKENS,
    BytePairTokenizer,
    LibraryTokenizer,
    Tokenizer,
    extend_tokenizer,
    load_tokenizer,
    main,
    train_tokenizer,
)
from data.tokenizer_files import to_chars

ENGLISH = """It was the best of times; it was the worst of times, and nobody's clock agreed with another's.
    "Well," said the miller, "12,345 sacks at 7 each come to 86,415." He wrote it down twice.
def count(sacks, price=7):
    # tabs and spaces
\tif not sacks:
\t\treturn 0
    return sum(price * sack for sack in sacks)  # == 86415
""" * 3  # fmt: skip
CHINESE = (
    """今天天气很好，我们去公园散步。公园里有很多人，有的人在散步，有的人在唱歌。
图书馆在公园旁边，我们可以去图书馆看书。看书以后我们回家吃饭，今天吃面条和饺子。
"""
    * 3
)
HOSTILE = [
    "",
    " ",
    "\n\n\n  \t x",
    "    four  two   three",
    "don't DON'T it's 'self'",
    "a" * 300,
    " " * 300 + "x",
    "3.14159 1000000 ½ ٣ Ⅷ",
    "世界，你好！　全角",
    "😀👩‍👩‍👧🇨🇳 \u200d\ufeff\u0000\x07",
    "é e\u0301 ŻÓŁW ſ K straße",
    "\r\n\r \x85 \u2028 \u00a0 \u3000",
    "</s><s><eom><|endoftext|> <pad>",
    "\ud800",
]


@pytest.fixture(scope="module")
def ours() -> BytePairTokenizer:
    return train_tokenizer([ENGLISH], 400)


def automatic(tokenizer: Tokenizer, folder: Path):
    """The saved tokenizer as transformers loads it."""
    tokenizer.save(folder)
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


def their_ids(theirs, text: str) -> list[int]:
    return theirs.encode(text, add_special_tokens=False, split_special_tokens=True)


# Training


def naive_merges(texts: list[str], n_merges: int) -> list[bytes]:
    """Count all pairs anew for each merge; ties to the smaller ids."""
    names = [bytes([byte]) for byte in range(256)]
    words = [list(word.encode()) for text in texts for word in regex.findall(PATTERN, text)]
    for _ in range(n_merges):
        counts: dict[tuple[int, int], int] = {}
        for word in words:
            for pair in zip(word, word[1:], strict=False):
                counts[pair] = counts.get(pair, 0) + 1
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        new = len(names)
        names.append(names[best[0]] + names[best[1]])
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [new]
                i += 1
    return names


def test_training_equals_the_naive_trainer() -> None:
    texts = [ENGLISH, CHINESE, "aaaa aaaaaaa aaa bbbbbb abababab aabaab"]
    tokenizer = train_tokenizer(texts, 256 + 120 + len(SPECIAL_TOKENS))
    assert list(tokenizer.ranks) == naive_merges(texts, 120)


def test_training_does_not_depend_on_the_order_of_texts() -> None:
    texts = [*ENGLISH.splitlines(), *CHINESE.splitlines()]
    assert train_tokenizer(texts, 500).ranks == train_tokenizer(texts[::-1], 500).ranks


def test_the_library_learns_the_same_strings() -> None:
    library = pytest.importorskip("tokenizers")
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    theirs = library.Tokenizer(library.models.BPE())
    split = Split(library.Regex(PATTERN), "isolated")
    theirs.pre_tokenizer = Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    texts = [Path(inspect.getsourcefile(module)).read_text() for module in (argparse, inspect, typing)]
    alphabet = ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(vocab_size=1000, show_progress=False, initial_alphabet=alphabet)
    theirs.train_from_iterator(texts, trainer)
    ours = {to_chars(token) for token in train_tokenizer(texts, 1001, special_tokens=("</s>",)).ranks}
    # Equally frequent pairs may be taken in another order, so that the last few differ.
    assert len(ours & set(theirs.get_vocab())) >= 990


def test_little_text_gives_fewer_merges_and_none_an_error() -> None:
    assert train_tokenizer(["ab ab"], 1000).vocab_size < 300
    with pytest.raises(UserError, match="no text"):
        train_tokenizer([], 1000)
    with pytest.raises(UserError, match="too small"):
        train_tokenizer(["x"], 200)


def test_layout_of_a_new_vocabulary(ours: BytePairTokenizer) -> None:
    assert ours.vocab_size == 400
    assert list(ours.special_tokens.values()) == list(range(400 - len(SPECIAL_TOKENS), 400))
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == tuple(
        ours.special_tokens[n] for n in ("<s>", "</s>", "<pad>")
    )
    assert ours.encode("127") == [ord("1"), ord("2"), ord("7")]  # a digit is a token


# Encoding


ANY = train_tokenizer([ENGLISH, CHINESE], 400)


@settings(max_examples=200, deadline=None)
@given(st.text())
@example("a \n b\t\t c  ")
def test_round_trip_of_any_text(text: str) -> None:
    tokenizer, lengths = ANY, ANY.byte_lengths()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert sum(lengths[i] for i in ids) == len(text.encode())


@pytest.mark.parametrize("text", [*HOSTILE[:-1], ENGLISH, CHINESE])
def test_encoding_is_plain_byte_pair_encoding(ours: BytePairTokenizer, text: str) -> None:
    words = regex.findall(PATTERN, text)
    assert ours.encode(text) == [
        ours.ranks[t] for word in words for t in apply_merges(word.encode(), ours.ranks)
    ]
    assert ours.encode_many([text, text]) == [ours.encode(text)] * 2


def test_endless_white_space(ours: BytePairTokenizer) -> None:
    text = "a" + " " * 1_000_000 + "\n" * 500_000 + "b"
    assert ours.decode(ours.encode(text)) == text


def test_broken_bytes_decode_to_the_replacement_character(ours: BytePairTokenizer) -> None:
    assert ours.decode([0xE4, 0xBD]) == "\ufffd"
    assert ours.decode([0xE4, 0xBD, 0xA0]) == "你"
    assert ours.decode(ours.encode("\ud800")) == "\ufffd"


def test_automatic_tokenizer_gives_the_same_ids(ours: BytePairTokenizer, tmp_path: Path) -> None:
    theirs = automatic(ours, tmp_path)
    for text in [*HOSTILE[:-1], ENGLISH, CHINESE]:
        assert their_ids(theirs, text) == ours.encode(text), text
        assert theirs.decode(ours.encode(text)) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        ours.bos_id,
        ours.eos_id,
        ours.pad_id,
    )
    assert theirs.convert_tokens_to_ids("<eom>") == ours.special_tokens["<eom>"]
    again = load_tokenizer(tmp_path)
    assert (again.fingerprint, again.special_tokens) == (ours.fingerprint, ours.special_tokens)


def test_chat_template_is_saved(ours: BytePairTokenizer, tmp_path: Path) -> None:
    ours = train_tokenizer(
        [ENGLISH], 300, chat_template="{% for m in messages %}{{ m.content }}<eom>{% endfor %}"
    )
    theirs = automatic(ours, tmp_path)
    assert theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi<eom>"
    assert load_tokenizer(tmp_path).chat_template == ours.chat_template


# Special tokens never come from a text


def assert_no_special(tokenizer: Tokenizer) -> None:
    special = set(tokenizer.special_tokens.values())
    for name in tokenizer.special_tokens:
        for text in (name, f"a{name}b", f" {name} ", name * 3, name[:2] + name):
            assert not special & set(tokenizer.encode(text)), text
    assert tokenizer.decode([tokenizer.eos_id]) in tokenizer.special_tokens


def test_special_tokens_of_every_kind(ours: BytePairTokenizer, real_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    pytest.importorskip("tokenizers")
    mistral = load_tokenizer(real_data / "tokenizers" / "mistral-v1")
    mistral.save(tmp_path)
    for tokenizer in (
        ours,
        mistral,
        load_tokenizer(tmp_path),
        load_tokenizer(real_data / "tokenizers" / "gpt2"),
    ):
        assert_no_special(tokenizer)


# Extension


@pytest.fixture(scope="module")
def extended(ours: BytePairTokenizer) -> BytePairTokenizer:
    return extend_tokenizer(ours, [CHINESE + "LibreOffice是软件。LibreOffice是软件。"], 60)


def test_extension_leaves_old_ids_alone(ours: BytePairTokenizer, extended: BytePairTokenizer) -> None:
    assert extended.special_tokens == ours.special_tokens
    assert list(extended.ranks.items())[: len(ours.ranks)] == list(ours.ranks.items())
    new = [token_id for token_id in extended.ranks.values() if token_id >= ours.vocab_size]
    assert new == list(range(ours.vocab_size, extended.vocab_size)) and len(new) > 40
    assert not any(extended.token_bytes(token_id).isascii() for token_id in new)
    for text in (
        ENGLISH,
        "LibreOffice LibreOffice",
        *[t for t in HOSTILE[:-1] if max(t, default="") < "\u2e80"],
    ):
        assert extended.encode(text) == ours.encode(text)
    assert len(extended.encode(CHINESE)) < 0.5 * len(ours.encode(CHINESE))
    for token_id in new:  # what a new row of an embedding can be made of
        assert ours.decode_bytes(ours.encode_bytes(extended.token_bytes(token_id))) == extended.token_bytes(
            token_id
        )


EXTENDED = extend_tokenizer(ANY, ["“你好”，世界！—今天…" * 3, CHINESE], 300)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(max_codepoint=0x2E7F, exclude_categories=["Cs"])))
@example("“quoted” — and… é")
def test_extension_leaves_the_encoding_of_lower_characters_alone(text: str) -> None:
    assert EXTENDED.encode(text) == ANY.encode(text)


def test_extended_vocabulary_in_other_hands(extended: BytePairTokenizer, tmp_path: Path) -> None:
    """New ids lie behind the special tokens; the file must keep both where they are. Also after a second
    round."""
    twice = extend_tokenizer(extended, ["größer größer größere Größe"], 10, first_char="\u0080")
    russian = extend_tokenizer(twice, ["больше больше большая"], 10, first_char="\u0400")
    for number, tokenizer in enumerate((extended, twice, russian)):
        theirs = automatic(tokenizer, tmp_path / str(number))
        for text in [*HOSTILE[:-1], CHINESE, ENGLISH, "größer", "больше"]:
            assert their_ids(theirs, text) == tokenizer.encode(text)
        assert theirs.eos_token_id == tokenizer.eos_id
        assert load_tokenizer(tmp_path / str(number)).fingerprint == tokenizer.fingerprint
    assert len(twice.encode("größer")) < len(extended.encode("größer"))
    assert len(russian.encode("больше")) < len(twice.encode("больше"))


def test_extension_on_real_chinese(real_data: Path) -> None:
    """4k English vocabulary + 2k merges: at least 1.5 times the bytes per token on held-out Chinese."""

    def texts(language: str) -> list[str]:
        file = real_data / "text" / f"libreoffice_help.{language}.jsonl"
        return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]

    english, chinese = texts("en"), texts("zh")
    old = train_tokenizer(english[:400], 4096)
    new = extend_tokenizer(old, chinese[:400], 2000)
    held_out = chinese[1600:]
    assert sum(map(len, map(old.encode, held_out))) > 1.5 * sum(map(len, map(new.encode, held_out)))
    assert all(old.encode(text) == new.encode(text) for text in english if max(text) < "\u2e80")


# Published vocabularies


def test_gpt2(real_data: Path, tmp_path: Path) -> None:
    library = pytest.importorskip("tokenizers")
    folder = real_data / "tokenizers" / "gpt2"
    ours = load_tokenizer(folder)
    reference = library.implementations.ByteLevelBPETokenizer(
        str(folder / "encoder.json"), str(folder / "vocab.bpe")
    )
    theirs = automatic(ours, tmp_path)
    for text in [*HOSTILE[:-1], ENGLISH, CHINESE]:
        if "<|endoftext|>" not in text:
            assert ours.encode(text) == reference.encode(text).ids, text
        assert their_ids(theirs, text) == ours.encode(text), text
        assert ours.decode(ours.encode(text)) == text
    assert ours.encode("Hello world") == [15496, 995]
    assert (ours.vocab_size, ours.eos_id, ours.bos_id, ours.pad_id) == (50257, 50256, None, None)


@pytest.mark.parametrize("name", ["tokenizers/mistral-v1", "stories260k"])
def test_sentencepiece(name: str, real_data: Path, tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    ours = load_tokenizer(real_data / name)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(real_data / name / "tokenizer.model"))
    theirs = automatic(ours, tmp_path)
    library = load_tokenizer(tmp_path)
    assert isinstance(library, LibraryTokenizer)
    for text in [*HOSTILE[:-1], ENGLISH, CHINESE]:
        ids = reference.encode(text)
        assert ours.encode(text) == ids
        assert their_ids(theirs, text) == ids, text
        assert library.encode(text) == ids
        assert ours.decode(ids) == library.decode(ids)
        assert ours.decode_bytes(ids) == library.decode_bytes(ids)
        assert ours.decode_bytes(ids[:3]) + ours.decode_bytes(ids[3:]) == ours.decode_bytes(ids)
    assert ours.decode(ours.encode("Hello 世界")) == "Hello 世界"
    for tokenizer in (ours, library):
        halves = "a\ud83d\ude00b\ud800"
        assert (
            tokenizer.encode(halves) == tokenizer.encode("a😀b\ufffd") == tokenizer.encode_many([halves])[0]
        )
    assert (ours.bos_id, ours.eos_id) == (library.bos_id, library.eos_id) == (1, 2)


def test_pad_added_beside_a_model_file(real_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    (tmp_path / "tokenizer.model").write_bytes(
        (real_data / "tokenizers/mistral-v1/tokenizer.model").read_bytes()
    )
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 32000}')
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": {"content": "<pad>"}}')
    ours = load_tokenizer(tmp_path)
    assert (ours.vocab_size, ours.pad_id, ours.eos_id) == (32001, 32000, 2)
    assert ours.decode([32000]) == "<pad>"
    assert automatic(ours, tmp_path / "saved").pad_token_id == 32000


def write_moss_like(folder: Path) -> BytePairTokenizer:
    """GPT-2's two files with CodeGen's runs of white space and MOSS's markers."""
    base = train_tokenizer([ENGLISH, CHINESE], 500, special_tokens=("<|endoftext|>",), pattern=GPT2_PATTERN)
    base.save(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    runs = [" " * n for n in range(31, 1, -1)] + ["\t" * n for n in range(9, 1, -1)]
    added = {text: 500 + i for i, text in enumerate([*runs, "<eoh>", "<eom>", "<eot>", "<eoc>", "<eor>"])}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<eom>", "bos_token": "<|endoftext|>"}')
    return base


def test_moss_type_is_lossless_and_takes_the_longest_run(tmp_path: Path) -> None:
    write_moss_like(tmp_path)
    ours = load_tokenizer(tmp_path)
    assert isinstance(ours, BytePairTokenizer) and len(ours.whitespace) == 38
    assert ours.special_tokens == {
        "<|endoftext|>": 499,
        "<eoh>": 538,
        "<eom>": 539,
        "<eot>": 540,
        "<eoc>": 541,
        "<eor>": 542,
    }
    assert (ours.eos_id, ours.bos_id, ours.vocab_size) == (539, 499, 543)
    assert ours.encode(" " * 31) == [500] and ours.encode(" " * 33) == [500, 529]
    theirs = automatic(ours, tmp_path / "saved")
    for text in [*HOSTILE[:-1], ENGLISH, CHINESE]:
        assert ours.decode(ours.encode(text)) == text
        assert their_ids(theirs, text) == ours.encode(text), text
    assert load_tokenizer(tmp_path / "saved").fingerprint == ours.fingerprint
    assert_no_special(ours)


def test_moss_type_compat_mode(real_data: Path, tmp_path: Path) -> None:
    """Ids made by transformers 4.25.1, whose GPT2Tokenizer is MOSS's, on GPT-2's files with these runs."""
    gpt2 = real_data / "tokenizers" / "gpt2"
    (tmp_path / "vocab.json").write_bytes((gpt2 / "encoder.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes((gpt2 / "vocab.bpe").read_bytes())
    runs = [" " * n for n in range(31, 1, -1)] + ["\t" * n for n in range(9, 1, -1)]
    (tmp_path / "added_tokens.json").write_text(json.dumps({run: 50257 + i for i, run in enumerate(runs)}))
    compat = load_tokenizer(tmp_path, mode="compat")
    golden = {
        "def f(x):\n    if x:\n        return 1\n": [
            4299,
            277,
            7,
            87,
            2599,
            50284,
            361,
            2124,
            25,
            50280,
            7783,
            352,
            198,
        ],
        "a  b": [64, 50286, 65],
        "a   \n  b": [64, 50285, 50286, 65],
        " " * 40 + "x": [50257, 87],
        "\t\t\tx\t\t y": [50293, 87, 50294, 88],
        "x \n\t\t\n    y  ": [87, 50294, 50284, 88, 50286],
        "  \t\t  z": [50286, 50286, 89],
    }
    for text, ids in golden.items():
        assert compat.encode(text) == ids
    lossless = load_tokenizer(tmp_path)
    assert all(lossless.decode(lossless.encode(text)) == text for text in golden)
    assert lossless.fingerprint != compat.fingerprint


def test_ids_out_of_merge_order_go_through_the_library(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    base = write_moss_like(tmp_path)
    (tmp_path / "added_tokens.json").unlink()
    (tmp_path / "special_tokens_map.json").unlink()
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    renumbered = {token: 499 - token_id for token, token_id in vocab.items()}
    (tmp_path / "vocab.json").write_text(json.dumps(renumbered))
    ours = load_tokenizer(tmp_path)
    assert isinstance(ours, LibraryTokenizer)
    for text in [*HOSTILE[:-1], ENGLISH, CHINESE]:
        assert ours.encode(text) == [499 - token_id for token_id in base.encode(text)]
        assert ours.decode(ours.encode(text)) == text
    assert ours.eos_id == 0
    assert_no_special(ours)


def test_foreign_tokenizer_json(tmp_path: Path) -> None:
    """A unigram model, which only the library can run; saved as it was."""
    library = pytest.importorskip("tokenizers")
    theirs = library.Tokenizer(library.models.Unigram())
    theirs.pre_tokenizer = library.pre_tokenizers.Metaspace()
    theirs.decoder = library.decoders.Metaspace()
    special = ["<unk>", "</s>"]
    trainer = library.trainers.UnigramTrainer(
        vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    theirs.train_from_iterator(ENGLISH.splitlines(), trainer)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path / "tokenizer.json")
    ids = theirs.encode("the best of times", add_special_tokens=False).ids
    assert isinstance(ours, LibraryTokenizer) and ours.encode("the best of times") == ids
    assert ours.encode_many(["the best", "of times"]) == [ours.encode("the best"), ours.encode("of times")]
    assert ours.decode(ids) == "the best of times"
    assert ours.eos_id == 1 and 1 not in ours.encode("a </s> b")
    ours.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").fingerprint == ours.fingerprint


def test_rank_file(ours: BytePairTokenizer, tmp_path: Path) -> None:
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ours.ranks.items()]
    file = tmp_path / "some.tiktoken"
    file.write_text("\n".join(lines))
    loaded = load_tokenizer(file, pattern=PATTERN)
    assert loaded.encode(ENGLISH) == ours.encode(ENGLISH) and loaded.eos_id == len(lines)
    with pytest.raises(UserError, match="pattern"):
        load_tokenizer(file)
    (tmp_path / "cl100k.tiktoken").write_text("\n".join([*lines, "!!! x"]))
    with pytest.raises(UserError, match=f"cl100k.tiktoken:{len(lines) + 1}: "):
        load_tokenizer(tmp_path / "cl100k.tiktoken")


# Bad files


def test_bad_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no tokenizer in this folder"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{\n broken")
    with pytest.raises(UserError, match=r"tokenizer.json:2: not JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="added_tokens"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match="merges.txt: missing"):
        load_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(UserError, match="do not fit together"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    if importlib.util.find_spec("sentencepiece"):
        with pytest.raises(UserError, match="not a SentencePiece model"):
            load_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match="pip install sentencepiece"):
        load_tokenizer(tmp_path)


def test_damaged_vocabulary_is_not_saved(ours: BytePairTokenizer, tmp_path: Path) -> None:
    damaged = BytePairTokenizer({**ours.ranks, b"qqq": 1000}, ours.special_tokens, settings=ours.settings)
    with pytest.raises(UserError, match="damaged"):
        damaged.save(tmp_path)


# Command line


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def command(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["data/tokenizer.py", *arguments])
        main()

    (tmp_path / "en.txt").write_text(ENGLISH)
    (tmp_path / "zh.jsonl").write_text(json.dumps({"text": CHINESE}))
    command("train", "--data", str(tmp_path / "en.txt"), "--vocab_size", "350", "--out", str(tmp_path / "a"))
    assert "350 ids" in capsys.readouterr().out
    options = ("--tokenizer", str(tmp_path / "a"), "--data", str(tmp_path / "zh.jsonl"), "--n_merges", "20")
    command("extend", *options, "--out", str(tmp_path / "b"))
    assert load_tokenizer(tmp_path / "b").vocab_size == 370
    for wrong in (
        ("trane",),
        ("train", "--vocab", "9"),
        ("train", "--data", "nowhere", "--out", "x"),
        ("extend",),
    ):
        with pytest.raises(UsageError):
            command(*wrong)
    (tmp_path / "zh.jsonl").write_text("broken")
    with pytest.raises(UserError, match="zh.jsonl:1: "):
        command("train", "--data", str(tmp_path / "zh.jsonl"), "--out", str(tmp_path / "c"))


def test_command_as_a_script() -> None:
    line = [sys.executable, "data/tokenizer.py", "trane"]
    wrong = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert (
        wrong.returncode == 2
        and wrong.stderr.startswith("error: expected `train`")
        and wrong.stderr.count("\n") == 1
    )
