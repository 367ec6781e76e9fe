"""What the pages say: every command is understood, every file and link exists, line counts are true.

Stage commands are run with --dry_run, which checks flags, preset, shapes and combinations; other commands are
parsed by the script's own parser.
"""

import importlib
import json
import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from core.checkpoint import save_pretrained
from core.config import parse
from data.tokenizer import train_tokenizer
from model import Config as Shape
from model import Transformer

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STAGES = ("pretrain", "sft", "dpo", "preference", "grpo", "vlm")
MODEL_FLAGS = ("--init_from", "--model", "--tokenizer", "--reference")
TALK = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "good day"}]


def commands() -> list:
    """(page:line, words) of each line in a code block that starts with python or torchrun."""
    found = []
    for page in PAGES:
        text = re.sub(r"\\\n\s*", lambda m: " " * len(m.group()), page.read_text())
        for match in re.finditer(r"^(?:    )?((?:python|torchrun) [^\n]*)", text, re.M):
            line = text.count("\n", 0, match.start()) + 1
            words = shlex.split(match.group(1), comments=True)
            found.append(pytest.param(words, id=f"{page.name}:{line}"))
    return found


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs") / "model"
    tokenizer = train_tokenizer(["some words to learn from"], 300)
    shape = Shape(
        vocab_size=tokenizer.vocab_size, layers=2, dim=32, heads=2, kv_heads=1, head_dim=16, ffn_dim=64
    )
    save_pretrained(Transformer(shape), folder, tokenizer)
    return folder


@pytest.mark.parametrize("words", commands())
def test_commands(words, tiny_model, tmp_path, monkeypatch):
    while words and not words[0].endswith(".py"):  # python, or torchrun and its flags
        words = words[1:]
    script, *arguments = words
    assert (ROOT / script).exists()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(tiny_model))
    for flag, value in pairwise(arguments):
        place = Path(re.sub(r":[\d.]+$", "", value))
        place.parent.mkdir(parents=True, exist_ok=True)
        if flag in MODEL_FLAGS and not place.exists():
            place.symlink_to(tiny_model)
        elif place.suffix in (".json", ".jsonl"):
            place.write_text(json.dumps({"text": "some words", "conversations": TALK}) + "\n")
        elif ":" not in value and value.endswith("/") or "my_texts" in value:
            place.mkdir()
            (place / "a.txt").write_text("some words")
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    if module.__name__ in STAGES:
        monkeypatch.setattr(sys, "argv", [script, *arguments, "--dry_run"])
        module.main()
    elif hasattr(module, "PRESETS"):
        parse(module.Config, module.PRESETS, arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), link
    for path in re.findall(r"`((?:core|data|kernels|tests|benchmarks|docs)/[\w/]*\.\w+)`", text):
        assert (ROOT / path).exists(), path
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([a-z-]+)|^    make ([a-z-]+)", text, re.M)) <= {
        pair for name in targets for pair in ((name, ""), ("", name))
    }


def test_line_counts():
    """README's table says how long each file is, to the next ten lines."""
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", (ROOT / "README.md").read_text(), re.M)
    assert len(rows) >= 9
    for path, lines in rows:
        true = len((ROOT / path).read_text().splitlines())
        assert abs(true - int(lines)) <= 10, f"{path} has {true} lines"
