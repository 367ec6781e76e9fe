"""eval.py from the command line: what it writes and refuses, alone and in two processes; equal to lm-eval."""

import json
import math
import random
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

import data.asking
import eval as evaluation
from core.checkpoint import load_pretrained, save_pretrained
from core.config import UsageError, UserError
from data.asking import Pupil
from data.pictures import load_picture
from data.tokenizer import load_tokenizer, train_tokenizer
from model import Config, Transformer
from tests.conftest import ROOT, run_processes

SHAPE = dict(layers=2, dim=32, heads=2, kv_heads=1, head_dim=16, ffn_dim=64, max_seq_len=256, init_std=0.3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights: it knows nothing, but always the same nothing."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["Question: Which one is it? Answer: a\nb.\n"] * 20, 300)
    save_pretrained(Transformer(Config(vocab_size=300, **SHAPE), seed=3), folder, tokenizer)
    return folder


def call(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, words)])
    evaluation.main()


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def read_back(out: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    return records, json.loads((out / "summary.json").read_text())


def piqa(count: int) -> list[dict[str, Any]]:
    return [
        {"goal": f"Which one is {i}?", "sol1": f"a{i} b", "sol2": "b" * (i % 5 + 1), "label": i % 2}
        for i in range(count)
    ]


def test_options(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against one forward for each whole text."""
    rows = piqa(12)
    file = write_rows(tmp_path / "piqa.jsonl", rows)
    call(monkeypatch, "--model", folder, "--tasks", "piqa@2", "--data", file, "--out", tmp_path / "out")
    records, summary = read_back(tmp_path / "out")
    model, tokenizer = load_pretrained(folder), load_tokenizer(folder)
    right = 0
    for record, row in zip(records, rows, strict=True):
        assert record["prompt"].endswith(f"Question: {row['goal']}\nAnswer:")
        assert record["prompt"].count("Question:") == 3
        expected = []
        for option in (row["sol1"], row["sol2"]):
            context = tokenizer.encode(record["prompt"])
            ids = torch.tensor([tokenizer.encode(f"{record['prompt']} {option}")])
            logprobs = model(ids[:, :-1])[0].log_softmax(-1)
            picked = logprobs.gather(-1, ids[0, 1:, None]).squeeze(-1)
            expected.append(picked[len(context) - 1 :].sum().item())
        assert record["output"] == pytest.approx(expected, abs=1e-3)
        right += expected.index(max(expected)) == row["label"]
    found = summary["tasks"]["piqa"]["acc"]
    assert found["value"] == right / 12 and found["n"] == 12
    assert found["stderr"] == pytest.approx(math.sqrt(right / 12 * (1 - right / 12) / 11))
    assert summary["controls"]["piqa/guessing"]["acc"]["value"] == 0.5


def test_examples_from_elsewhere(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_rows(tmp_path / "test.jsonl", piqa(3))
    other = write_rows(tmp_path / "train.jsonl", [row | {"goal": "Seen before?"} for row in piqa(9)])
    words = ["--tasks", "piqa", "--data", f"piqa={file}", "--examples", f"piqa={other}"]
    call(monkeypatch, "--model", folder, *words, "--shots", "3", "--out", tmp_path / "out")
    records, _ = read_back(tmp_path / "out")
    assert all(record["prompt"].count("Seen before?") == 3 for record in records)


def test_bits_per_byte(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts longer than the context, in windows; the mean is that of all bytes together."""
    texts = ["Which one is it? " * n for n in (1, 40, 7)]
    file = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    call(monkeypatch, "--model", folder, "--tasks", "bpb", "--data", file, "--out", tmp_path / "out")
    records, summary = read_back(tmp_path / "out")
    bits = sum(record["score"] * len(text.encode()) for record, text in zip(records, texts, strict=True))
    found = summary["tasks"]["bpb"]
    assert found["bits_per_byte"]["value"] == pytest.approx(bits / sum(map(len, texts)))
    assert found["perplexity"]["value"] == pytest.approx(math.exp(found["nats_per_token"]["value"]))
    model, tokenizer = load_pretrained(folder), load_tokenizer(folder)
    ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(texts[0])]])
    nats, _ = model.loss(ids[:, :-1], ids[:, 1:])
    assert records[0]["score"] == pytest.approx(nats.item() / math.log(2) / len(texts[0]), rel=1e-4)


