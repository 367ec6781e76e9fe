"""Evaluation: how good is a model, and how sure are we?

    score = sum_i w_i s_i / sum_i w_i  +-  its standard error,      s_i in [0, 1] for question i, w_i mostly 1

Options are scored by their log-likelihood (plain and per character, as lm-eval does), answers that a model
writes by what they say, programs by whether they pass their tests, texts in bits per byte, pictures with two
controls: other questions' pictures, and none. The tasks are in data/tasks.py, a few lines each; suites carry
the papers' shot counts (Moxin, arXiv 2412.06845, section 5; MOSS, DOI 10.1007/s11633-024-1502-8). Every
prompt, output and score is kept in records.jsonl.

    python eval.py --model MODEL                              tasks made on the spot, no files needed
    python eval.py --model MODEL --tasks arc_easy --data questions.jsonl --shots 5 --limit 200
    torchrun --nproc_per_node=8 eval.py --model MODEL --tasks moxin-zero-shot,moxin-few-shot
    python eval.py --compare runs/before runs/after           paired, question by question
"""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from core.checkpoint import resolve_folder
from core.comparison import compare, mean_and_error
from core.config import UsageError, nearest, parse, require, run_main
from core.rollouts import gather
from core.run import Run
from data.asking import ASK, Asking, Pupil, open_model
from data.contamination import contaminated, corpus_texts
from data.task_rows import Item, Task, items_of, with_examples
from data.tasks import SUITES, TASKS, controls


@dataclass(kw_only=True)
class Config(Asking):
    preset: str = "auto"  # small makes more questions
    model: str = ""  # model folder or hub id; empty = that of the newest run in runs/
    tasks: tuple[str, ...] = ("made",)  # NAME[@SHOTS] of data/tasks.py, or a suite's name
    shots: int = -1  # answered examples before each question; -1 = the task's own number
    limit: int = 0  # questions of each task, the first of its file; 0 = all
    made: int = 200  # questions of each task that is made on the spot
    data: tuple[str, ...] = ()  # file or folder, or TASK=PLACE for each task; else the hub
    examples: tuple[str, ...] = ()  # the same for what examples are drawn from; else --data itself
    images: str = ""  # folder that picture names are relative to; empty = beside the file
    out: str = ""  # folder for records.jsonl and summary.json; empty = runs/eval-PRESET
    compare: tuple[str, ...] = ()  # two such folders: print the second's scores less the first's, and stop
    contamination: tuple[str, ...] = ()  # training text, prepared or not, to look for the questions in
    allow_code_execution: bool = False  # run the programs that the model writes (core/code_execution.py)
    samples: int = 1  # programs a question, at --temperature, for pass@k
    max_new_tokens: int = 0  # longest answer; 0 = the task's own
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto = cuda where there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto = bfloat16 on cuda, float32 on cpu
    dry_run: bool = False  # print each task's first prompt, and stop
    resume: ClassVar[bool] = False  # there are no checkpoints to go on from

    def __post_init__(self) -> None:
        for name in ("limit", "max_new_tokens", "seed", "temperature"):
            require(getattr(self, name) >= 0, f"--{name} must not be negative, got {getattr(self, name)}")
        for name in ("made", "samples", "batch_tokens"):
            require(getattr(self, name) > 0, f"--{name} must be at least 1, got {getattr(self, name)}")
        require(self.samples == 1 or self.temperature > 0, "--samples needs a --temperature above 0")
        require(len(self.compare) in (0, 2), "--compare takes two folders of evaluations")


PRESETS: dict[str, dict[str, Any]] = {"tiny": {}, "small": dict(made=1000)}
DRAWN = 10  # pictures of a made task that are kept, for people to see
Values = dict[str, dict[str, Any]]  # {metric: {"value", "stderr", "n"}}


