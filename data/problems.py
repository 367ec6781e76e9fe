"""Problems whose answers can be checked: made on the spot, or read from files.

A made task is a function of a random generator, so it has no end; what is held out is held out by key: the
digits to sort, the numbers and target of a Countdown, the expression to compute. Equal keys are never on both
sides. Files are JSON or JSONL with `problem` (or `question`) and `answer`, in the manner of DeepScaleR, GSM8K
(the answer after `####`) and MATH (the answer in the last box of `solution`).

    python data/problems.py steps 5000 thoughts.jsonl      solved problems as conversations for sft.py
"""

import hashlib
import itertools
import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file: import from the repository, not from data/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from core.config import UserError, nearest, require, run_main
from core.rewards import REWARDS, last_boxed
from core.tools import run_commands
from data.readers import Message, records

HELD_OUT = 0.1  # share of keys that training never sees


@dataclass(frozen=True)
class Problem:
    """A question with a checkable answer. `demonstration` is an assistant message that solves it."""

    prompt: str
    answer: str
    task: str = "math"  # its reward in core.rewards.REWARDS
    demonstration: Message = field(default_factory=dict)

    def conversation(self, system: str = "", suffix: str = "") -> list[Message]:
        """The messages before the answer; `suffix` is put behind the question."""
        opening = [{"role": "system", "content": system}] if system else []
        return [*opening, {"role": "user", "content": self.prompt + suffix}]

    def solved(self, system: str = "", suffix: str = "") -> list[Message]:
        """The conversation with its demonstration. Raises UserError where there is none."""
        if not self.demonstration:
            raise UserError(f"no solution to learn from for {self.prompt[:60]!r}; give --init_from MODEL")
        return [*self.conversation(system, suffix), {"role": "assistant", **self.demonstration}]

    @property
    def held_out(self) -> bool:
        """A fixed tenth of all problems, by what is asked, not by when or in which file."""
        digest = hashlib.sha256(self.key.encode()).digest()
        return int.from_bytes(digest[:8], "big") < HELD_OUT * 2**64

    @property
    def key(self) -> str:
        """What must not be on both sides of the split; the order of Countdown's numbers does not matter."""
        if self.task == "countdown":
            numbers, _, target = self.answer.partition("=")
            return f"{' '.join(sorted(numbers.split()))} = {target.strip()}"
        return self.prompt


# Made tasks


def sorting(rng: random.Random, length: int = 8) -> Problem:
    """'sort 73915240' -> '01234579'."""
    digits = "".join(rng.choices("0123456789", k=length))
    ordered = "".join(sorted(digits))
    return Problem(f"sort {digits}", ordered, "sorting", {"content": ordered})


def countdown(rng: random.Random, count: int = 3) -> Problem:
    """'make 22 from 3 5 7' -> an expression over exactly these numbers, '3*5+7'."""
    while True:
        numbers = [rng.randint(1, 20) for _ in range(count)]
        expression, value = str(numbers[0]), Fraction(numbers[0])
        for number in numbers[1:]:
            sign = rng.choice("+-*/")
            wrapped = f"({expression})" if sign in "*/" and not expression.isdigit() else expression
            expression = f"{wrapped}{sign}{number}"
            value = {"+": value + number, "-": value - number, "*": value * number, "/": value / number}[sign]
        if value.denominator == 1 and 1 <= value <= 99:
            break
    shown = " ".join(map(str, rng.sample(numbers, count)))
    answer = f"{shown} = {value}"
    return Problem(f"make {value} from {shown}", answer, "countdown", {"content": expression})


def arithmetic(rng: random.Random) -> Problem:
    """'compute 38+45' -> '83': sums and differences of two numbers below 100."""
    left, right, sign = rng.randint(0, 99), rng.randint(0, 99), rng.choice("+-")
    value = str(left + right if sign == "+" else left - right)
    return Problem(f"compute {left}{sign}{right}", value, "math", {"content": value})


OPERATIONS = ("+1", "+2", "+3", "-1", "-2", "-3", "*2", "*3")


def steps(rng: random.Random, count: int = 5, thoughts: bool = True) -> Problem:
    """'last digit: 4 *2 -3 *2 +3 -1' -> '2', with each intermediate digit thought aloud.

    One step is a table of 80 entries. Five in a row, in which the order matters, are more than a small model
    does at once.
    """
    value = rng.randint(0, 9)
    words, lines = [str(value)], []
    for operation in rng.choices(OPERATIONS, k=count):
        sign, number = operation[0], int(operation[1:])
        result = {"+": value + number, "-": value - number, "*": value * number}[sign] % 10
        words.append(operation)
        lines.append(f"{value}{operation}={result}")
        value = result
    content = f"<think>{' '.join(lines)}</think>\\boxed{{{value}}}" if thoughts else f"\\boxed{{{value}}}"
    return Problem(f"last digit: {' '.join(words)}", str(value), "math", {"content": content})


def products(rng: random.Random) -> Problem:
    """'compute 482*917': beyond a small model, one call for the calculator. Needs the moss format.

    Numbers of two or three digits: where all have three, a model learns to copy six digits from a fixed
    distance and never the seventh part of all results that have five.
    """
    left, right = (rng.randint(10, 10 ** rng.randint(2, 3) - 1) for _ in range(2))
    value = str(left * right)
    commands = f'Calculate("{left}*{right}")'
    results = run_commands(commands, ["Calculate"]).text
    message = {"commands": commands, "results": results, "content": value}
    return Problem(f"compute {left}*{right}", value, "math", message)


