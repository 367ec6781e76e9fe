"""Run folders, the spike guard, curves, estimates."""

import json
import math
from pathlib import Path

import pytest

from core.config import RunConfig, UsageError, UserError
from core.estimate import memory_per_device, print_estimate
from core.run import Run, SpikeGuard, draw_curves, due, mfu, read_metrics
from model import PRESETS


def make_run(folder: Path, **options) -> Run:
    return Run(RunConfig(preset="tiny", out=str(folder), device="cpu", **options), "test")


def test_folder_records_configuration_and_metrics(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=3)
    for step in (1, 2, 3):
        run.log(step, 3, loss=1.0 / step)
    mark = run.metrics_bytes()
    run.log(4, 3, loss=9.0)
    run.cut_metrics(mark)
    assert [record["loss"] for record in read_metrics(tmp_path)] == [1.0, 0.5, 1 / 3]
    run.finish({"after": 1}, (("loss",), ("absent",)))
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["steps"] == 3 and {"torch", "revision", "command"} <= saved["environment"].keys()
    assert json.loads((tmp_path / "summary.json").read_text()) == {"after": 1}
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_refuses_to_overwrite_and_to_resume_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--resume: no checkpoint in"):
        make_run(tmp_path, resume=True)
    (tmp_path / "checkpoints/step_000003").mkdir(parents=True)
    with pytest.raises(UsageError, match="holds a run already: continue it with --resume"):
        make_run(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the run folder"):
        make_run(tmp_path / "file" / "below")


def test_batch_must_divide_between_processes(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.world_size = 3
    with pytest.raises(
        UsageError, match=r"--batch_size 16 must be a multiple of the number of processes \(3\)"
    ):
        run.rows(16)


def test_guard_skips_spikes_and_what_is_not_finite() -> None:
    guard = SpikeGuard(window=20)
    assert not guard.accepts(math.nan, 1.0) and not guard.accepts(1.0, math.inf)
    for step in range(40):
        assert guard.accepts(2.0 + 0.1 * math.sin(step), 1.0 + 0.1 * math.cos(step))
    assert not guard.accepts(9.0, 1.0) and not guard.accepts(2.0, 50.0)
    assert guard.skipped == 4 and guard.accepts(2.05, 1.0)
    copy = SpikeGuard(window=20)
    copy.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert copy.state_dict() == guard.state_dict() and not copy.accepts(9.0, 1.0)


def test_guard_gives_up_on_a_broken_run() -> None:
    guard = SpikeGuard(patience=3)
    for _ in range(2):
        assert not guard.accepts(math.nan, 1.0)
    with pytest.raises(UserError, match="3 steps in a row"):
        guard.accepts(math.nan, 1.0)


def test_due_and_mfu() -> None:
    assert [step for step in range(1, 8) if due(3, step)] == [3, 6] and not due(0, 5)

    class H100:
        type = "cpu"

    assert mfu(1e12, H100()) is None


def test_estimate_of_moxin_on_eight_devices(capsys: pytest.CaptureFixture) -> None:
    config = RunConfig(
        preset="moxin-7b", micro_batch_size=2, seq_len=4096, checkpointing="none", dtype="bfloat16"
    )
    memory = memory_per_device(config, PRESETS["moxin-7b"], 8)
    states = memory["weights"] + memory["gradients"] + memory["optimizer"]
    assert states == 16 * 8_114_180_096 / 8
    assert 5.0e6 < (memory["activations"] - 8 * 1024 * 32_000) / 8192 < 5.1e6  # bytes a token
    print_estimate(config, PRESETS["moxin-7b"])
    shown = capsys.readouterr().out
    assert "8,114,180,096" in shown and "training FLOPs" in shown and "memory a device" in shown


def test_curves_need_no_values(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    draw_curves(tmp_path, (("loss",),))
    assert not (tmp_path / "curves.png").exists()


def test_the_guard_forgets_when_other_data_begin():
    guard = SpikeGuard(window=4)
    for _ in range(4):
        assert guard.accepts(1.0, 1.0)
    assert not guard.accepts(9.0, 1.0)
    guard.forget()
    assert guard.accepts(9.0, 1.0) and not guard.accepts(float("nan"), 1.0)
