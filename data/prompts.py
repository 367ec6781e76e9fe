"""Prompts to sample answers for, and a check of the answers where the right one is known.

A source is `conversations` (generated, data/conversations.py), a made task (`sorting`, data/problems.py), or
a file whose records have one of: problem or question, and answer; messages or conversations, of which an
answer at the end is left out; prompt or instruction, a text. `answer`, `task` and `category` are kept where
a record has them.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from core.config import UserError
from core.rewards import REWARDS
from data.conversations import Example, generate, is_right
from data.problems import TASKS, Problems
from data.problems import convert as convert_problem
from data.readers import Message, from_messages, records

# task -> (reply, right answer) -> 1.0 or 0.0
CHECKS: dict[str, Callable[[str, str], float]] = {
    **REWARDS,
    "says": lambda reply, answer: float(is_right(Example("", [], answer), reply)),
}
FRESH = 10_000  # added to the seed of generated conversations: not those that fine-tuning saw


@dataclass(frozen=True)
class Prompt:
    """Messages that end in the user's, and what is known of a right reply."""

    messages: list[Message]
    answer: str = ""
    task: str = ""  # a name in CHECKS; empty = nobody knows the answer
    category: str = ""

    def check(self, reply: str) -> float | None:
        """1.0 for a right reply, 0.0 for a wrong one, None where that cannot be told."""
        return CHECKS[self.task](reply, self.answer) if self.task else None

    def record(self) -> dict[str, Any]:
        """As fields of a JSON line, from which `convert` makes the same prompt."""
        known = {"answer": self.answer, "task": self.task, "category": self.category}
        return {"messages": self.messages, **{name: value for name, value in known.items() if value}}


def read_prompts(
    source: str, count: int, seed: int, with_tools: bool = False, held_out: bool = False
) -> list[Prompt]:
    """The first `count` prompts of a source (0 = all of a file); of what is made, those held out from
    training if asked for. Raises UserError naming file and line."""
    if source == "conversations":
        examples = generate(count, "value" if held_out else "train", seed + FRESH, with_tools)
        return [Prompt(e.messages[:-1], e.answer, "says", e.kind) for e in examples]
    if source in TASKS:
        problems = Problems((source,), seed)
        found = problems.test(count) if held_out else [problems.train(number) for number in range(count)]
        return [from_problem(problem) for problem in found]
    found = []
    for place, record in records(source):
        try:
            found.append(convert(json.loads(record) if isinstance(record, str) else record))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{place}: {what}; mend the record") from None
        if len(found) == count:
            break
    if not found:
        raise UserError(f"{source}: no prompt in it")
    return found


def from_problem(problem: Any) -> Prompt:
    return Prompt([{"role": "user", "content": problem.prompt}], problem.answer, problem.task, problem.task)


def convert(record: Any) -> Prompt:
    """One record -> a prompt. Raises ValueError or KeyError saying what is wrong."""
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, found {type(record).__name__}")
    if "problem" in record or "question" in record and "answer" in record:
        return from_problem(convert_problem(record))
    messages = prompt_messages(record)
    if messages[-1:] and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("no user message to answer")
    task = str(record.get("task") or "")
    if task and task not in CHECKS:
        raise ValueError(f"no task {task!r}; one of {', '.join(CHECKS)}")
    known = "answer" in record and task
    return Prompt(
        messages, str(record["answer"]) if known else "", task if known else "", category_of(record)
    )


def category_of(record: dict[str, Any]) -> str:
    return str(record.get("category") or record.get("task") or "")


def prompt_messages(record: dict[str, Any]) -> list[Message]:
    """The messages of a record that has a prompt under any of its usual names."""
    for name in ("messages", "conversations", "prompt", "question", "instruction"):
        if record.get(name):
            given = record[name]
            break
    else:
        raise ValueError("no messages, conversations, prompt, question or instruction")
    if isinstance(given, str):
        more = record.get("input") if name == "instruction" else ""
        given = [{"role": "user", "content": f"{given}\n{more}" if more else given}]
        if record.get("system"):
            given = [{"role": "system", "content": record["system"]}, *given]
    return from_messages({"messages": given})
