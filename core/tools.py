"""MOSS's four tools and the loop around them: search, calculator, equation solver, text-to-image.

In a turn the model writes thoughts, then a list of commands such as `Calculate("17*24"), Search("Jupiter")`.
The program runs them and shows the results, from which the model writes its answer. What the model writes is
only ever text here: commands are read by one regular expression, expressions by `core.expressions`, equations
in a process of their own, queries as quoted words, pictures as scenes of `core.scenes`.

The rules of the loop are those of MOSS's public backend: at most four calls, in a fixed order, each with a
time limit, disabled and unknown tools passed over, a failure shown as None, search results numbered across a
turn. Results can hold anybody's words, so `neutralise` keeps them from posing as markers of a conversation.
"""

import functools
import json
import math
import re
import sqlite3
import threading
import time
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from core.config import UsageError, UserError, nearest
from core.expressions import ExpressionError, decimal, evaluate, parse
from core.scenes import SceneError, draw
from core.scenes import parse as parse_scene
from core.symbolic import solve_equations

MAX_CALLS = 4  # in one turn
MAX_COMMANDS = 4000  # characters of a command list
MAX_RESULT = 400  # characters of one result
MAX_FOUND = 3  # search results of one query
PICTURE_SIZE = 256  # pixels


# Calculator


def calculate(expression: str) -> str | None:
    """'17*24' -> '408'; exact fractions inside, at most 12 digits after the point outside."""
    expression = expression.rstrip(" =?？＝")
    if not re.search("[a-z]", expression, re.IGNORECASE):  # in max(1,200) the comma separates
        expression = re.sub(r"(?<=\d)[,，](?=\d{3}(?!\d))", "", expression)
    try:
        return decimal(evaluate(parse(expression)))
    except ExpressionError:
        return None


# Search

CHINESE = r"[\u3400-\u9fff]"
STOP_WORDS = frozenset(
    "a an and are as at be by did do does for from has have how in is it its many much of on or that the "
    "this to was were what when where which who why will with".split()
)
STOP_CHINESE = re.compile("什么|哪里|哪[个些]?|多少?|怎[么样]|如何|谁|是否|[吗呢的了是有在和与及几]")


class SearchIndex:
    """Full-text search (SQLite FTS5, in memory) over titled passages in English and Chinese.

    Chinese has no spaces: its characters are indexed singly and asked for in neighbouring pairs. A text is
    a result if it holds at least half of what the query asks, each term weighed by its rarity. A term that
    is nowhere weighs most, so that a question outside the collection finds nothing.
    """

    def __init__(self, passages: Iterable[tuple[str, str]]):
        titled = list(passages)
        self.passages = [text for _, text in titled]
        self.lock = threading.Lock()
        self.database = sqlite3.connect(":memory:", check_same_thread=False)
        self.database.execute("CREATE VIRTUAL TABLE passages USING fts5(text, tokenize='porter unicode61')")
        for title, text in titled:
            spaced = re.sub(f"({CHINESE})", r" \1 ", f"{title}\n{text}")
            self.database.execute("INSERT INTO passages VALUES (?)", (spaced,))

    @staticmethod
    def terms(query: str) -> list[str]:
        """FTS5 phrases of a query: words, and pairs of Chinese characters. Nothing but letters and digits."""
        query = STOP_CHINESE.sub(" ", query[:MAX_RESULT].lower())
        found = []
        for run in re.findall(rf"{CHINESE}+|(?:(?!{CHINESE})[^\W_])+", query):
            if re.match(CHINESE, run):
                found += [" ".join(run[index : index + 2]) for index in range(max(1, len(run) - 1))]
            elif run not in STOP_WORDS:
                found.append(run)
        return list(dict.fromkeys(found))[:32]

    def search(self, query: str, timeout: float) -> list[str]:
        """At most MAX_FOUND passages, best first."""
        deadline = time.monotonic() + timeout
        scores: dict[int, float] = {}
        ranks: dict[int, float] = {}  # BM25, the lower the better: decides between equal scores
        wanted = 0.0
        with self.lock:
            self.database.set_progress_handler(lambda: time.monotonic() > deadline, 10_000)
            for term in self.terms(query):
                rows = self.database.execute("SELECT rowid, rank FROM passages(?)", (f'"{term}"',)).fetchall()
                rarity = math.log((len(self.passages) + 1) / (len(rows) + 0.5))
                wanted += rarity
                for row, rank in rows:
                    scores[row] = scores.get(row, 0.0) + rarity
                    ranks[row] = ranks.get(row, 0.0) + rank
        good = [row for row, score in scores.items() if score >= 0.5 * wanted]
        good.sort(key=lambda row: (-scores[row], ranks[row]))
        return [self.passages[row - 1] for row in good[:MAX_FOUND]]


