"""The command line: types, presets, help from comments, and one clear line for every mistake."""

import dataclasses
import subprocess
import sys
from typing import Literal

import pytest

from core.config import RunConfig, UsageError, help_text, parse
from tests.conftest import ROOT


@dataclasses.dataclass(kw_only=True)
class Config(RunConfig):
    rate: float = 0.5  # how fast
    names: tuple[str, ...] = ("a",)  # which ones
    flag: bool = False  # whether
    kind: Literal["x", "y"] = "x"  # of what sort
    limit: int | None = None  # at most


PRESETS = {"tiny": dict(rate=1.0, steps=7), "small": dict(rate=2.0)}


def read(*words: str) -> Config:
    return parse(Config, PRESETS, list(words))


def test_defaults_then_preset_then_flags() -> None:
    assert read().rate == 1.0 and read().preset == "tiny"
    assert read("--preset", "small").rate == 2.0
    config = read("--rate=3e-4", "--steps", "1_000")
    assert (config.rate, config.steps) == (3e-4, 1000)


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--flag"], True),
        (["--flag", "false"], False),
        (["--flag=True"], True),
        (["--flag", "--rate", "1"], True),
    ],
)
def test_booleans_are_booleans(words: list[str], value: bool) -> None:
    assert read(*words).flag is value


def test_several_words_and_none() -> None:
    assert read("--names", "p:2", "q", "--flag").names == ("p:2", "q")
    assert read("--limit", "none").limit is None and read("--limit", "3").limit == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rat", "1"], r"unknown argument '--rat', did you mean --rate\?"),
        (["word"], "unknown argument 'word'"),
        (["--steps", "many"], "--steps 'many': expected a whole number"),
        (["--rate", "fast"], "--rate 'fast': expected a number"),
        (["--flag", "maybe"], "--flag 'maybe': expected true or false"),
        (["--kind", "z"], "--kind 'z': expected one of x, y"),
        (["--preset", "smal"], r"no such preset, did you mean small\?"),
        (["--seed"], "--seed needs a value"),
        (["--batch_size", "0"], "--batch_size must be at least 1"),
        (["--lr", "-1"], "--lr must not be negative"),
    ],
)
def test_mistakes_are_named(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read(*words)


def test_help_lists_every_field_with_its_comment() -> None:
    text = help_text(Config, PRESETS, "about")
    for field in dataclasses.fields(Config):
        line = next(line for line in text.splitlines() if f"--{field.name} " in line)
        assert len(line.split(")", 1)[-1].strip()) > 3, f"{field.name} has no comment"
    assert "how fast" in text and "'tiny'" not in text and "tiny:" in text


def test_a_script_exits_with_2_and_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "pretrain.py", "--no_such_flag", "1"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "unknown argument '--no_such_flag'" in done.stderr
