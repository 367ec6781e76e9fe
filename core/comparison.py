"""Means with their errors, and whether two models differ on the same questions.

A record is one question to one model: `score`, and where questions do not count alike `weight` (the bytes of
a text, say). Its task's figure is the weighted mean. Two models are compared question by question: what they
both find hard then cancels, and far fewer questions are needed than for two separate means.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from core.config import UserError

Z_95 = 1.959964  # a normal variable is within +-Z_95 with probability 0.95


def mean_and_error(values: Sequence[float], weights: Sequence[float] | None = None) -> tuple[float, float]:
    """Weighted mean and its standard error; the error of a single value is unknown, nan.

    sum(w x) / sum(w), with the variance of a ratio of two means (Cochran, Sampling Techniques, section 2.11):
    n / (n - 1) sum(w^2 (x - mean)^2) / sum(w)^2. With equal weights that is s / sqrt(n).
    """
    weights = weights or [1.0] * len(values)
    count, total = len(values), sum(weights)
    if not total:
        return math.nan, math.nan
    pairs = list(zip(values, weights, strict=True))
    mean = math.fsum(w * x for x, w in pairs) / total
    if count < 2:
        return mean, math.nan
    squares = math.fsum((w * (x - mean)) ** 2 for x, w in pairs)
    return mean, math.sqrt(count / (count - 1) * squares) / total


def read_records(folder: str | Path) -> Iterator[dict[str, Any]]:
    """records.jsonl of an evaluation's folder (or the file itself)."""
    path = Path(folder)
    path = path / "records.jsonl" if path.is_dir() else path
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        reason = f"{path}: {error.strerror}; eval.py writes it into its --out folder"
        raise UserError(reason) from None
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            yield {key: record[key] for key in ("task", "id", "score")} | {"weight": record.get("weight", 1)}
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}:{number}: not a record with task, id and score") from None


def compare(folder_a: str | Path, folder_b: str | Path) -> dict[str, dict[str, float]]:
    """{task: {"difference", "low", "high", "n"}}: B's score less A's on the questions that both were asked.

    low..high is the 95 % confidence interval of the mean difference over questions of this kind, by the
    normal approximation: trust it from some 30 questions on.
    """
    known = {(r["task"], r["id"]): r["score"] for r in read_records(folder_a)}
    pairs: dict[str, list[tuple[float, float]]] = {}
    for record in read_records(folder_b):
        key = record["task"], record["id"]
        if key in known:
            pairs.setdefault(record["task"], []).append((record["score"] - known[key], record["weight"]))
    if not pairs:
        raise UserError(f"{folder_a} and {folder_b} have no question in common")
    found = {}
    for task, both in pairs.items():
        mean, error = mean_and_error(*map(list, zip(*both, strict=True)))
        margin = Z_95 * error
        found[task] = {"difference": mean, "low": mean - margin, "high": mean + margin, "n": len(both)}
    return found