def read_passages(path: Path) -> Iterator[tuple[str, str]]:
    """(title, text) of a JSONL file, of the paragraphs of a text file, or of all such files in a folder."""
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.suffix in (".jsonl", ".txt", ".md"):
                yield from read_passages(file)
        return
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read documents: {error}") from None
    if path.suffix != ".jsonl":
        yield from ((path.stem, part.strip()) for part in re.split(r"\n\s*\n", content) if part.strip())
        return
    for number, line in enumerate(content.splitlines(), 1):
        try:
            document = json.loads(line)
            yield document.get("title", ""), document["text"]
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise UserError(f'{path}:{number}: expected an object with "text"') from None


@functools.cache
def load_index(path: str = "") -> SearchIndex:
    """The index over a file or folder of documents; empty = the small bilingual set beside this file."""
    return SearchIndex(read_passages(Path(path or Path(__file__).with_name("documents.jsonl"))))


# The tools by name


@dataclass(frozen=True)
class Tool:
    """How a tool appears to the model and on the command line."""

    flag: str  # in --tools
    title: str  # in the meta-instruction
    parameter: str


TOOLS = {  # in the order in which calls of one turn are run
    "Search": Tool("search", "Web search", "query"),
    "Calculate": Tool("calculator", "Calculator", "expression"),
    "Solve": Tool("solver", "Equation solver", "equation"),
    "Text2Image": Tool("picture", "Text-to-image", "description"),
}


def tool_names(flags: Iterable[str]) -> tuple[str, ...]:
    """('calculator', 'search') -> ('Search', 'Calculate'); 'all' = all. UsageError names the nearest."""
    by_flag = {tool.flag: name for name, tool in TOOLS.items()}
    flags = list(by_flag) if list(flags) == ["all"] else list(flags)
    for flag in flags:
        if flag not in by_flag:
            raise UsageError(f"no tool {flag!r}{nearest(flag, by_flag)}; one of {', '.join(by_flag)}, all")
    return tuple(name for flag, name in by_flag.items() if flag in flags)


PERSONA = "You are MOSS.\n"


def meta_instruction(enabled: Collection[str] = (), persona: str = PERSONA) -> str:
    """What opens a conversation: who speaks, and a line a tool with its switch and signature.

    The switches have the form of MOSS's own, which lists two more, image edition and speech, that never
    existed, and opens with 200 words on its character: pass those as `persona` to a published model.
    """
    lines = [f"- Inner thoughts: {'enabled' if enabled else 'disabled'}."]
    for name, tool in TOOLS.items():
        switch = f"enabled. API: {name}({tool.parameter})" if name in enabled else "disabled."
        lines.append(f"- {tool.title}: {switch}")
    return persona + "Capabilities and tools that MOSS can possess.\n" + "\n".join(lines) + "\n"


def call(
    name: str, argument: str, timeout: float = 1.5, index: SearchIndex | None = None
) -> tuple[list[str], Image.Image | None]:
    """Run one tool. Returns its result lines, none on any failure, and a picture if it drew one."""
    if name == "Calculate":
        result = calculate(argument)
        return ([result] if result else []), None
    if name == "Solve":
        return (solve_equations(argument, timeout) or "").splitlines(), None
    if name == "Search":
        try:
            return (index or load_index()).search(argument, timeout), None
        except sqlite3.OperationalError:  # interrupted: out of time
            return [], None
    if name == "Text2Image":
        try:
            return ["Image generated successfully."], draw(parse_scene(argument), PICTURE_SIZE)
        except SceneError:
            return [], None
    return [], None