TASKS: dict[str, Callable[[random.Random], Problem]] = {
    "sorting": sorting,
    "countdown": countdown,
    "arithmetic": arithmetic,
    "steps": steps,
    "steps-direct": lambda rng: steps(rng, thoughts=False),  # the answer alone, to compare with
    "products": products,
}


def made(task: str) -> Iterator[Problem]:
    """An endless stream of problems of a made task, the same every time."""
    return (TASKS[task](random.Random(f"{task}/{number}")) for number in itertools.count())


# Files


def convert(record: dict[str, Any]) -> Problem:
    """One record of a known schema. Raises ValueError or KeyError saying what is wrong."""
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, found {type(record).__name__}")
    prompt = record["problem"] if "problem" in record else record["question"]
    solution = str(record.get("solution") or "")
    answer = str(record["answer"]) if "answer" in record else last_boxed(solution)
    if answer is None:
        raise ValueError("no `answer`, and no \\boxed{} in `solution`")
    if "####" in answer:  # GSM8K: reasoning with <<calculator notes>>, then the answer
        reasoning, _, answer = answer.partition("####")
        solution = f"{re.sub('<<[^<>]*>>', '', reasoning).strip()}\n\\boxed{{{answer.strip()}}}"
    if not isinstance(prompt, str) or not prompt.strip() or not answer.strip():
        raise ValueError("an empty problem or answer")
    task = record.get("task", "math")
    if task not in REWARDS:
        raise ValueError(f"no task {task!r}; one of {', '.join(REWARDS)}")
    return Problem(prompt.strip(), answer.strip(), task, {"content": solution} if solution else {})


def read_problems(source: str | Path, skip_bad: bool = False) -> tuple[list[Problem], list[str]]:
    """All problems of a file, a folder or hub/OWNER/NAME[/FILE], and "file:line: what" a bad record."""
    problems, remarks = [], []
    for place, record in records(str(source)):
        try:
            problems.append(convert(json.loads(record) if isinstance(record, str) else record))
        except (ValueError, KeyError, TypeError) as error:
            what = f"no field {error}" if isinstance(error, KeyError) else str(error)
            if not skip_bad:
                raise UserError(f"{place}: {what}; mend the record or pass --skip_bad") from None
            remarks.append(f"{place}: {what}")
    if not problems:
        raise UserError(f"{source}: no usable problem in it")
    return problems, remarks


# What a run draws from


class Problems:
    """The problems of a run, from one or more sources NAME_OR_PATH[:weight], each split by key."""

    def __init__(self, sources: tuple[str, ...], seed: int, skip_bad: bool = False):
        self.seed = seed
        self.weights: dict[str, float] = {}
        self.read: dict[str, list[Problem]] = {}  # of files; made tasks have no list
        self.remarks: list[str] = []
        for source in sources:
            name, weight = source.rsplit(":", 1) if re.search(r":[\d.]+$", source) else (source, "1")
            self.weights[name] = float(weight)
            if name in TASKS:
                continue
            if not name.startswith("hub/") and not Path(name).exists():
                known = ", ".join(TASKS)
                raise UserError(f"--data {name}: neither a file nor a task ({known}){nearest(name, TASKS)}")
            self.read[name], remarks = read_problems(name, skip_bad)
            self.remarks += remarks
        self.sizes = {name: sum(not p.held_out for p in pool) for name, pool in self.read.items()}
        self.orders: dict[tuple[str, int], list[Problem]] = {}

    def train(self, index: int) -> Problem:
        """Training problem number `index` of the run's endless order: a function of the seed."""
        rng = random.Random(f"{self.seed}/{index}")
        name = rng.choices(list(self.weights), list(self.weights.values()))[0]
        if name in TASKS:
            return next(p for p in (TASKS[name](rng) for _ in itertools.count()) if not p.held_out)
        size = self.sizes[name]
        return self.order(name, index // size)[index % size]

    def order(self, name: str, epoch: int) -> list[Problem]:
        """A file's training problems in the order of one pass through it."""
        if (name, epoch) not in self.orders:
            self.orders = {key: order for key, order in self.orders.items() if key[0] != name}
            side = [problem for problem in self.read[name] if not problem.held_out]
            random.Random(f"{self.seed}/{name}/{epoch}").shuffle(side)
            self.orders[name, epoch] = side
        return self.orders[name, epoch]

    def test(self, count: int) -> list[Problem]:
        """`count` held-out problems (fewer if a file has fewer), the same in every run."""
        share = -(-count // len(self.weights))
        found: list[Problem] = []
        for name in self.weights:
            pool = self.read[name] if name in self.read else made(name)
            found += itertools.islice((problem for problem in pool if problem.held_out), share)
        return found[:count]


def main() -> None:
    usage = "python data/problems.py TASK_OR_FILE COUNT FILE"
    require(len(sys.argv) == 4 and sys.argv[2].isdecimal(), usage)
    source, count, path = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    problems = Problems((source,), seed=0)
    talks = [json.dumps({"messages": problems.train(n).solved()}, ensure_ascii=False) for n in range(count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(talks) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
