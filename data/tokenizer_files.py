"""The files that tokenizers come in: GPT-2's alphabet of bytes, tokenizer.json, whole files in and out."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.config import UserError


def printable_bytes() -> dict[int, str]:
    """GPT-2's alphabet: one visible character for each of the 256 bytes, used by vocab.json and
    tokenizer.json."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


BYTE_TO_CHAR = printable_bytes()
CHAR_TO_BYTE = {char: byte for byte, char in BYTE_TO_CHAR.items()}


def to_chars(token: bytes) -> str:
    return "".join(BYTE_TO_CHAR[byte] for byte in token)


def to_bytes(chars: str) -> bytes:
    """Inverse of `to_chars`; KeyError for a character outside the alphabet."""
    return bytes(CHAR_TO_BYTE[char] for char in chars)


def tokenizer_json(
    model: dict[str, Any],
    special: dict[str, int],
    runs: dict[str, int] | None = None,
    **steps: dict[str, Any],
) -> dict[str, Any]:
    """Content of a tokenizer.json. steps: normalizer, pre_tokenizer, decoder.

    The library numbers added tokens anew unless the vocabulary has them, so they are put there too.
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = sorted((special | (runs or {})).items(), key=lambda item: item[1])
    model["vocab"] |= dict(added)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": name, **flags, "special": name in special} for name, i in added
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        **steps,
        "model": model,
    }


def bpe_model(vocab: dict[str, int], merges: Sequence[Sequence[str]], **changes: Any) -> dict[str, Any]:
    absent = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    lists = {"vocab": dict(vocab), "merges": [list(merge) for merge in merges]}
    return {"type": "BPE", **dict.fromkeys(absent), **flags, **changes, **lists}


def byte_level(use_regex: bool) -> dict[str, Any]:
    """The step from bytes to visible characters and back; use_regex: it also cuts words as GPT-2 does."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def optional_import(package: str, purpose: str) -> Any:
    """A package that only some tokenizers need; UserError says which and how to get it."""
    try:
        return __import__(package)
    except ImportError:
        raise UserError(f"{purpose} needs the package {package}: pip install {package}") from None


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object")
    return content


def write_text(path: Path, text: str) -> None:
    """Whole or not at all: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