def run(name: str, argument: str, timeout: float = 1.5) -> str | None:
    """The result of one tool as text, or None on any failure: run('Calculate', '17*24') -> '408'."""
    lines, _ = call(name, argument, timeout)
    return "\n".join(clean(line) for line in lines) or None


# The loop


@dataclass(frozen=True)
class Command:
    name: str
    argument: str


@dataclass
class Outcome:
    """What a turn's commands gave: the body of Results, and what is for people rather than the model."""

    text: str = "None"
    pictures: list[Image.Image] = field(default_factory=list)
    calls: int = 0
    failures: int = 0


CALL = re.compile(
    r"""\s*([A-Za-z0-9]+)\(\s*(?:"((?:[^"\\]|\\.)*)"|'((?:[^'\\]|\\.)*)')\s*\)\s*(,|$)""", re.DOTALL
)
MARKER = re.compile(r"<(?=[|/a-zA-Z])")


def parse_commands(text: str) -> list[Command] | None:
    """'Calculate("17*24"), Search("pi")' -> its commands, 'None' -> [], anything else -> None (malformed)."""
    text = text.strip()
    if text in ("None", ""):
        return []
    commands, position = [], 0
    while position < len(text) <= MAX_COMMANDS:
        match = CALL.match(text, position)
        if not match:
            return None
        argument = match[2] if match[2] is not None else match[3]
        commands.append(Command(match[1], re.sub(r"\\(.)", r"\1", argument, flags=re.DOTALL)))
        position = match.end()
    return commands or None


def neutralise(text: str) -> str:
    """Text of foreign origin made unable to pose as a marker or header of any chat format we use.

    Invisible characters go, since they could hide inside a marker, and `<` before a letter, `/` or `|` gets a
    space after it: `<|Human|>:` and `<eom>` become `< |Human|>:` and `< eom>`.
    """
    hidden = ("Cc", "Cf", "Cs", "Co")  # control, format, surrogate, private use
    visible = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in hidden)
    return MARKER.sub("< ", visible)


def clean(text: str) -> str:
    """A result fit for the conversation: one line, harmless, cut to MAX_RESULT characters."""
    return " ".join(neutralise(text[: 2 * MAX_RESULT]).split())[:MAX_RESULT]


def run_commands(
    commands: str | list[Command] | None,
    enabled: Collection[str],
    timeout: float = 1.5,
    index: SearchIndex | None = None,
) -> Outcome:
    """Run a turn's commands (text of the Commands field, or parsed) and write the body of its Results field.

        Calculate("17*24") => '408'
        Search("Jupiter") =>
        <|1|>: 'Jupiter is the largest planet ...'

    At most MAX_CALLS calls are run, in the order of TOOLS, each within `timeout` seconds of work. If there is
    nothing to run, or the list is malformed, the body is "None"; a call that fails is "=> None".
    """
    if isinstance(commands, str):
        commands = parse_commands(commands)
    allowed = [command for command in commands or [] if command.name in enabled][:MAX_CALLS]
    allowed.sort(key=lambda command: list(TOOLS).index(command.name))
    outcome = Outcome(calls=len(allowed))
    lines: list[str] = []
    found = 0  # search results so far: their numbers go on across the calls of a turn
    for command in allowed:
        results, picture = call(command.name, command.argument, timeout, index)
        results = [clean(result) for result in results]
        shown = f'{command.name}("{clean(command.argument)}") =>'
        if not results:
            outcome.failures += 1
            lines.append(f"{shown} None")
        elif command.name == "Search":
            lines.append(shown)
            lines += [f"<|{found + number}|>: '{result}'" for number, result in enumerate(results, 1)]
            found += len(results)
        elif command.name == "Solve":
            lines += [shown, *results]
        elif command.name == "Text2Image":
            lines += results  # MOSS's data has the notice alone
        else:
            lines.append(f"{shown} '{results[0]}'")
        if picture is not None:
            outcome.pictures.append(picture)
    outcome.text = "\n".join(lines) or "None"
    return outcome
