"""Stage 2 from end to end on small data: invariances, an oracle for the loss, resume, tags, bad input."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import sft
from core.checkpoint import load_pretrained
from core.config import UserError
from data.chat import render
from data.conversations import generate
from data.packing import Item, Packer, make_batch, micro_batches
from data.tokenizer import load_tokenizer, train_tokenizer
from model import Config as Shape
from model import Transformer
from tests.conftest import ROOT, run_processes

SHAPE = "--layers 1 --dim 32 --heads 2 --vocab_size 500".split()
RUN = "--device cpu --seq_len 384 --batch_size 8 --micro_batch_size 4 --steps 6 --lr 1e-2".split()
RUN += "--optimizer adamw --warmup_steps 2 --min_lr 0 --schedule cosine".split()
SMALL = "--examples 60 --questions 1 --eval_examples 20 --samples 1".split()
SMALL += "--eval_every 0 --save_every 2 --log_every 1".split()
FAST = [*SHAPE, *RUN, *SMALL]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Away from runs/, where a base model might be found and taken."""
    monkeypatch.chdir(tmp_path)


def run(out: Path, *words: str) -> dict[int, float]:
    """sft.py in this process; the loss of each step."""
    before, sys.argv = sys.argv, ["sft.py", *FAST, "--out", str(out), *words]
    try:
        sft.main()
    finally:
        sys.argv = before
    return losses(out)


def losses(out: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def write_talks(file: Path, count: int = 40, **extra: int) -> Path:
    talks = [example.messages for example in generate(count, with_tools=False)]
    for number, talk in enumerate(talks):
        talk[-1].update({name: number % value for name, value in extra.items()})
    file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return file


def test_a_run_leaves_what_it_promises(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "a"
    curve = run(out, "--steps", "30")
    assert curve[30] < curve[1] - 1
    summary = json.loads((out / "summary.json").read_text())
    assert summary["after"]["val_loss"] < summary["before"]["val_loss"] - 1
    wanted = {"accuracy/value", "accuracy/template", "accuracy/value/well-formed commands"}
    assert wanted <= summary["after"].keys()
    assert summary["tokens"] > summary["trained_tokens"] > 0 and summary["conversations"] == {"kept": 60}
    shown = capsys.readouterr().out
    assert "starting from random weights" in shown and "->" in shown and "next: " in shown
    theirs = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32).eval()
    library = AutoTokenizer.from_pretrained(out / "model")
    talk = generate(7, "value")[6].messages
    ids = library.apply_chat_template(talk, return_dict=False)
    assert ids == render(talk, load_tokenizer(out / "model"), "moss").ids
    ours = load_pretrained(out / "model")
    with torch.no_grad():
        assert (theirs(torch.tensor([ids])).logits - ours(torch.tensor([ids]))).abs().max() < 1e-4


# The loss


@pytest.fixture(scope="module")
def world() -> tuple[Transformer, list[Item]]:
    """A small model in float64 and 10 rendered conversations."""
    talks = [example.messages for example in generate(10)]
    tokenizer = train_tokenizer([turn["content"] for talk in talks for turn in talk], 400)
    shape = Shape(
        vocab_size=tokenizer.vocab_size, layers=2, dim=32, heads=2, kv_heads=1, head_dim=16, ffn_dim=48
    )
    model = Transformer(shape).double()
    parts = [render(talk, tokenizer, "moss") for talk in talks]
    return model, [Item(np.array(part.ids, np.int32), np.array(part.mask)) for part in parts]


def gradients(model: Transformer, micros: list, divisor: float = 1.0) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    total = 0.0
    for micro in micros:
        nats, _ = sft.batch_loss(model, micro)
        (nats / divisor).backward()
        total += nats.item()
    return total, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_close(one: tuple, other: tuple) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-9)
    for name in one[1]:
        assert torch.allclose(one[1][name], other[1][name], rtol=1e-6, atol=1e-9), name


def test_loss_is_that_of_each_conversation_alone(world: tuple) -> None:
    """Against log-softmax over full logits, one conversation at a time: no packing, padding or bounds."""
    model, items = world
    expected = 0.0
    for item in items:
        ids = torch.from_numpy(item.ids).long()
        logprobs = model(ids[None])[0].log_softmax(-1)
        expected -= sum(logprobs[t - 1, ids[t]].item() for t in range(1, len(ids)) if item.mask[t])
    micros = micro_batches(items, 640, True, 4)
    assert sum(sft.batch_loss(model, micro)[0].item() for micro in micros) == pytest.approx(
        expected, rel=1e-6
    )
    assert sum(int((micro.targets >= 0).sum()) for micro in micros) == sum(
        int(i.mask[1:].sum()) for i in items
    )


