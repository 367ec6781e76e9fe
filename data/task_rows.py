"""From a benchmark's files to prompts: reading rows, drawing examples, putting the two together.

Rows come from the hub, from a local folder with the same files, or from one file (.jsonl, .json, .parquet,
.csv, .tsv, .zip of these). Examples of a few-shot prompt are drawn as lm-eval draws them, so that the same
files and seed give the same prompts.
"""

import csv
import io
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from core.config import UserError
from data.pictures import Source
from data.readers import read_stream
from data.sources import hub_filesystem
from data.tokenizer import Tokenizer

Row = dict[str, Any]
Grade = dict[str, float]
How = Literal["options", "write", "code", "text", "talk", "look", "look_options"]

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")
FEWSHOT_SEED = 1234  # lm-eval's


@dataclass(frozen=True)
class Item:
    """One question. `example` is how it looks, answered, among the examples of another's prompt."""

    prompt: str
    answer: Any = None  # what the grade is given: a right answer, several, or what judges one
    options: tuple[str, ...] = ()  # possible continuations
    prompts: tuple[str, ...] = ()  # one for each option, where they differ (WinoGrande)
    gold: int = 0  # the right option
    example: str = ""
    intro: str = ""  # stands before the examples
    subject: str = ""  # examples come from the same subject
    pictures: tuple[Source | str, ...] = ()  # names, until `items_of` has made them paths
    messages: tuple[Row, ...] = ()  # the conversation so far, where the question is asked in one


@dataclass(frozen=True)
class Task:
    """What a benchmark asks and how it judges; the first number of a grade is the score."""

    item: Callable[[Row], Item] | None  # None = `made`
    grade: Callable[[Any, Item], Grade]  # of the options' log-likelihoods, or of what was written
    how: How = "options"
    hub: str = ""  # OWNER/NAME/files, with {split} in them
    split: str = "validation"
    examples: str = "train"  # split that examples are drawn from
    shots: int = 0
    first: bool = False  # take the first examples instead of drawing some
    stop: tuple[str, ...] = ()  # what ends an answer, besides the end of text
    max_new_tokens: int = 256
    samples: int = 1
    made: Callable[[int, int], list[Item]] | None = None  # (count, seed) -> items made on the spot


def rows_of(place: str, split: str) -> Iterator[Row]:
    """Rows of one split. Of hub/OWNER/NAME/files and of a folder: the files with the split in their name; a
    file is read whole. Rows of files called after a subject are told which (`subject`)."""
    if place.startswith("hub/"):
        _, owner, name, *_ = place.split("/")
        system: Any = hub_filesystem(f"{owner}/{name}")
        found = system.glob("datasets/" + place.removeprefix("hub/").replace("{split}", split))
    else:
        path, system = Path(place), None
        found = [str(path)] if path.is_file() else [str(p) for p in path.rglob("*") if p.is_file()]
        if path.is_dir():
            found = [name for name in found if split in name.removeprefix(str(path))]
    names = sorted(name for name in found if name.endswith((*SUFFIXES, ".zip")))
    if not names:
        raise UserError(f"{place}: no {split} file ({', '.join(SUFFIXES)}) there")
    for name in names:
        thoughts = thoughts_for(name) if system is None else {}
        with open(name, "rb") if system is None else system.open(name, "rb") as stream:
            for row in read_file(stream, name):
                yield {"subject": subject_of(name, split)} | thoughts | row


def read_file(stream: Any, name: str) -> Iterator[Row]:
    """Rows of one open file. UserError names the line that is none."""
    if name.endswith((".csv", ".tsv")):
        text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
        yield from csv.DictReader(text, delimiter="\t" if name.endswith(".tsv") else ",")
        return
    for place, record in read_stream(stream, name):
        try:
            row = json.loads(record) if isinstance(record, str) else record
            # BIG-Bench Hard has one object with all examples in it.
            rows = row["examples"] if isinstance(row, dict) and set(row) == {"canary", "examples"} else [row]
            yield from ({**row} for row in rows)
        except (ValueError, TypeError):
            raise UserError(f"{place}: not a JSON object; mend the line") from None


def thoughts_for(name: str) -> Row:
    """BIG-Bench Hard's repository has worked examples for bbh/NAME.json in cot-prompts/NAME.txt, below a line
    of dashes."""
    path = Path(name)
    file = path.parent.parent / "cot-prompts" / f"{path.stem}.txt"
    if path.parent.name != "bbh" or not file.is_file():
        return {}
    return {"cot": file.read_text(encoding="utf-8").partition("-----\n")[2].strip() + "\n\n"}


def subject_of(name: str, split: str) -> str:
    """law/val-00000-of-00001.parquet, val/law_val.csv, test/law.csv and law.json are about law."""
    path = PurePosixPath(name)
    stem = path.name.partition(".")[0]
    if stem.startswith(split):
        return path.parent.name
    return stem.removesuffix(f"_{split}")


def items_of(task: Task, name: str, place: str, split: str, limit: int = 0, images: str = "") -> list[Item]:
    """The first `limit` rows (0 = all) as items; pictures lie in `images`, or beside the file."""
    folder = Path(images) if images else Path(place) if Path(place).is_dir() else Path(place).parent
    items = []
    for number, row in enumerate(rows_of(place, split), 1):
        if limit and number > limit:
            break
        try:
            item = task.item(row)
            items.append(replace(item, pictures=tuple(folder / str(name) for name in item.pictures)))
        except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
            what = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{place}: row {number} does not fit the task {name} ({what})") from None
    if not items:
        raise UserError(f"{place}: no rows for the task {name}")
    return items


def with_examples(items: list[Item], pool: list[Item], shots: int, first: bool, same: bool) -> list[str]:
    """The text that stands before each item's own prompt: its intro and `shots` answered examples.

    Drawn one item after the other from one stream of random numbers, so the order of items matters. `same`:
    the pool is the items themselves, and one is never its own example.
    """
    rng, by_subject = random.Random(FEWSHOT_SEED), {}
    for candidate in pool:
        by_subject.setdefault(candidate.subject, []).append(candidate)
    heads = []
    for item in items:
        candidates = by_subject.get(item.subject, []) if first else pool
        if shots + same > len(candidates):
            raise UserError(
                f"--shots {shots}: only {len(candidates)} examples to choose from {item.subject}".rstrip()
            )
        if first:
            chosen = [candidate for candidate in candidates if not same or candidate != item][:shots]
        else:
            chosen = rng.sample(candidates, shots + same) if shots else []
            chosen = [candidate for candidate in chosen if not same or candidate != item][:shots]
        heads.append(item.intro + "".join(f"{example.example}\n\n" for example in chosen))
    return heads


def begins_with_bos(folder: Path, tokenizer: Tokenizer) -> bool:
    """Whether transformers would put the start token before a text: what tokenizer.json's post-processor
    says; with a SentencePiece model alone, as Llama does unless the settings deny it."""
    if tokenizer.bos_id is None:
        return False
    if (folder / "tokenizer.json").is_file():
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        return json.dumps(tokenizer.names[tokenizer.bos_id]) in json.dumps(content.get("post_processor"))
    settings = folder / "tokenizer_config.json"
    known = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    return (folder / "tokenizer.model").is_file() and known.get("add_bos_token", True)
