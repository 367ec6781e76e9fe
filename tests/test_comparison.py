"""Errors of means, and whether an interval holds the truth as often as it says."""

import json
import math
import random
import statistics
from pathlib import Path

import pytest

from core.comparison import compare, mean_and_error
from core.config import UserError


def write(folder: Path, scores: list[float], weights: list[float] | None = None, task: str = "t") -> Path:
    folder.mkdir(exist_ok=True)
    weights = weights or [1.0] * len(scores)
    rows = [
        {"task": task, "id": i, "score": s, "weight": w}
        for i, (s, w) in enumerate(zip(scores, weights, strict=True))
    ]
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_equal_weights_give_the_textbook_error() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    mean, error = mean_and_error(values)
    assert mean == pytest.approx(0.6)
    assert error == pytest.approx(statistics.stdev(values) / math.sqrt(5))
    assert math.isnan(mean_and_error([1.0])[1])


def test_error_of_a_ratio_is_its_spread() -> None:
    """Against the spread of the estimate itself over many draws."""
    rng = random.Random(0)

    def draw() -> tuple[float, float]:
        weights = [rng.uniform(1, 9) for _ in range(200)]
        return mean_and_error([0.3 * w + rng.gauss(0, 1) for w in weights], weights)

    found = [draw() for _ in range(400)]
    spread = statistics.stdev(mean for mean, _ in found)
    assert statistics.mean(error for _, error in found) == pytest.approx(spread, rel=0.1)


def test_intervals_hold_the_truth(tmp_path: Path) -> None:
    """Paired scores with a true difference of 0.1: 95 of 100 intervals hold it, give or take."""
    rng, held, widths = random.Random(1), 0, []
    for _ in range(300):
        hard = [rng.random() for _ in range(120)]
        first = [float(rng.random() < 0.8 * h) for h in hard]
        second = [float(rng.random() < 0.8 * h + 0.1) for h in hard]
        found = compare(write(tmp_path / "a", first), write(tmp_path / "b", second))["t"]
        held += found["low"] <= 0.1 <= found["high"]
        widths.append(found["high"] - found["low"])
    assert 0.91 <= held / 300 <= 0.985
    assert found["n"] == 120


def test_pairing_uses_the_questions_both_were_asked(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", [0, 0, 1, 1]), write(tmp_path / "b", [1, 0, 1])
    found = compare(a, b)
    assert found["t"]["n"] == 3 and found["t"]["difference"] == pytest.approx(1 / 3)
    same = compare(a, a)["t"]
    assert same["difference"] == same["low"] == same["high"] == 0
    weighted = compare(write(tmp_path / "c", [2, 2], [1, 3]), write(tmp_path / "d", [2, 1], [1, 3]))
    assert weighted["t"]["difference"] == pytest.approx(-0.75)


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    a = write(tmp_path / "a", [0, 1])
    with pytest.raises(UserError, match="no question in common"):
        compare(a, write(tmp_path / "b", [0, 1], task="other"))
    with pytest.raises(UserError, match="nowhere"):
        compare(a, tmp_path / "nowhere")
    (tmp_path / "a" / "records.jsonl").write_text('{"task": "t"}\n')
    with pytest.raises(UserError, match="records.jsonl:1"):
        compare(a, a)