def test_packed_is_unpacked_and_padding_does_not_matter(world: tuple) -> None:
    model, items = world
    unpacked = gradients(model, micro_batches(items, 640, False, 1))
    for packed, size, width in ((True, 2, 640), (True, 8, 1024), (False, 8, 640)):
        assert_close(gradients(model, micro_batches(items, width, packed, size)), unpacked)
    wide = gradients(model, [make_batch([[item]], 800) for item in items])
    assert_close(wide, unpacked)
    padding = Item(np.zeros(37, np.int32), np.zeros(37, bool))  # a document of padding in front
    assert_close(gradients(model, [make_batch([[padding, item]], 700) for item in items]), unpacked)


def test_all_masked_micro_batch_gives_zero_and_no_nan(world: tuple) -> None:
    model, items = world
    silent = Item(items[0].ids, np.zeros_like(items[0].mask))
    total, grads = gradients(model, [make_batch([[silent], []], 640)])
    assert total == 0 and all((grad == 0).all() for grad in grads.values())
    whole = micro_batches(items[:4], 640, True, 4)
    assert_close(gradients(model, [*whole, make_batch([[silent], []], 640)]), gradients(model, whole))


def test_share_of_processes_covers_every_conversation_once(world: tuple) -> None:
    _, items = world
    for world_size in (1, 2, 3, 5):
        for packed in (True, False):
            shares = [micro_batches(items, 640, packed, 2, rank, world_size) for rank in range(world_size)]
            assert len({len(share) for share in shares}) == 1  # as many forwards on each
            seen = sum(int((micro.doc_ids >= 0).sum()) for share in shares for micro in share)
            assert seen == sum(len(item.ids) for item in items)


def test_curve_does_not_depend_on_packing_micro_batches_or_processes(tmp_path: Path) -> None:
    """1 process x 8 = 2 x 4; the odd batch leaves one process an empty row to run."""
    plain = run(tmp_path / "a", "--batch_size", "7")
    for number, words in enumerate((["--pack", "false"], ["--micro_batch_size", "1"])):
        other = run(tmp_path / f"b{number}", "--batch_size", "7", *words)
        assert max(abs(plain[step] - other[step]) for step in plain) < 1e-5
    words = ("--batch_size", "7", "--micro_batch_size", "2")
    both = run_processes(run, 2, tmp_path, tmp_path / "c", *words)
    assert max(abs(plain[step] - both[0][step]) for step in plain) < 1e-5
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in "ac")
    assert one["tokens"] == two["tokens"]
    assert one["after"]["val_loss"] == pytest.approx(two["after"]["val_loss"], abs=1e-5)


def test_sum_loss_weighs_tokens_alike_in_all_steps(tmp_path: Path) -> None:
    """Its gradient is the token loss's times trained tokens / conversations."""
    for name in ("token", "sum"):
        run(tmp_path / name, "--loss", name, "--steps", "1")
    token, total = (
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])
        for name in ("token", "sum")
    )
    assert total["loss"] == pytest.approx(token["loss"], rel=1e-6)
    assert total["grad_norm"] == pytest.approx(token["grad_norm"] * token["trained_tokens"] / 8, rel=1e-4)


def test_golden_trajectory(tmp_path: Path) -> None:
    """Twenty steps as they were when this was written; another value means that training changed."""
    curve = run(tmp_path / "a", "--steps", "20", "--chat_format", "tulu")
    assert list(curve.values()) == pytest.approx(GOLDEN, abs=2e-3)


GOLDEN = [
    6.8141, 6.5636, 6.2733, 6.1412, 5.5917, 5.5094, 5.2842, 5.1399, 4.6359, 4.7381,
    4.3952, 4.4783, 4.0959, 3.9389, 4.1202, 3.8662, 3.5289, 3.8633, 4.1638, 3.8419,
]  # fmt: skip


# Going on, order, mixture


def test_resume_is_bitwise_and_refuses_other_settings(tmp_path: Path) -> None:
    import shutil

    whole = run(tmp_path / "a")
    run(tmp_path / "b")
    shutil.rmtree(tmp_path / "b/checkpoints/step_000006")
    assert run(tmp_path / "b", "--resume") == whole
    first, second = ((tmp_path / name / "model/model.safetensors").read_bytes() for name in "ab")
    assert first == second
    with pytest.raises(UserError, match="loss"):
        run(tmp_path / "b", "--resume", "--loss", "sum")


def items_of(*lengths: int) -> list[Item]:
    return [Item(np.full(n, n, np.int32), np.ones(n, bool)) for n in lengths]