def test_writing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_rows(
        tmp_path / "gsm.jsonl", [{"question": f"{i}?", "answer": f"so\n#### {i}"} for i in range(4)]
    )
    words = ["--model", folder, "--tasks", "gsm8k", "--shots", "1", "--data", file, "--max_new_tokens", "8"]
    call(monkeypatch, *words, "--out", tmp_path / "out")
    records, summary = read_back(tmp_path / "out")
    assert set(summary["tasks"]["gsm8k"]) == {"flexible_extract", "strict_match"}
    assert all(record["prompt"].count("Answer:") == 2 and record["answer"] for record in records)
    with pytest.raises(UsageError, match="--max_new_tokens"):
        call(monkeypatch, *words[:-1], "900", "--out", tmp_path / "out2")


def test_stop_strings_end_a_text() -> None:
    assert data.asking.cut("one\nQuestion: two", ("Question:", "\n\n")) == "one\n"
    assert data.asking.cut("b\n\na Question:", ("Question:", "\n\n")) == "b"
    assert data.asking.cut("whole", ("Question:",)) == "whole"


def test_made_tasks(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a format that the model was never taught; tools are switched off for the control."""
    words = ["--tasks", "instructions,sorting,products,bpb", "--made", "3", "--max_new_tokens", "4"]
    monkeypatch.setattr(Pupil, "longest", 128)
    made = Transformer(Config(vocab_size=300, **SHAPE | {"max_seq_len": 2048}), seed=3)
    save_pretrained(made, tmp_path / "model", load_tokenizer(folder))
    call(monkeypatch, "--model", tmp_path / "model", *words, "--out", tmp_path / "out")
    records, summary = read_back(tmp_path / "out")
    assert set(summary["tasks"]) == {"instructions", "sorting", "products", "bpb"}
    assert set(summary["controls"]) == {"instructions/tools_off", "products/tools_off"}
    assert len(records) == 3 * 6
    assert all({"task", "id", "prompt", "output", "answer", "score"} <= set(record) for record in records)

    file = write_rows(tmp_path / "gsm.jsonl", [{"question": "1?", "answer": "so\n#### 1"}] * 2)
    words = ["--tasks", "gsm8k@0", "--data", file, "--chat", "--max_new_tokens", "4"]
    asked, original = [], data.asking.replies

    def spy(model: Any, tokenizer: Any, talks: list[Any], *rest: Any, **options: Any) -> Any:
        asked.extend(talks)
        return original(model, tokenizer, talks, *rest, **options)

    monkeypatch.setattr(data.asking, "replies", spy)
    call(monkeypatch, "--model", tmp_path / "model", *words, "--out", tmp_path / "chat")
    assert asked[0] == [{"role": "user", "content": "Question: 1?\nAnswer:"}]
    assert len(read_back(tmp_path / "chat")[0]) == 2


def test_programs_need_permission(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"prompt": "def f():\n", "test": "def check(f):\n    assert f() == 1", "entry_point": "f"}
    file = write_rows(tmp_path / "code.jsonl", [row, row])
    words = ["--model", folder, "--tasks", "humaneval", "--data", file, "--out", tmp_path / "out"]
    with pytest.raises(UsageError, match="--allow_code_execution"):
        call(monkeypatch, *words)
    written = [["    return 1\n\ndef g(): while"], ["    return 2\n"]]
    monkeypatch.setattr(data.asking, "write", lambda *arguments: written)
    call(monkeypatch, *words, "--allow_code_execution")
    records, _ = read_back(tmp_path / "out")
    assert [record["score"] for record in records] == [1.0, 0.0]
    assert records[0]["output"] == ["    return 1\n"]  # cut at the next definition


class Oracle:
    """Stands in for a model that sees: it reads the answer out of the picture, and guesses without one."""

    def __init__(self, answers: dict[int, str]) -> None:
        self.answers = answers

    def look(self, pictures: list[Any]) -> torch.Tensor:
        return torch.tensor([[[float(zlib.crc32(load_picture(one).tobytes()) % 2**24)]] for one in pictures])

    def answer(self, questions: list[str], features: list[Any], max_new_tokens: int) -> list[str]:
        keys = [None if seen is None else int(seen.item()) for seen in features]
        return [self.answers.get(key, "yes") for key in keys]


def test_pictures_with_controls(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = evaluation.TASKS["scenes"].made(30, 0)
    oracle = Oracle({})
    keys = [int(oracle.look(list(item.pictures)).item()) for item in items]
    oracle.answers = {key: item.answer[0] for key, item in zip(keys, items, strict=True)}
    pupil = Pupil(load_pretrained(folder), load_tokenizer(folder), oracle, [])
    monkeypatch.setattr(evaluation, "open_model", lambda *arguments: pupil)
    call(monkeypatch, "--model", folder, "--tasks", "scenes", "--made", "30", "--out", tmp_path / "out")
    _, summary = read_back(tmp_path / "out")
    assert summary["tasks"]["scenes"]["exact_match"]["value"] == 1
    assert summary["controls"]["scenes/shuffled_pictures"]["exact_match"]["value"] < 0.6
    assert summary["controls"]["scenes/no_picture"]["exact_match"]["value"] < 0.6


def both(folder: Path, file: Path, out: Path) -> None:
    sys.argv = ["eval.py", "--model", str(folder), "--tasks", "piqa,bpb", "--shots", "1", "--made", "5"]
    sys.argv += ["--data", f"piqa={file}", "--out", str(out)]
    evaluation.main()


def test_two_processes_share_the_questions(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_rows(tmp_path / "piqa.jsonl", piqa(7))
    both(folder, file, tmp_path / "one")
    run_processes(both, 2, tmp_path, folder, file, tmp_path / "two")
    one, two = (read_back(tmp_path / name)[0] for name in ("one", "two"))
    assert [(r["task"], r["id"], r["prompt"]) for r in one] == [
        (r["task"], r["id"], r["prompt"]) for r in two
    ]
    assert [r["score"] for r in one] == pytest.approx([r["score"] for r in two], abs=1e-5)


def test_comparison_is_printed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file = write_rows(tmp_path / "piqa.jsonl", piqa(8))
    both(folder, file, tmp_path / "a")
    both(folder, file, tmp_path / "b")
    capsys.readouterr()
    call(monkeypatch, "--compare", tmp_path / "a", tmp_path / "b")
    assert "piqa" in (printed := capsys.readouterr().out) and "+0.0000" in printed
    with pytest.raises(UsageError, match="--compare takes two"):
        call(monkeypatch, "--compare", tmp_path / "a")


def test_contamination(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = "why did the old miller carry three heavy sacks of grain over the frozen river last winter"
    rows = [{"goal": long, "sol1": "a", "sol2": "b", "label": 0}, *piqa(2)]
    rows[1]["goal"] = long.replace("three heavy", "seven light").replace("frozen", "swollen")
    file = write_rows(tmp_path / "piqa.jsonl", rows)
    corpus = write_rows(
        tmp_path / "corpus.jsonl", [{"text": "Some text. " * 20}, {"text": f"He asked {long}?"}]
    )
    words = ["--model", folder, "--tasks", "piqa", "--data", file, "--contamination", corpus]
    call(monkeypatch, *words, "--out", tmp_path / "out")
    found = read_back(tmp_path / "out")[1]["contamination"]["piqa"]
    assert (found["contaminated"], found["clean"], found["too short to tell"]) == (1, 1, 1)
    assert found["tasks"]["acc"]["n"] == 1


def test_contamination_of_prepared_text(folder: Path, tmp_path: Path) -> None:
    """What was really trained on: the held-out documents of a prepared folder are not searched."""
    from data.contamination import contaminated, corpus_texts
    from data.text import prepare

    letters = ("abc", "def", "ghi", "jkl")
    names = ["".join(part[n // 3**k % 3] for k, part in enumerate(letters)) for n in range(81)]
    rng = random.Random(0)
    texts = [f"The story of {n}: {' and '.join(rng.sample(names, 30))}, that is all." for n in names[:60]]
    write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    out = tmp_path / "prepared"
    corpus, _ = prepare((str(tmp_path / "texts.jsonl"),), load_tokenizer(folder), out=out, val_fraction=0.3)
    verdicts = contaminated(texts, corpus_texts(str(out)))
    trained = sum(len(stream.starts) for stream in corpus.train.values())
    assert sum(map(bool, verdicts)) == trained and 0 < trained < 60


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "hellaswagg"], "did you mean hellaswag"),
        (["--tasks", "piqa@many"], "NAME@SHOTS"),
        (["--tasks", "gqa", "--dry_run"], "gqa: no data set on the hub"),
        (["--tasks", "scenes"], "does not see"),
        (["--tasks", "piqa", "--data", "nowhere.jsonl"], "no validation file"),
        (["--tasks", "piqa", "--data", "a", "b"], "one place for all tasks"),
        (["--limit", "-1"], "--limit must not be negative"),
        (["--compare", "here"], "takes two folders"),
        (["--samples", "0.5"], "a whole number"),
        (["--samples", "8"], "--samples needs a --temperature"),
        (["--made", "0"], "--made must be at least 1"),
    ],
)
def test_refused(
    words: list[str], message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=message):
        call(monkeypatch, "--model", folder, *words, "--out", tmp_path / "out")


def test_one_line_and_exit_code_2() -> None:
    done = subprocess.run(
        [sys.executable, "eval.py", "--no_such_flag", "1"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "--no_such_flag" in done.stderr


def test_dry_run_shows_a_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file = write_rows(tmp_path / "piqa.jsonl", piqa(3))
    call(monkeypatch, "--tasks", "piqa", "--data", file, "--shots", "1", "--dry_run")
    assert "3 questions, 1 shots" in (printed := capsys.readouterr().out)
    assert printed.endswith("Question: Which one is 0?\nAnswer:\n")


@pytest.mark.slow
def test_equal_to_lm_eval(real_data: Path) -> None:
    """Per item: prompts, log-likelihoods, accuracies; both filters of GSM8K; bits per byte."""
    pytest.importorskip("lm_eval", reason="the referee is not installed: lm_eval 0.4.13 and datasets")
    command = [sys.executable, "benchmarks/eval.py", "--limit", "24"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    lines = {line[:18].strip(): line for line in done.stdout.splitlines()}
    for name in ("letters, 0 shots", "letters, 2 shots", "texts, 0 shots", "texts, 5 shots"):
        assert "prompts 24/24" in lines[name] and "acc 24/24" in lines[name], lines[name]
        assert float(lines[name].split()[-1]) < 1e-3
    assert "acc_norm 24/24" in lines["texts, 5 shots"]
    assert "prompts 6/6, texts 6/6, verdicts of both filters on their texts 12/12" in lines["GSM8K, 5 shots"]
    ours, theirs = (float(lines["bits per byte"].split()[i]) for i in (-6, -4))
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_one_question_has_no_error(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_rows(tmp_path / "piqa.jsonl", piqa(1))
    call(monkeypatch, "--model", folder, "--tasks", "piqa", "--data", file, "--out", tmp_path / "out")
    assert read_back(tmp_path / "out")[1]["tasks"]["piqa"]["acc"]["stderr"] is None
