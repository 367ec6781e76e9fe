"""Text to token ids and back: train a byte-level BPE, extend one, and load those of published models.

Byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) on bytes (GPT-2): text is cut into words by a
regular expression, each word starts as its bytes, and learned merges join neighbours, earliest-learned
first. Every text has an encoding, and decoding gives back exactly the same bytes.

Four kinds of published vocabulary load into one interface (`load_tokenizer`):

    folder or file                         runs through     class
    tokenizer.json, byte-level BPE         tiktoken         BytePairTokenizer
    vocab.json + merges.txt (GPT-2, MOSS)  tiktoken         BytePairTokenizer
    *.tiktoken rank file                   tiktoken         BytePairTokenizer
    tokenizer.model (Llama, Mistral)       sentencepiece    SentencePieceTokenizer
    any other tokenizer.json               tokenizers       LibraryTokenizer

Special tokens are only ever placed by code, through their ids: `encode` treats "</s>" in a text as four
ordinary characters, so nobody can end a turn or forge a role by writing the marker.

    python data/tokenizer.py train --data my_texts/ --vocab_size 8192 --out FOLDER
    python data/tokenizer.py extend --tokenizer FOLDER --data chinese.jsonl --n_merges 2000 --out FOLDER
"""

import base64
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import regex
import tiktoken

if __name__ == "__main__":  # run as a script, this folder is first on the path and must give way to the root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.config import UsageError, UserError, parse, run_main
from data.bpe import apply_merges, count_words, learn_merges, merges_of
from data.sources import BadRecord, documents, parse_source
from data.tokenizer_files import (
    BYTE_TO_CHAR,
    bpe_model,
    byte_level,
    optional_import,
    read_json,
    read_text,
    to_bytes,
    to_chars,
    tokenizer_json,
    write_json,
    write_text,
)