def test_every_epoch_visits_each_source_by_its_weight() -> None:
    packer = Packer(
        [(items_of(1, 2, 3, 4), 1.0), (items_of(5, 6), 2.5), (items_of(7, 8, 9, 10), 0.5)], 1, seed=3
    )
    assert packer.epoch_size == 4 + 5 + 2
    orders = []
    for epoch in range(2):
        seen = [len(packer.step(epoch * 11 + i)[0].ids) for i in range(11)]
        assert sorted(n for n in seen if n <= 4) == [1, 2, 3, 4]
        assert sorted(n for n in seen if n in (5, 6)) in ([5, 5, 5, 6, 6], [5, 5, 6, 6, 6])
        assert len({n for n in seen if n >= 7}) == 2
        orders.append(seen)
    assert orders[0] != orders[1]
    again = Packer(packer.sources, 1, seed=3)
    assert [len(again.step(i)[0].ids) for i in range(11)] == orders[0]


def test_quality_tags(tmp_path: Path) -> None:
    """Tags stand before the answers if asked for, are never learnt, and are dropped for some of them."""
    tokenizer = train_tokenizer(["Hello there, how are you?"] * 20, 330)
    tags = {tokenizer.special_tokens[f"<quality_{k}>"] for k in range(5)}
    config = sft.Config(chat_format="tulu", quality_tags=True, seq_len=64)
    talks = [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "quality": k % 5}]
        for k in range(200)
    ]
    items, _ = sft.render_all(talks, tokenizer, config)
    assert all(len(tags & set(item.ids.tolist())) == 1 for item in items)
    assert not any(item.mask[np.isin(item.ids, list(tags))].any() for item in items)
    packer = Packer([(items, 1.0)], 200, 0, tuple(tags), dropout=0.1)
    for epoch in range(2):
        bare = sum(not tags & set(item.ids.tolist()) for item in packer.step(epoch))
        assert 5 <= bare <= 40
    config.quality_tags = False
    items, _ = sft.render_all(talks, tokenizer, config)
    assert not any(tags & set(item.ids.tolist()) for item in items)
    file = write_talks(tmp_path / "tagged.jsonl", quality=5)
    curve = run(tmp_path / "run", "--data", str(file), "--chat_format", "tulu", "--quality_tags")
    assert all(math.isfinite(loss) for loss in curve.values())


def test_files_weights_and_length_policy(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    one, two = write_talks(tmp_path / "one.jsonl"), write_talks(tmp_path / "two.jsonl", 20)
    words = ["--chat_format", "tulu", "--seq_len", "48", "--too_long", "drop", "--epochs", "2"]
    run(tmp_path / "a", "--data", f"{one}:0.5", f"{two}:2", *words)
    shown = capsys.readouterr().out
    assert f"{one}: 40 read" in shown and "dropped" in shown
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    assert summary["conversations"]["dropped"] > 0 and not any(
        "accuracy" in name for name in summary["after"]
    )
    assert summary["steps"] == max(losses(tmp_path / "a"))


def test_base_model_is_continued_and_a_strange_tokenizer_refused(tmp_path: Path) -> None:
    first = run(tmp_path / "a")
    base = str(tmp_path / "a/model")
    second = run(tmp_path / "b", "--init_from", base)
    assert second[1] < first[1] - 0.5
    train_tokenizer([f"w{i} {chr(97 + i % 26)}{chr(97 + i // 26 % 26)}" for i in range(3000)], 900).save(
        tmp_path / "t"
    )
    with pytest.raises(UserError, match="not its own"):
        run(tmp_path / "c", "--init_from", base, "--tokenizer", str(tmp_path / "t"), "--seq_len", "1000")


# Mistakes


@pytest.mark.parametrize(
    ("words", "code", "complaint"),
    [
        (["--data", "none.jsonl"], 1, "none.jsonl: no such file"),
        (["--chat_format", "chatml"], 2, "one of tulu, moss"),
        (["--chat_format", "tulu", "--train_on", "moss-official"], 2, "needs --chat_format moss"),
        (["--tag_dropout", "2"], 2, "between 0 and 1"),
        (["--too_lon", "drop"], 2, "did you mean --too_long"),
        (["--init_from", "nowhere"], 1, "nowhere"),
        (["--seq_len", "20"], 2, "nothing to learn"),
    ],
)
def test_mistakes_are_one_line(words: list[str], code: int, complaint: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "sft.py"), *FAST, "--out", str(tmp_path / "run"), *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert ended.returncode == code, ended.stderr
    assert complaint in ended.stderr and ended.stderr.count("\n") == 1


def test_dry_run_says_what_it_will_take(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sys_argv, sys.argv = sys.argv, ["sft.py", *FAST, "--dry_run", "--out", str(tmp_path / "run")]
    try:
        sft.main()
    finally:
        sys.argv = sys_argv
    assert "parameters" in capsys.readouterr().out and not (tmp_path / "run").exists()


@pytest.mark.parametrize("preset", list(sft.PRESETS))
def test_presets_are_valid(preset: str) -> None:
    sft.Config(preset=preset, **sft.PRESETS[preset])
