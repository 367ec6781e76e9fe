"""Stage 1 from end to end on a small corpus: invariances, resume, phases, growth, export, bad input."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import pretrain
from core.checkpoint import load_pretrained
from core.config import UsageError, UserError
from data.tokenizer import load_tokenizer
from tests.conftest import ROOT, run_processes

WORDS = "the sun moon river stone bird sings falls over under slowly and then 今天 天气 很好 我们".split()
SHAPE = "--layers 1 --dim 32 --heads 2 --kv_heads 1 --ffn_dim 48 --vocab_size 300".split()
RUN = "--seq_len 32 --batch_size 4 --micro_batch_size 4 --steps 6 --warmup_steps 2".split()
OFTEN = "--eval_every 0 --save_every 2 --log_every 1 --val_tokens 256 --prompts the".split()
FAST = [*SHAPE, *RUN, *OFTEN]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 documents of random phrases, and a cache of its own for what is prepared from them."""
    folder = tmp_path_factory.mktemp("corpus")
    os.environ["NANOMOXIN_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS, k=rng.randint(20, 80))) + f" {i}." for i in range(120)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (folder / "more.jsonl").write_text("".join(json.dumps({"text": line[::-1]}) + "\n" for line in lines))
    return folder


def run(corpus: Path, out: Path, *words: str) -> dict[int, float]:
    """pretrain.py in this process; the loss of each step."""
    before, sys.argv = (
        sys.argv,
        ["pretrain.py", *FAST, "--data", str(corpus / "text.jsonl"), "--out", str(out), *words],
    )
    try:
        pretrain.main()
    finally:
        sys.argv = before
    return losses(out)


def losses(out: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def test_a_run_leaves_what_it_promises(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    curve = run(corpus, tmp_path / "a", "--steps", "30", "--lr", "1e-2")
    assert curve[30] < curve[1] - 0.5
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    assert summary["after"]["bpb/text"] < summary["before"]["bpb/text"]
    assert summary["tokens"] == {"text": 30 * 4 * 32} and summary["unigram_control"]["text"] > 0
    for name in (
        "config.json",
        "curves.png",
        "model/model.safetensors",
        "model/tokenizer.json",
        "checkpoints/step_000030",
    ):
        assert (tmp_path / "a" / name).exists(), name
    shown = capsys.readouterr().out
    assert "sample: 'the" in shown and "bpb/text" in shown and "next: " in shown


def test_exported_folder_opens_in_transformers(corpus: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    run(corpus, tmp_path / "a")
    folder = tmp_path / "a/model"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours, tokenizer = load_pretrained(folder), load_tokenizer(folder)
    text = "def f(x):\n\treturn x  # 今天 天气 😀\r\n"
    ids = transformers.AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
    assert ids == tokenizer.encode(text) and tokenizer.decode(ids) == text
    with torch.no_grad():
        assert (theirs(torch.tensor([ids])).logits - ours(torch.tensor([ids]))).abs().max() < 1e-5


@pytest.mark.parametrize("words", [("--micro_batch_size", "1"), ("--checkpointing", "full")])
def test_accumulation_and_recomputation_change_nothing(
    words: tuple[str, ...], corpus: Path, tmp_path: Path
) -> None:
    plain, other = run(corpus, tmp_path / "a"), run(corpus, tmp_path / "b", *words)
    assert len(plain) == 6 and all(abs(plain[step] - other[step]) < 1e-5 for step in plain)


def test_two_processes_give_the_same_curve(corpus: Path, tmp_path: Path) -> None:
    words = ("--steps", "20", "--eval_every", "4", "--save_every", "4")
    alone = run(corpus, tmp_path / "a", *words)
    both = run_processes(run, 2, tmp_path, corpus, tmp_path / "b", *words, "--micro_batch_size", "1")
    shutil.rmtree(tmp_path / "b/checkpoints/step_000020")
    assert run(corpus, tmp_path / "b", *words, "--resume")[20] == pytest.approx(alone[20], abs=1e-5)
    assert max(abs(alone[step] - both[0][step]) for step in alone) < 1e-5
    ours, theirs = (load_pretrained(tmp_path / name / "model").state_dict() for name in "ab")
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in ours)


def test_resume_is_bitwise_and_refuses_other_settings(corpus: Path, tmp_path: Path) -> None:
    whole = run(corpus, tmp_path / "a")
    run(corpus, tmp_path / "b")
    for name in ("step_000006",):
        for file in (tmp_path / "b/checkpoints" / name).iterdir():
            file.unlink()
        (tmp_path / "b/checkpoints" / name).rmdir()
    assert run(corpus, tmp_path / "b", "--resume") == whole
    with pytest.raises(UserError, match="was made with seed = 0, this run has 1"):
        run(corpus, tmp_path / "b", "--resume", "--seed", "1")
    with pytest.raises(UserError, match="was made with model"):
        run(corpus, tmp_path / "b", "--resume", "--dim", "64")


def test_signal_saves_and_says_how_to_go_on(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(corpus, tmp_path / "a")
    original = pretrain.take_step

    def interrupt(model, optimizer, guard, config, step, loss):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(model, optimizer, guard, config, step, loss)

    monkeypatch.setattr(pretrain, "take_step", interrupt)
    with pytest.raises(UserError, match="stopped at step 3, checkpoint saved; go on with --resume"):
        run(corpus, tmp_path / "b")
    monkeypatch.undo()
    assert run(corpus, tmp_path / "b", "--resume") == whole


def test_phases_change_length_and_mixture(corpus: Path, tmp_path: Path) -> None:
    more = str(corpus / "more.jsonl")
    phases = ["--phases", "4@32", f"2@64@{corpus / 'text.jsonl'}:1+{more}:1"]
    curve = run(corpus, tmp_path / "a", *phases)
    assert sorted(curve) == list(range(1, 7))
    tokens = json.loads((tmp_path / "a/summary.json").read_text())["tokens"]
    assert sum(tokens.values()) == 6 * 4 * 32 and tokens["more"] == 2 * 64


def test_growing_a_model_in_depth_and_vocabulary(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "a")
    start = str(tmp_path / "a/model")
    run(corpus, tmp_path / "deep", "--init_from", start, "--expand_layers", "2", "--expand_identity")
    assert load_pretrained(tmp_path / "deep/model").config.layers == 2
    before = json.loads((tmp_path / "deep/summary.json").read_text())["before"]["val_loss"]
    assert before == pytest.approx(
        json.loads((tmp_path / "a/summary.json").read_text())["after"]["val_loss"], abs=1e-5
    )
    extended = tmp_path / "wider"
    command = ["data/tokenizer.py", "extend", "--tokenizer", start, "--data", str(corpus / "more.jsonl")]
    done = subprocess.run(
        [sys.executable, *command, "--n_merges", "40", "--out", str(extended)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    run(corpus, tmp_path / "wide", "--init_from", start, "--tokenizer", str(extended))
    wide = load_pretrained(tmp_path / "wide/model").config.vocab_size
    assert wide == load_tokenizer(extended).vocab_size > load_tokenizer(start).vocab_size


def test_default_data_falls_back_when_the_hub_is_out_of_reach(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Only the preset's own choice may be replaced, and under a banner; what the user names is never
    replaced."""

    def unreachable(*_: object, **__: object) -> None:
        raise pretrain.HubUnreachable("hub data set allenai/c4 cannot be reached: offline")

    def stand_in(words: tuple[str, ...], *arguments: object, **options: object) -> tuple:
        if any(word.startswith("hub/") for word in words):
            unreachable()
        assert words == pretrain.EMBEDDED
        raise UserError("reached the embedded corpus")

    monkeypatch.setattr(pretrain, "prepare", stand_in)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--preset", "small", "--out", str(tmp_path / "a")])
    with pytest.raises(UserError, match="reached the embedded corpus"):
        pretrain.main()
    assert "Training on the embedded corpus instead" in capsys.readouterr().out
    words = ["--preset", "small", "--out", str(tmp_path / "b"), "--data", "hub/some/set"]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *words])
    with pytest.raises(pretrain.HubUnreachable):
        pretrain.main()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--heads", "3"], "--dim 32 must be a multiple of --heads 3"),
        (["--heads", "4", "--kv_heads", "3"], "multiple of kv_heads"),
        (["--model", "huge"], "--model 'huge': one of tiny"),
        (["--phases", "3@32"], "--phases have 3 steps in all, --steps says 6"),
        (["--phases", "soon"], "expected STEPS@SEQ_LEN"),
        (["--phases", "6@33"], "does not divide a step's tokens"),
        (["--data", "nowhere.txt"], "nowhere.txt.*no such file"),
        (["--resume"], "--resume: no checkpoint"),
        (["--device", "cuda"], "no CUDA device"),
    ],
)
def test_bad_usage_is_named_before_anything_heavy(
    words: list[str], message: str, corpus: Path, tmp_path: Path
) -> None:
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(UsageError, match=message):
        run(corpus, tmp_path / "a", *words)


def test_bad_data_is_named(corpus: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text((corpus / "text.jsonl").read_text() + '{"text": "cut off\n')
    with pytest.raises(UserError, match=r"bad.jsonl:121: "):
        run(corpus, tmp_path / "a", "--data", str(bad))
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(UserError, match=r"empty.txt: no text to train a tokenizer on \(it is empty\)"):
        run(corpus, tmp_path / "b", "--data", str(empty))


def test_a_diverging_run_ends_with_a_line(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="20 steps in a row had a loss or gradient norm that is not finite"):
        run(corpus, tmp_path / "a", "--steps", "60", "--lr", "1e30", "--weight_decay", "1e30")


def test_tokenizer_of_another_model_is_refused(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "a")
    run(corpus, tmp_path / "b", "--data", str(corpus / "more.jsonl"))
    words = ("--init_from", str(tmp_path / "a/model"), "--tokenizer", str(tmp_path / "b/model"))
    with pytest.raises(UserError, match=r"does not continue that of .*id \d+ differs"):
        run(corpus, tmp_path / "c", *words)


def test_dry_run_starts_nothing(tmp_path: Path) -> None:
    words = [sys.executable, "pretrain.py", "--preset", "moxin-7b", "--dry_run", "--out", str(tmp_path / "a")]
    shown = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0 and "8,114,180,096" in shown.stdout and not (tmp_path / "a").exists()


def test_golden_losses(corpus: Path, tmp_path: Path) -> None:
    """Guards against silent drift of initialisation, data order, loss or optimizer (torch 2.13.0, CPU,
    float32)."""
    curve = run(corpus, tmp_path / "a", "--steps", "20", "--lr", "1e-2")
    golden = json.loads((ROOT / "tests/fixtures/golden_pretrain.json").read_text())
    assert [curve[step] for step in range(1, 21)] == pytest.approx(golden, abs=2e-4)


@pytest.mark.slow
def test_twenty_kills_change_nothing(corpus: Path, tmp_path: Path) -> None:
    """kill -9 at random instants, during checkpoint writes too; the resumed curve is bitwise the
    uninterrupted one."""
    out, rng = tmp_path / "b", random.Random(1)
    words = ["--data", str(corpus / "text.jsonl"), "--steps", "200", "--save_every", "1"]
    whole = run(corpus, tmp_path / "a", *words[2:])
    kills = partial = 0
    for _ in range(400):
        has = any((out / "checkpoints").glob("step_*"))
        command = [
            sys.executable,
            "pretrain.py",
            *FAST,
            *words,
            "--out",
            str(out),
            *(["--resume"] if has else []),
        ]
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        begun = len(losses(out)) if has else 0
        while process.poll() is None and (not has or len(losses(out)) <= begun) and kills < 24:
            has = any((out / "checkpoints").glob("step_*"))
            time.sleep(0.01)
        if kills < 24 and process.poll() is None:
            time.sleep(rng.random() * 0.3)
            process.kill()
            process.wait()
            kills += 1
            partial += any((out / "checkpoints").glob(".step_*.partial"))
            continue
        assert process.wait() == 0, process.stderr.read()
        break
    assert kills >= 20 and partial > 0, (kills, partial)
    assert losses(out) == whole


def test_readme_commands_exist() -> None:
    """Every `python X.py` and `make TARGET` in the README names something that is there."""
    text = (ROOT / "README.md").read_text()
    for script in set(re.findall(r"python ([\w/]+\.py)", text)):
        assert (ROOT / script).exists(), script
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for target in set(re.findall(r"^make ([a-z-]+)", text, re.M)):
        assert target in targets, target