# How text is cut into words before merging; no merge crosses a cut. One character (a space, a quote, a
# bracket) may lead a run of letters, so " word", "_name" and "(x" are one word each. Digits stand alone: 7,
# 27 and 127 then share the token "7", place value is visible, and a small model learns to carry instead of
# memorising 1,000 pieces. A run of spaces leaves its last one to the word after it, which keeps indentation
# in one token.
PATTERN = (
    r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RANK_FILE_PATTERNS = {
    "gpt2": GPT2_PATTERN,
    "r50k": GPT2_PATTERN,
    "p50k": GPT2_PATTERN,
    "cl100k": CL100K_PATTERN,
}

# Ours: document start and end, padding; MOSS's turn markers (end of human, thoughts, commands, results,
# MOSS); the place of a picture; five quality tags for preference-aware training.
SPECIAL_TOKENS = (
    "<s>", "</s>", "<pad>", "<eoh>", "<eot>", "<eoc>", "<eor>", "<eom>", "<image>",
    "<quality_0>", "<quality_1>", "<quality_2>", "<quality_3>", "<quality_4>",
)  # fmt: skip


LONGEST_SPACE = 200_000  # characters of white space in a row that tiktoken is given at a time

Mode = Literal["lossless", "compat"]

# What is kept of a tokenizer_config.json; the rest is about the class that it was written for.
SETTINGS = ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template", "model_max_length")


class Tokenizer:
    """What every kind of tokenizer offers; the subclasses supply `encode`, `decode_bytes` and `save`."""

    special_tokens: dict[str, int]
    vocab_size: int  # highest id + 1, special tokens included
    bos_id: int | None
    eos_id: int
    pad_id: int | None
    chat_template: str | None

    def __init__(self, special_tokens: dict[str, int], vocab_size: int, settings: dict[str, Any]) -> None:
        """settings: the SETTINGS of tokenizer_config.json, those that are known."""
        self.special_tokens, self.vocab_size = special_tokens, vocab_size
        self.settings = {key: value for key, value in settings.items() if key in SETTINGS}
        self.names = {token_id: name for name, token_id in special_tokens.items()}
        roles = (special_tokens.get(settings.get(key)) for key in ("bos_token", "eos_token", "pad_token"))
        self.bos_id, eos_id, self.pad_id = roles
        if eos_id is None:
            some = ", ".join(special_tokens)[:200] or "none"
            raise UserError(
                f"the tokenizer names no end-of-text token (eos_token) among its special ones: {some}"
            )
        self.eos_id = eos_id
        self.chat_template = settings.get("chat_template")

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: no BOS, and never a special token, whatever the text says."""
        raise NotImplementedError

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """What the tokens stand for, special tokens as their names; of two lists joined, the bytes joined."""
        return b"".join(
            self.names[i].encode() if i in self.names else self.token_bytes(i) for i in map(int, ids)
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; bytes that are not whole UTF-8 characters become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one ordinary token; empty for special and unused ids."""
        raise NotImplementedError

    def byte_lengths(self) -> list[int]:
        """[vocab_size] how many bytes of text each id stands for, for losses in bits per byte."""
        return [len(self.token_bytes(token_id)) for token_id in range(self.vocab_size)]

    @property
    def fingerprint(self) -> str:
        """Equal for two tokenizers exactly if they give the same ids."""
        raise NotImplementedError

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers.AutoTokenizer reads."""
        raise NotImplementedError

    def save_settings(self, folder: Path) -> None:
        """tokenizer_config.json. The library's clean-up of spaces is off: it would alter decoded text."""
        fixed = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        settings = {**self.settings, **fixed, "chat_template": self.chat_template}
        for key, token_id in (
            ("bos_token", self.bos_id),
            ("eos_token", self.eos_id),
            ("pad_token", self.pad_id),
        ):
            settings[key] = self.names.get(token_id)
        write_json(folder / "tokenizer_config.json", {k: v for k, v in settings.items() if v is not None})


class BytePairTokenizer(Tokenizer):
    """Byte-level BPE, run by tiktoken.

    ranks: token bytes -> id, in the order the merges were learned; ids must grow in that order, but may leave
        gaps (an extended vocabulary has its special tokens there).
    whitespace: whole runs of spaces or tabs that are tokens of their own, as in CodeGen and MOSS: text -> id.
    mode: "lossless", or "compat" = as MOSS's released tokenizer, which drops white space beside such runs.
    """

    def __init__(
        self,
        ranks: dict[bytes, int],
        special_tokens: dict[str, int],
        pattern: str = PATTERN,
        settings: dict[str, Any] | None = None,
        whitespace: dict[str, int] | None = None,
        mode: Mode = "lossless",
    ) -> None:
        self.ranks, self.pattern, self.whitespace, self.mode = ranks, pattern, whitespace or {}, mode
        runs = {run.encode(): token_id for run, token_id in self.whitespace.items()}
        self.tokens = {token_id: token for token, token_id in (ranks | runs).items()}
        vocab_size = 1 + max(*self.tokens, *special_tokens.values())
        super().__init__(special_tokens, vocab_size, settings or {})
        # To tiktoken the runs are special tokens, for decoding. In encoding it would not take the longest.
        added = special_tokens | self.whitespace
        self.encoding = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens=added)
        longest_first = map(regex.escape, sorted(self.whitespace, key=len, reverse=True))
        self.run_pattern = regex.compile(f"({'|'.join(longest_first)})") if self.whitespace else None

    def encode(self, text: str) -> list[int]:
        if self.run_pattern is None:
            return self.encode_words(text)
        parts = [part for part in self.run_pattern.split(text) if part]
        if self.mode == "compat":
            parts = strip_beside_runs(parts, self.whitespace)
        ids: list[int] = []
        for part in parts:
            ids += [self.whitespace[part]] if part in self.whitespace else self.encode_words(part)
        return ids

    def encode_words(self, text: str) -> list[int]:
        """tiktoken recurses over white space: a run of a million would end the program, so it is cut."""
        cuts = [0, len(text)]
        if len(text) > LONGEST_SPACE:
            for run in regex.finditer(r"\s+", text):
                cuts += range(run.start() + LONGEST_SPACE, run.end(), LONGEST_SPACE)
        parts = (text[start:end] for start, end in pairwise(sorted(cuts)))
        return [token_id for part in parts for token_id in self.encoding.encode_ordinary(part)]

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """On all cores: tiktoken lets other threads run while it works."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(self.encode, texts))

    def encode_bytes(self, content: bytes) -> list[int]:
        """Ids of a byte string that may be part of a character, taken as one word."""
        return [self.ranks[part] for part in apply_merges(content, self.ranks)]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return self.encoding.decode_bytes(ids)

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokens.get(token_id, b"")

    @property
    def fingerprint(self) -> str:
        ranks = [(token.hex(), token_id) for token, token_id in self.ranks.items()]
        added = (self.special_tokens, self.whitespace, self.bos_id, self.eos_id)
        return fingerprint_of(ranks, self.pattern, self.mode, *added)

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        vocab = {to_chars(token): token_id for token, token_id in self.ranks.items()}
        merges = [[to_chars(left), to_chars(right)] for left, right in merges_of(self.ranks)]
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        content = tokenizer_json(
            bpe_model(vocab, merges),
            self.special_tokens,
            self.whitespace,
            pre_tokenizer={"type": "Sequence", "pretokenizers": [split, byte_level(use_regex=False)]},
            decoder=byte_level(use_regex=False),
        )
        write_json(folder / "tokenizer.json", content)
        self.save_settings(folder)


class LibraryTokenizer(Tokenizer):
    """A tokenizer.json of any other kind, run by Hugging Face's `tokenizers`; saved as it was read."""

    def __init__(self, content: str, special_tokens: dict[str, int], settings: dict[str, Any]) -> None:
        tokenizers = optional_import("tokenizers", "this kind of tokenizer.json")
        self.content, self.byte_level = content, '"ByteLevel"' in content
        self.engine = tokenizers.Tokenizer.from_str(content)
        self.engine.encode_special_tokens = True  # as plain text, if a text has their names
        self.engine.no_truncation()
        self.engine.no_padding()
        ids = self.engine.get_vocab(with_added_tokens=True).values()
        super().__init__(special_tokens, 1 + max(ids), settings)
        # A unigram model may find the name as a piece all the same; then the text is cut inside the name.
        forbidden = [name for name in special_tokens if name not in ("<unk>", "[UNK]") and len(name) > 1]
        inside = (f"(?<={regex.escape(name[0])})(?={regex.escape(name[1:])})" for name in forbidden)
        self.cuts, self.forbidden = (
            regex.compile("|".join(inside)),
            {special_tokens[name] for name in forbidden},
        )

    def encode(self, text: str) -> list[int]:
        text = whole_characters(text)
        ids = self.engine.encode(text, add_special_tokens=False).ids
        if self.forbidden.isdisjoint(ids):
            return ids
        parts = self.cuts.split(text)
        return [i for part in parts for i in self.engine.encode(part, add_special_tokens=False).ids]

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        texts = [whole_characters(text) for text in texts]
        found = [item.ids for item in self.engine.encode_batch(texts, add_special_tokens=False)]
        return [
            ids if self.forbidden.isdisjoint(ids) else self.encode(text)
            for text, ids in zip(texts, found, strict=True)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        return self.engine.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The library joins bytes only in its own decoder, so its alphabets are undone here."""
        piece = self.engine.id_to_token(token_id)
        if piece is None or token_id in self.names:
            return b""
        return to_bytes(piece) if self.byte_level else piece_bytes(piece)

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.content, self.special_tokens, self.bos_id, self.eos_id)

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "tokenizer.json", self.content)
        self.save_settings(folder)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece BPE model (Llama, Mistral, Moxin), run by `sentencepiece`.

    A space is "▁", a text gets one in front (which `decode` takes off again), and characters outside the
    vocabulary fall back to byte pieces such as <0xE4>. extra: special tokens added beside the model file.
    """

    def __init__(self, model_file: Path, extra: dict[str, int], settings: dict[str, Any]) -> None:
        library = optional_import("sentencepiece", model_file.name)
        try:
            self.engine = library.SentencePieceProcessor(model_file=str(model_file))
        except (OSError, RuntimeError) as error:
            raise UserError(f"{model_file}: not a SentencePiece model ({error})") from None
        sp = self.engine
        size = sp.vocab_size()
        self.pieces = [sp.id_to_piece(i) for i in range(size)]
        self.special = [sp.is_control(i) or sp.is_unknown(i) for i in range(size)]
        special_tokens = {self.pieces[i]: i for i in range(size) if self.special[i]} | extra
        named = {
            "unk_token": sp.unk_id(),
            "bos_token": sp.bos_id(),
            "eos_token": sp.eos_id(),
            "pad_token": sp.pad_id(),
        }
        settings = {key: self.pieces[i] for key, i in named.items() if i >= 0} | settings
        super().__init__(special_tokens, 1 + max(size - 1, *special_tokens.values()), settings)

    def encode(self, text: str) -> list[int]:
        return self.engine.encode(whole_characters(text))

    def token_bytes(self, token_id: int) -> bytes:
        ordinary = token_id < len(self.pieces) and token_id not in self.names
        return piece_bytes(self.pieces[token_id]) if ordinary else b""

    @property
    def fingerprint(self) -> str:
        model = hashlib.sha256(self.engine.serialized_model_proto()).hexdigest()
        return fingerprint_of(model, self.special_tokens, self.bos_id, self.eos_id)

    def decode(self, ids: Sequence[int]) -> str:
        text = super().decode(ids)
        return text[1:] if text.startswith(" ") else text

    def save(self, folder: str | Path) -> None:
        """tokenizer.json with the merges that SentencePiece makes: any two neighbours that join to a piece.

        The best score goes first. Where scores are equal (runs of spaces), SentencePiece goes on at the left,
        so a run grows from its left end: that is the order in which the longest left part comes first.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        sp, ids = self.engine, {piece: i for i, piece in enumerate(self.pieces)}
        merges = []
        for i, piece in enumerate(self.pieces):
            if not (self.special[i] or sp.is_byte(i)):
                splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
                splits = [(left, right) for left, right in splits if left in ids and right in ids]
                merges += [(-sp.get_score(i), -len(left), left, right) for left, right in splits]
        merges = [merge[2:] for merge in sorted(merges)]
        normalizers: list[dict[str, Any]] = [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]
        if sp.encode("a  b") == sp.encode("a b"):  # trained to remove extra white space
            extra_spaces = {"Regex": r"\A +| +\z| +(?= )"}
            normalizers.insert(0, {"type": "Replace", "pattern": extra_spaces, "content": ""})
        decoders = [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]
        content = tokenizer_json(
            bpe_model(ids, merges, unk_token=self.pieces[sp.unk_id()], fuse_unk=True, byte_fallback=True),
            self.special_tokens,
            normalizer={"type": "Sequence", "normalizers": normalizers},
            decoder={"type": "Sequence", "decoders": decoders},
        )
        write_json(folder / "tokenizer.json", content)
        self.save_settings(folder)


def fingerprint_of(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def whole_characters(text: str) -> str:
    """The text with surrogates paired up or replaced, as tiktoken does; the other libraries refuse them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def piece_bytes(piece: str) -> bytes:
    """A SentencePiece piece as bytes: <0xE4> is one byte, "▁" a space."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


def strip_beside_runs(parts: list[str], runs: dict[str, int]) -> list[str]:
    """What MOSS's released tokenizer does, to give the same ids: from the left, the neighbours of a run lose
    their white space on the side that touches it. A neighbour that is a run itself may vanish.
    """
    parts = list(parts)
    for i, part in enumerate(parts):
        if part in runs:
            if i + 1 < len(parts):
                parts[i + 1] = parts[i + 1].lstrip()
            if i > 0:
                parts[i - 1] = parts[i - 1].rstrip()
    return [part for part in parts if part]


# ---------------------------------------------------------------- training


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    pattern: str = PATTERN,
    chat_template: str | None = None,
) -> BytePairTokenizer:
    """A new vocabulary of `vocab_size` ids: 256 bytes, merges, then the special tokens.

    The first special token begins a document, the second ends it, the third is padding; a single one does all
    it can. Little text gives fewer merges than asked.
    """
    n_merges = vocab_size - 256 - len(special_tokens)
    if n_merges < 0:
        raise UserError(
            f"vocab_size {vocab_size} is too small for 256 bytes and {len(special_tokens)} special tokens"
        )
    counts = count_words(texts, pattern)
    if not counts:
        raise UserError("no text to train a tokenizer on")
    names = {byte: bytes([byte]) for byte in range(256)}
    words = [list(word.encode("utf-8", errors="replace")) for word in counts]
    learn_merges(words, list(counts.values()), names, 256, n_merges)
    special = {name: len(names) + i for i, name in enumerate(special_tokens)}
    roles = {"bos_token": special_tokens[0], "eos_token": special_tokens[min(1, len(special_tokens) - 1)]}
    if len(special_tokens) > 2:
        roles["pad_token"] = special_tokens[2]
    ranks = {name: token_id for token_id, name in names.items()}
    return BytePairTokenizer(ranks, special, pattern, roles | {"chat_template": chat_template})


def extend_tokenizer(
    tokenizer: BytePairTokenizer, texts: Iterable[str], n_merges: int, first_char: str = "\u2e80"
) -> BytePairTokenizer:
    """Continue the merges on new text, as MOSS did with some 55,000 Chinese ones on top of GPT-2's.

    Every old id keeps its meaning, special tokens included; the new ids start after the last of them. Only
    characters from first_char on are merged, by default those of Chinese, Japanese and Korean ("\u0400" would
    add Cyrillic): the encoding of texts without them stays as it was, even where the new text quotes English.
    """
    if not isinstance(tokenizer, BytePairTokenizer):
        raise UserError("only byte-level BPE vocabularies can be extended")
    runs = regex.compile(f"[{regex.escape(first_char)}-\U0010ffff]+")
    counts: Counter[str] = Counter()
    for word, count in count_words(texts, tokenizer.pattern).items():
        for run in runs.findall(word):
            counts[run] += count
    names = {token_id: token for token, token_id in tokenizer.ranks.items()}
    words = [tokenizer.encoding.encode_ordinary(run) for run in counts]
    # Half a character may be a part of others too; beginning with its first byte, a token is of these alone.
    learn_merges(words, list(counts.values()), names, tokenizer.vocab_size, n_merges, whole_start=True)
    ranks = {token: token_id for token_id, token in names.items()}
    settings = {**tokenizer.settings, "chat_template": tokenizer.chat_template}
    return BytePairTokenizer(
        ranks, tokenizer.special_tokens, tokenizer.pattern, settings, tokenizer.whitespace, tokenizer.mode
    )


# ---------------------------------------------------------------- loading


def load_tokenizer(path: str | Path, pattern: str | None = None, mode: Mode = "lossless") -> Tokenizer:
    """The tokenizer in a folder or file; the table at the top of this file lists the kinds.

    pattern: how a rank file's text is cut into words, where its name does not tell.
    mode: for vocabularies with runs of white space (MOSS): see BytePairTokenizer.
    Raises UserError naming the file and what is wrong with it.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no tokenizer here (no such file or folder)")
    folder = path if path.is_dir() else path.parent
    settings = read_settings(folder)
    if path.is_dir():
        names = ("tokenizer.json", "tokenizer.model", "vocab.json", "encoder.json")
        found = [path / name for name in names if (path / name).is_file()] + sorted(path.glob("*.tiktoken"))
        if not found:
            raise UserError(
                f"{path}: no tokenizer in this folder (looked for {', '.join(names)}, *.tiktoken)"
            )
        path = found[0]
    if path.suffix == ".model":
        return SentencePieceTokenizer(path, read_added(folder), settings)
    if path.suffix == ".tiktoken":
        return load_ranks(path, pattern, settings)
    if path.name in ("vocab.json", "encoder.json", "merges.txt", "vocab.bpe"):
        return load_vocab_merges(folder, settings, mode)
    return load_tokenizer_json(path, settings, mode)


def read_settings(folder: Path) -> dict[str, Any]:
    """special_tokens_map.json, tokenizer_config.json and chat_template.jinja of a folder, as one."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings |= read_json(folder / name)
    if (folder / "chat_template.jinja").is_file():
        settings["chat_template"] = read_text(folder / "chat_template.jinja")
    for key in SETTINGS:
        if isinstance(settings.get(key), dict):  # an AddedToken; its content is the text
            settings[key] = settings[key]["content"]
    if not isinstance(settings.get("chat_template"), str | None):
        settings["chat_template"] = None  # several named templates: none of them is the template
    return settings


def read_added(folder: Path) -> dict[str, int]:
    return read_json(folder / "added_tokens.json") if (folder / "added_tokens.json").is_file() else {}


def with_end_token(settings: dict[str, Any], special_tokens: dict[str, int]) -> dict[str, Any]:
    """Settings that name an end token: where no file does, the usual name that the vocabulary has."""
    usual = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<eos>")
    known = next((name for name in usual if name in special_tokens), None)
    return {"eos_token": known, "bos_token": "<s>" if "<s>" in special_tokens else None} | settings


def load_ranks(path: Path, pattern: str | None, settings: dict[str, Any]) -> BytePairTokenizer:
    """A tiktoken rank file: lines of base64 bytes and rank, without the pattern and the special tokens."""
    ranks = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise UserError(f"{path}:{number}: expected a base64 token and its rank") from None
    pattern = pattern or next(
        (p for name, p in RANK_FILE_PATTERNS.items() if path.name.startswith(name)), None
    )
    if pattern is None:
        raise UserError(f"{path}: a rank file does not say how text is cut into words; give `pattern`")
    ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
    special = {"<|endoftext|>": 1 + max(ranks.values())}
    return BytePairTokenizer(ranks, special, pattern, {"eos_token": "<|endoftext|>"} | settings)


def load_vocab_merges(folder: Path, settings: dict[str, Any], mode: Mode) -> Tokenizer:
    """GPT-2's two files; added_tokens.json, if there is one, adds markers and runs of white space (MOSS)."""
    names = [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")]
    pair = next((p for p in names if (folder / p[0]).is_file()), names[0])
    vocab_file, merges_file = folder / pair[0], folder / pair[1]
    for file in (vocab_file, merges_file):
        if not file.is_file():
            raise UserError(f"{file}: missing; a GPT-2-type tokenizer is {pair[0]} and {pair[1]} together")
    vocab, added = read_json(vocab_file), read_added(folder)
    lines = [line for line in read_text(merges_file).split("\n") if line and not line.startswith("#version")]
    merges = [line.split(" ") for line in lines]
    fast = byte_pair_tokenizer(vocab_file, vocab, merges, added, GPT2_PATTERN, settings, mode)
    return fast or library_byte_pair(vocab, merges, added, settings)


def load_tokenizer_json(path: Path, settings: dict[str, Any], mode: Mode) -> Tokenizer:
    """A tokenizer.json; through tiktoken where that gives the same ids, else through its own library."""
    content = read_json(path)
    try:
        added = {token["content"]: token["id"] for token in content["added_tokens"]}
        plain = [token for token in content["added_tokens"] if not token["special"]]
        pattern = byte_level_pattern(content)
        if pattern and all(is_run(token["content"]) for token in plain):
            merges = [m.split(" ") if isinstance(m, str) else m for m in content["model"]["merges"]]
            vocab = content["model"]["vocab"]
            tokenizer = byte_pair_tokenizer(path, vocab, merges, added, pattern, settings, mode)
            if tokenizer:
                return tokenizer
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not a tokenizer.json (missing {error})") from None
    special = {token["content"]: token["id"] for token in content["added_tokens"] if token["special"]}
    return LibraryTokenizer(read_text(path), special, with_end_token(settings, special))


def byte_level_pattern(content: dict[str, Any]) -> str | None:
    """The word pattern of a plain byte-level BPE tokenizer.json; None if it does anything else besides."""
    steps = content["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    last = steps[-1]
    if content["model"]["type"] != "BPE" or content["normalizer"]:
        return None
    if last.get("type") != "ByteLevel" or last["add_prefix_space"]:
        return None
    if len(steps) == 1 and last.get("use_regex", True):
        return GPT2_PATTERN
    split = steps[0]
    regular = split["type"] == "Split" and split["behavior"] == "Isolated" and "Regex" in split["pattern"]
    return split["pattern"]["Regex"] if len(steps) == 2 and regular and not last["use_regex"] else None


def is_run(text: str) -> bool:
    return len(text) > 1 and set(text) in ({" "}, {"\t"})


def byte_pair_tokenizer(
    path: Path,
    vocab: dict[str, int],
    merges: list[list[str]],
    added: dict[str, int],
    pattern: str,
    settings: dict[str, Any],
    mode: Mode,
) -> BytePairTokenizer | None:
    """The vocabulary for tiktoken, or None where tiktoken would give other ids.

    tiktoken joins the pair whose result has the lowest id: that is the merge list's order only if ids grow
    along the list and no token is made by two merges.
    """
    try:
        single = {bytes([byte]): vocab[char] for byte, char in BYTE_TO_CHAR.items()}
        merged = [(to_bytes(left + right), vocab[left + right]) for left, right in merges]
    except (KeyError, ValueError) as error:
        raise UserError(f"{path}: vocabulary and merges do not fit together ({error})") from None
    ids = [token_id for _, token_id in merged]
    if any(a >= b for a, b in pairwise(ids)) or (ids and max(single.values()) > ids[0]):
        return None
    ranks = dict(sorted(single.items(), key=lambda item: item[1])) | dict(merged)
    whitespace = {name: token_id for name, token_id in added.items() if is_run(name)}
    ordinary = set(ranks.values())
    special = {name: token_id for name, token_id in vocab.items() if token_id not in ordinary} | added
    special = {name: token_id for name, token_id in special.items() if name not in whitespace}
    return BytePairTokenizer(ranks, special, pattern, with_end_token(settings, special), whitespace, mode)


def library_byte_pair(
    vocab: dict[str, int], merges: list[list[str]], added: dict[str, int], settings: dict[str, Any]
) -> LibraryTokenizer:
    """GPT-2's two files in an order that tiktoken cannot follow, as a tokenizer.json for the library."""
    runs = {name: i for name, i in added.items() if is_run(name)}
    special = {name: i for name, i in vocab.items() if name.startswith("<|") and name.endswith("|>")}
    special |= {name: i for name, i in added.items() if name not in runs}
    model, split = bpe_model(vocab, merges), byte_level(use_regex=True)
    content = tokenizer_json(model, special, runs, pre_tokenizer=split, decoder=split)
    return LibraryTokenizer(json.dumps(content), special, with_end_token(settings, special))


# ---------------------------------------------------------------- command line


@dataclass(kw_only=True)
class TrainConfig:
    preset: str = "default"
    data: tuple[str, ...] = ()  # sources to learn from, as for data/text.py (weights have no meaning here)
    max_bytes: int = 30_000_000  # of text read from each source
    vocab_size: int = 8192  # ids in all, special tokens included
    out: str = ""  # folder to write


@dataclass(kw_only=True)
class ExtendConfig:
    preset: str = "default"
    tokenizer: str = ""  # folder or file of the tokenizer to extend
    data: tuple[str, ...] = ()  # sources to learn from, as for data/text.py (weights have no meaning here)
    max_bytes: int = 30_000_000  # of text read from each source
    n_merges: int = 2000  # new ids
    out: str = ""  # folder to write


def read_sources(words: tuple[str, ...], max_bytes: int) -> Iterator[str]:
    for word in words:
        room = max_bytes
        for document in documents(parse_source(word)):
            if isinstance(document, BadRecord):
                raise document
            room -= len(document.text.encode("utf-8", "replace"))
            yield document.text
            if room <= 0:
                break


def main() -> None:
    commands = {"train": TrainConfig, "extend": ExtendConfig}
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command in ("-h", "--help"):
        print(f"{__doc__}\nOptions: see `train --help` and `extend --help`")
        return
    if command not in commands:
        raise UsageError(f"expected `train` or `extend` as the first word, not {command!r}; see --help")
    config = parse(commands[command], {"default": {}}, sys.argv[2:], about=__doc__)
    if not config.data or not config.out:
        raise UsageError("--data and --out are needed")
    texts = read_sources(config.data, config.max_bytes)
    if command == "train":
        tokenizer = train_tokenizer(texts, config.vocab_size)
    else:
        old = load_tokenizer(config.tokenizer)
        tokenizer = extend_tokenizer(old, texts, config.n_merges)
    tokenizer.save(config.out)
    print(f"{config.out}: {tokenizer.vocab_size} ids, {time.process_time():.0f} CPU seconds")


if __name__ == "__main__":
    run_main(main)
