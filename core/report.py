"""report.html: what a whole road of stages came to, in one file that needs no network.

Everything shown is read from the run folders (config.json, summary.json, curves.png, what eval.py recorded);
nothing is computed here but differences. All text is escaped: some of it a model wrote.
"""

import base64
import html
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.comparison import compare
from core.run import environment, number, write_text

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --yes: #1a7f37; --no: #b35900; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; margin: .5rem 0; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; }
td { white-space: nowrap; } td:first-child { white-space: normal; min-width: 7rem; }
th:first-child, td:first-child { text-align: left; } .yes { color: var(--yes); } .no { color: var(--no); }
pre { background: var(--soft); padding: .6rem; font-size: .8rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; } img.picture { width: 128px; }
.small { opacity: .75; font-size: .85rem; }
"""


@dataclass(frozen=True)
class Comparison:
    """What a stage should have changed: one metric of one task, in the evaluations of two models."""

    stage: str
    task: str
    before: str  # folder of an evaluation
    after: str


class Html(str):
    """Text that is markup already; all other text is escaped where it enters."""


def cell(value: Any) -> str:
    if isinstance(value, Html):
        return value
    shown = number(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
    return html.escape(shown)


def table(head: Iterable[Any], rows: Iterable[Iterable[Any]]) -> Html:
    def line(cells: Iterable[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{cell(value)}</{tag}>" for value in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return Html(f'<div class="wide"><table>{line(head, "th")}{body}</table></div>')


def picture(path: Path, kind: str = "curves") -> Html:
    data = base64.b64encode(path.read_bytes()).decode()
    return Html(f'<img class="{kind}" alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">')


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min"


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested dicts as one, keys joined by a slash; lists are left out."""
    if isinstance(value, dict):
        parts = [flat(inner, f"{name}/{key}" if name else str(key)) for key, inner in value.items()]
        return {key: inner for part in parts for key, inner in part.items()}
    return {name: value} if isinstance(value, int | float | str) else {}


def results(road: Path, evaluations: dict[str, str]) -> Html:
    """One row a task and metric, one column an evaluated model: value and standard error."""
    found = {name: read(road / folder / "summary.json") for name, folder in evaluations.items()}
    rows = dict.fromkeys(
        (kind, task, metric)
        for summary in found.values()
        for kind in ("tasks", "controls")
        for task, metrics in summary.get(kind, {}).items()
        for metric in metrics
    )

    def shown(summary: dict[str, Any], kind: str, task: str, metric: str) -> str:
        value = summary.get(kind, {}).get(task, {}).get(metric)
        return f"{value['value']:.3f} ± {value['stderr']:.3f}" if value else ""

    return table(
        ("task", *found),
        [
            (f"{task}, {metric}" + (" (control)" if kind == "controls" else ""),
             *(shown(summary, kind, task, metric) for summary in found.values()))
            for kind, task, metric in rows
        ],
    )  # fmt: skip


def verdict(low: float, high: float) -> Html:
    """Whether a difference is beyond what the choice of test items explains."""
    if low > 0:
        return Html('<span class="yes">better</span>')
    return Html('<span class="no">worse</span>') if high < 0 else Html("not beyond noise")


def stage_section(road: Path, name: str, what: str, spent: dict[str, Any]) -> str:
    """Command, cost, curves, and the summary's figures, before and after side by side."""
    summary = read(road / name / "summary.json")
    before, after = flat(summary.pop("before", {})), flat(summary.pop("after", {}))
    parts = [f"<h3>{cell(name)}</h3><p>{cell(what)}</p>"]
    if spent:
        memory = spent["peak_memory_bytes"] / 2**20
        cost = f"{duration(spent['seconds'])}, {duration(spent['cpu_seconds'])} of CPU, {memory:,.0f} MiB"
        starts = f", {spent['starts']} starts" if spent["starts"] > 1 else ""
        parts.append(f"<pre>{cell(spent['command'])}</pre><p class='small'>{cost}{starts}</p>")
    if before:
        parts.append(
            table(("", "before", "after"), [(key, before[key], after.get(key, "")) for key in before])
        )
    rest = flat(summary)
    if rest:
        rows = table(("", "value"), rest.items())
        parts.append(f"<details><summary>all other figures</summary>{rows}</details>")
    curves = road / name / "curves.png"
    return "".join(parts) + (picture(curves) if curves.exists() else "")