def planned(config: Config) -> dict[str, Task]:
    """The tasks that --tasks asks for, with the shots and limits of the command line."""
    plan = {}
    for word in (word for given in config.tasks for word in SUITES.get(given, (given,))):
        name, _, shots = word.partition("@")
        if name not in TASKS:
            known = f"one of {', '.join(TASKS)}, or a suite: {', '.join(SUITES)}"
            raise UsageError(f"--tasks {name!r}: no such task{nearest(name, [*TASKS, *SUITES])}; {known}")
        require(shots.isdecimal() or not shots, f"--tasks {word!r}: expected NAME@SHOTS")
        task = TASKS[name]
        task = replace(
            task,
            shots=int(shots) if shots else task.shots if config.shots < 0 else config.shots,
            max_new_tokens=config.max_new_tokens or task.max_new_tokens,
            samples=config.samples if task.how == "code" else 1,
        )
        require(
            task.how != "code" or config.allow_code_execution,
            f"{name} runs what the model writes; allow it with --allow_code_execution",
        )
        plan[name] = task
    return plan


def place_of(words: tuple[str, ...], name: str, otherwise: str) -> str:
    """Where a task's rows are: TASK=PLACE, or a place for all tasks."""
    named = dict(word.split("=", 1) for word in words if word.partition("=")[0] in TASKS)
    general = [word for word in words if word.partition("=")[0] not in TASKS]
    require(len(general) < 2, "--data: one place for all tasks, or TASK=PLACE for each")
    return named.get(name) or (general[0] if general else otherwise)


def questions(name: str, task: Task, config: Config) -> tuple[list[Item], list[str]]:
    """The items of a task, and the text before each one's own prompt."""
    place = place_of(config.data, name, task.hub) if task.item else ""
    if not place:
        require(task.made, f"{name}: no data set on the hub has its form; give --data {name}=FILE")
        items = task.made(config.limit or config.made, config.seed)
        return items, [""] * len(items)
    everything = items_of(task, name, place, task.split, 0 if task.shots else config.limit, config.images)
    items = everything[: config.limit or None]
    source = place_of(config.examples, name, place)
    same = source == place and Path(place).is_file()  # one file is both
    pool = everything
    if task.shots and not same:
        pool = items_of(task, name, source, task.examples)
    return items, with_examples(items, pool, task.shots, task.first, same)


def evaluate(
    pupil: Pupil, name: str, task: Task, items: list[Item], heads: list[str], config: Config, run: Run
) -> list[dict[str, Any]]:
    """Records of a task's questions. Each process asks every n-th of them."""
    mine = range(run.rank, len(items), run.world_size)
    own, own_heads = [items[i] for i in mine], [heads[i] for i in mine]
    answers = ASK[task.how](pupil, own, own_heads, task, config) if own else []
    records = []
    for i, item, head, (given, shown) in zip(mine, own, own_heads, answers, strict=True):
        grade = task.grade(given, item)
        metric = next(iter(grade))
        record = {"task": name, "id": i, "subject": item.subject, "prompt": head + item.prompt}
        record |= {"output": shown, "answer": getattr(item.answer, "answer", item.answer)}
        record |= {"score": grade[metric], "weight": grade.get(f"{metric}:weight", 1), "metrics": grade}
        if item.pictures and isinstance(item.pictures[0], Path):
            record["picture"] = str(item.pictures[0])
        elif item.pictures and i < DRAWN and "/" not in name:  # the first that were drawn, kept to be seen
            path = run.folder / f"{name}-{i}.png"
            item.pictures[0]().save(path)
            record["picture"] = str(path)
        records.append(record)
    return sorted(gather(records, run), key=lambda record: record["id"])


def summarise(records: list[dict[str, Any]]) -> Values:
    """Mean, standard error and number of each metric, over the items that have it."""
    values: Values = {}
    for metric in dict.fromkeys(name for record in records for name in record["metrics"] if ":" not in name):
        grades = [record["metrics"] for record in records if metric in record["metrics"]]
        weights = [grade.get(f"{metric}:weight", 1.0) for grade in grades]
        mean, error = mean_and_error([grade[metric] for grade in grades], weights)
        error = None if math.isnan(error) else error  # of a single question it is unknown
        values[metric] = {"value": mean, "stderr": error, "n": len(grades)}
    if "nats_per_token" in values:
        nats = values["nats_per_token"]
        mean = math.exp(nats["value"])
        error = nats["stderr"] and mean * nats["stderr"]
        values["perplexity"] = {"value": mean, "stderr": error, "n": nats["n"]}
    return values


