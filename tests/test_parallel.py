"""FSDP2, accumulation, activation checkpointing and compile all compute the same step; checkpoints cross
world sizes."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from core.config import RunConfig, UserError
from core.optimizer import make_adamw, make_muon
from core.parallel import clip_grad_norm, materialize, parallelize, unsharded
from core.resume import Checkpointer
from core.run import Run
from kernels import make_bounds
from model import Config, Transformer
from tests.conftest import run_processes

SHAPE = Config(vocab_size=97, layers=2, dim=32, heads=4, kv_heads=2, head_dim=8, ffn_dim=48, max_seq_len=64)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Eight sequences with uneven numbers of counted targets, and two documents in each."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 97, (8, 24), generator=generator)
    targets = torch.where(torch.rand(8, 24, generator=generator) < 0.6, tokens.roll(-1, 1), -100)
    targets[3] = -100
    return tokens, targets, (torch.arange(24) >= 11).int().expand(8, 24)


def train(folder: str, steps: int = 6, start: int = 0, model_seed: int = 0, **options) -> dict:
    """A miniature stage: the calls every stage script makes, in their order."""
    make = {"adamw": make_adamw, "muon": make_muon}[options.pop("optimizer", "adamw")]
    micro, save = options.pop("micro", 8), options.pop("save", False)
    tied = options.pop("tied", False)
    config = RunConfig(preset="tiny", out=folder, device="cpu", lr=1e-2, **options)
    run = Run(config, "test")
    with torch.device("meta"):
        model = Transformer(dataclasses.replace(SHAPE, tied=tied))
    model = materialize(parallelize(model, run), run)
    model.init_weights(model_seed)
    optimizer = make(model, config.lr, 0.1)
    checkpoints = Checkpointer(run, model, optimizer, {"shape": dataclasses.asdict(model.config)})
    if config.resume:
        start = checkpoints.load()["step"]
    losses, norms = [], []
    for step in range(start, steps):
        tokens, targets, documents = (t[run.rows(8)] for t in batch(step))
        (counted,) = run.sum((targets >= 0).sum())
        total = torch.zeros(())
        for rows in torch.arange(len(tokens)).split(micro):
            loss, _ = model.loss(tokens[rows], targets[rows], make_bounds(24, doc_ids=documents[rows]))
            (loss / counted).backward()
            total += loss.detach()
        norms.append(clip_grad_norm(model, 1.0))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(run.sum(total)[0] / counted)
        if save:
            checkpoints.save(step + 1)
    checkpoints.wait()
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    weights = {name: value.detach().clone() for name, value in whole.items()}
    return {"losses": losses, "norms": norms, "weights": weights}


def close(a: dict, b: dict, tolerance: float) -> None:
    for name in ("losses", "norms"):
        assert torch.allclose(torch.tensor(a[name]), torch.tensor(b[name]), atol=tolerance, rtol=0), name
    for name, value in a["weights"].items():
        assert torch.allclose(value, b["weights"][name], atol=10 * tolerance, rtol=0), name


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return train(str(tmp_path_factory.mktemp("single")))


@pytest.mark.parametrize(
    "options",
    [{"micro": 2}, {"checkpointing": "full"}, {"checkpointing": "selective"}],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_one_process_variants_compute_the_same(options: dict, single: dict, tmp_path: Path) -> None:
    close(train(str(tmp_path), **options), single, 1e-6)


@pytest.mark.parametrize(
    "options", [{"micro": 2}, {"micro": 4, "checkpointing": "full"}], ids=["plain", "full"]
)
def test_two_processes_equal_one(options: dict, single: dict, tmp_path: Path) -> None:
    first, second = run_processes(train, 2, tmp_path, str(tmp_path / "run"), **options)
    close(first, single, 1e-6)
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), f"processes disagree on {name}"


def test_muon_and_tied_weights_on_two_processes(tmp_path: Path) -> None:
    alone = train(str(tmp_path / "one"), optimizer="muon", tied=True)
    shared, _ = run_processes(train, 2, tmp_path, str(tmp_path / "two"), optimizer="muon", tied=True)
    close(shared, alone, 1e-5)


def test_bfloat16_on_two_processes_stays_near_float32(single: dict, tmp_path: Path) -> None:
    low, _ = run_processes(train, 2, tmp_path, str(tmp_path / "run"), dtype="bfloat16")
    difference = (torch.tensor(low["losses"]) - torch.tensor(single["losses"])).abs().max()
    assert 0 < difference < 2e-2


def test_hybrid_sharding_over_two_nodes_of_two(
    single: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    results = run_processes(train, 4, tmp_path, str(tmp_path / "run"), micro=2)
    close(results[3], single, 1e-6)


def test_resume_is_bitwise_on_one_process(single: dict, tmp_path: Path) -> None:
    train(str(tmp_path), steps=3, save=True)
    resumed = train(str(tmp_path), resume=True)
    assert resumed["losses"] == single["losses"][3:]
    assert all(torch.equal(v, single["weights"][n]) for n, v in resumed["weights"].items())


def test_checkpoint_of_two_processes_resumes_on_one_and_on_two(single: dict, tmp_path: Path) -> None:
    run_processes(train, 2, tmp_path, str(tmp_path / "run"), steps=3, save=True)
    two, _ = run_processes(train, 2, tmp_path, str(tmp_path / "run"), resume=True)
    one = train(str(tmp_path / "run"), resume=True)
    for result in (one, two):
        assert torch.allclose(torch.tensor(result["losses"]), torch.tensor(single["losses"][3:]), atol=1e-6)


def test_muon_resumes_bitwise(tmp_path: Path) -> None:
    whole = train(str(tmp_path / "whole"), optimizer="muon")
    train(str(tmp_path / "cut"), steps=3, save=True, optimizer="muon")
    assert train(str(tmp_path / "cut"), resume=True, optimizer="muon")["losses"] == whole["losses"][3:]


def test_damaged_checkpoints_are_named_and_skipped(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train(str(tmp_path), steps=4, save=True, keep_checkpoints=3)
    newest, middle = tmp_path / "checkpoints/step_000004", tmp_path / "checkpoints/step_000003"
    data = next(newest.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-100])
    data = next(middle.glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(bytes(content))
    train(str(tmp_path), resume=True)
    shown = capsys.readouterr().out
    assert "step_000004: " in shown and "step_000003: " in shown and "resumed from" in shown
    assert "step_000002" in shown.split("resumed from")[1]


def test_keeps_the_newest_checkpoints_and_leaves_no_partial_ones(tmp_path: Path) -> None:
    train(str(tmp_path), steps=5, save=True)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_000004", "step_000005"]
    state = json.loads((tmp_path / "checkpoints/step_000005/state.json").read_text())
    assert state["step"] == 5 and state["files"]


def test_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    train(str(tmp_path), steps=2, save=True)
    with pytest.raises(UserError, match="was made with shape"):
        train(str(tmp_path), resume=True, tied=True)


def test_failing_disk_keeps_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import core.resume

    train(str(tmp_path), steps=2, save=True)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(core.resume.dcp, "async_save", full)
    with pytest.raises(UserError, match=r"No space left on device.*newest complete one is .*step_000002"):
        train(str(tmp_path), resume=True, save=True)
    monkeypatch.undo()
    assert len(train(str(tmp_path), resume=True)["losses"]) == 4


def unequal_work(folder: str) -> tuple[float, float]:
    run = Run(RunConfig(preset="tiny", out=folder, device="cpu"), "test")
    with torch.device("meta"):
        model = Transformer(SHAPE)
    model = materialize(parallelize(model, run), run)
    model.init_weights(0)
    tokens = batch(0)[0]
    with unsharded(model), torch.no_grad():
        for _ in range(1 + 3 * run.rank):  # a collective in here would hang
            inside = model(tokens).sum().item()
    with torch.no_grad():
        return inside, model(tokens).sum().item()


def test_unsharded_weights_allow_unequal_work(tmp_path: Path) -> None:
    expected = Transformer(SHAPE)(batch(0)[0]).sum().item()
    for inside, after in run_processes(unequal_work, 2, tmp_path, str(tmp_path / "run")):
        assert inside == pytest.approx(expected, abs=1e-3) and after == pytest.approx(expected, abs=1e-3)