def samples(road: Path, folder: str, task: str, count: int = 2) -> str:
    """The first right and the first wrong answers of an evaluation, as they were asked and written."""
    path = road / folder / "records.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = [record for record in map(json.loads, lines) if record["task"] == task]
    right = [record for record in records if record["score"]][:count]
    wrong = [record for record in records if not record["score"]][:1]
    shown = []
    for record in right + wrong:
        image = picture(Path(record["picture"]), "picture") if record.get("picture") else ""
        mark = '<span class="yes">right</span>' if record["score"] else '<span class="no">wrong</span>'
        text = f"{record['prompt']}\n→ {record['output']}"
        shown.append(
            f"{image}<pre>{cell(text)}</pre><p class='small'>{mark}; wanted: {cell(record['answer'])}</p>"
        )
    return "".join(shown)


def write_report(
    road: Path,
    stages: list[tuple[str, str]],
    evaluations: dict[str, str],
    comparisons: Iterable[Comparison],
    talks: Iterable[tuple[str, str, str]],
) -> Path:
    """Write ROAD/report.html and return its path.

    stages: (name, what is trained on what); evaluations: model's name -> folder that eval.py wrote;
    talks: (heading, evaluation folder, task) of the samples to show. Evaluations that were not asked for are
    left out, and what would be compared with them.
    """
    evaluations = {
        name: folder for name, folder in evaluations.items() if (road / folder / "summary.json").exists()
    }
    ledger, here = read(road / "stages.json"), environment()
    wall = sum(spent["seconds"] for spent in ledger.values())
    cpu = sum(spent["cpu_seconds"] for spent in ledger.values())
    config = read(road / stages[0][0] / "config.json")
    facts = (
        f"preset {config.get('preset')}, seed {config.get('seed')}, torch {here['torch']}, {here['platform']}"
    )
    rows = []
    for asked in comparisons:
        if not {asked.before, asked.after} <= set(evaluations.values()):
            continue
        found = compare(road / asked.before, road / asked.after).get(asked.task)
        if found:
            low, high = found["low"], found["high"]
            change = f"{found['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
            rows.append((asked.stage, asked.task, change, found["n"], verdict(low, high)))
    shown = [(heading, samples(road, folder, task)) for heading, folder, task in talks]
    body = [
        "<h1>From text to a model that answers, reasons and sees</h1>",
        f"<p>{cell(facts)}<br>{len(stages)} stages, {duration(wall)} of work, {duration(cpu)} of CPU.</p>",
        "<h2>What came out</h2><p>Value and standard error on items that no stage trained on. A control is ",
        "the same task with what should decide it taken away.</p>",
        results(road, evaluations),
        "<h2>Did each stage help?</h2><p>Difference on the same items, with its 95 % interval over items. ",
        "One seed: how much other seeds would differ is in docs/results.md.</p>",
        table(("stage", "task", "after - before", "items", ""), rows),
        "<h2>In its own words</h2>",
        *(f"<h3>{cell(heading)}</h3>{sample}" for heading, sample in shown if sample),
        "<h2>Stage by stage</h2>",
        *(stage_section(road, name, what, ledger.get(name, {})) for name, what in stages),
    ]
    head = "<!doctype html><html lang=en><meta charset=utf-8><title>nanoMoxin</title>"
    head += '<meta name=viewport content="width=device-width, initial-scale=1">'
    path = road / "report.html"
    write_text(path, f"{head}<style>{STYLE}</style><body>{''.join(body)}</body></html>\n")
    return path