def look_for(items: dict[str, list[Item]], records: list[dict[str, Any]], config: Config) -> dict[str, Any]:
    """Which questions stand in the training text, and what the score is on the others."""
    keys = [(name, i) for name, each in items.items() for i in range(len(each))]
    texts = [" ".join([item.prompt, *item.options]) for each in items.values() for item in each]
    found = dict(
        zip(
            keys, contaminated(texts, (t for p in config.contamination for t in corpus_texts(p))), strict=True
        )
    )
    report = {}
    for name in items:
        own = [record for record in records if record["task"] == name]
        verdicts = [found[name, record["id"]] for record in own]
        clean = [record for record, verdict in zip(own, verdicts, strict=True) if verdict is False]
        report[name] = {"contaminated": verdicts.count(True), "clean": verdicts.count(False)}
        report[name] |= {"too short to tell": verdicts.count(None), "tasks": summarise(clean)}
    return report


def table(rows: dict[str, Values]) -> str:
    """One line a task and metric."""
    lines = [f"{'task':36}{'metric':18}{'value':>10}{'+-':>9}{'n':>8}"]
    for name, values in rows.items():
        for metric, one in values.items():
            error = "-" if one["stderr"] is None else f"{one['stderr']:.4f}"
            lines.append(f"{name:36}{metric:18}{one['value']:10.4f}{error:>9}{one['n']:8}")
    return "\n".join(lines)


def print_comparison(first: str, second: str) -> None:
    print(f"{'task':32}{'difference':>12}{'95 % interval':>22}{'n':>8}")
    for name, found in compare(first, second).items():
        interval = f"{found['low']:+.4f} to {found['high']:+.4f}"
        print(f"{name:32}{found['difference']:+12.4f}{interval:>22}{found['n']:8}")


def main() -> None:
    config = parse(Config, PRESETS, about=__doc__)
    if config.compare:
        return print_comparison(*config.compare)
    plan = planned(config)
    if config.dry_run:
        for name, task in plan.items():
            items, heads = questions(name, task, config)
            print(
                f"--- {name}: {len(items)} questions, {task.shots} shots, asked by {task.how}\n{heads[0]}",
                end="",
            )
            print(items[0].prompt)
        return

    run = Run(config, "eval")
    newest = sorted(Path("runs").glob("*/model/config.json"), key=lambda path: path.stat().st_mtime)
    require(config.model or newest, "--model: no run has left a model in runs/; name a folder or a hub id")
    folder = resolve_folder(config.model or newest[-1].parent)
    run.say(f"asking {folder}")
    pupil = open_model(folder, config, run.dtype, run.device)
    for name, task in plan.items():
        require(pupil.seer or not task.how.startswith("look"), f"{name}: {folder} does not see (vlm.py)")
    asked: dict[str, list[Item]] = {}
    records: list[dict[str, Any]] = []
    summary: dict[str, Any] = {"model": str(folder), "tasks": {}, "controls": {}}
    for name, task in plan.items():
        items, heads = questions(name, task, config)
        run.say(f"{name}: {len(items)} questions, {task.shots} shots")
        asked[name] = items
        own = evaluate(pupil, name, task, items, heads, config, run)
        summary["tasks"][name] = summarise(own)
        if task.how.endswith("options"):
            guess = sum(1 / len(item.options) for item in items) / len(items)
            summary["controls"][f"{name}/guessing"] = {
                "acc": {"value": guess, "stderr": 0.0, "n": len(items)}
            }
        for control, changed in controls(items).items():
            own += evaluate(pupil, f"{name}/{control}", task, changed, heads, config, run)
            summary["controls"][f"{name}/{control}"] = summarise(own[-len(items) :])
        records += own
        if run.main:
            with open(run.folder / "records.jsonl", "a" if len(asked) > 1 else "w", encoding="utf-8") as file:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in own)
        if run.should_stop():
            run.say("stopped: what follows is of the tasks above alone")
            break
    if config.contamination:
        summary["contamination"] = look_for(asked, records, config)
        for name, found in summary["contamination"].items():
            counts = ", ".join(f"{count} {what}" for what, count in found.items() if what != "tasks")
            run.say(f"{name}: {counts}\n{table({'on the clean ones': found['tasks']})}")
    run.say(table(summary["tasks"] | summary["controls"]))
    run.finish(summary, ())
    run.say(f"every prompt and output: {run.folder}/records.jsonl")


if __name__ == "__main__":
    run_main(main)
