"""Verifiable rewards: was the answer right? Nothing a model writes is executed, and verdicts are quick.

A completion is judged by its final answer alone. The answer is found after `</think>` as the last boxed one,
or else in one of the ways of writing it that other data sets use. Two answers are the same if, in this order,
they are the same text after normalisation, the same rational number, the same number to nine digits, or, if
asked for, the same expression to sympy (`core.symbolic`, a process of its own with a time limit). That is the
order of the MATH graders (Hendrycks et al. 2021; DeepScaleR 2025), with less allowed at each step.

Rewards are 0.0 or 1.0. A reward for the format on top teaches long wrong answers in the right format, so the
format can be a condition (`boxed_only`), never a bonus.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from core.expressions import (
    CONSTANTS,
    ExpressionError,
    Number,
    Tree,
    evaluate,
    literals,
    names,
    operators,
    parse,
)
from core.symbolic import equivalent

MAX_ANSWER = 300  # characters; a longer answer is compared as text only
SYMBOLIC_SECONDS = 0.25  # of sympy for one pair of numbers or expressions
TAIL = 2000  # characters at the end of a completion searched for an answer outside a box


@dataclass(frozen=True)
class Extracted:
    """The final answer of a completion and how it was marked."""

    answer: str
    how: str  # "boxed", "####", "<answer>", "answer is" or "last number"


FALLBACKS = (
    ("####", re.compile(r"####[ \t]*([^\n]{1,300})")),
    ("<answer>", re.compile(r"<answer>(.{1,300}?)</answer>", re.DOTALL)),
    ("answer is", re.compile(r"(?:answer is|答案[是为])[:： ]*([^\n]{1,300}?)[.。]?\s*(?:\n|$)", re.I)),
    ("last number", re.compile(r"(?<![\d.,])(-?\d[\d,]{0,60}(?:\.\d{1,60}|/\d{1,60})?)(?![\d])")),
)


def after_thinking(completion: str) -> str:
    """What follows the last </think>; all of it if there was no thinking; nothing if thinking never ended."""
    if "</think>" in completion:
        return completion.rpartition("</think>")[2]
    return "" if "<think>" in completion else completion


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{...} or \\fbox{...}, braces matched, or None."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    start = text.index("{", start) + 1
    depth = 1
    for position, character in enumerate(text[start : start + 10 * MAX_ANSWER], start):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[start:position]
    return None


def extract_answer(completion: str) -> Extracted | None:
    """The final answer, or None. An opened box that never closes is a cut-off answer, hence none."""
    text = after_thinking(completion)
    if "\\boxed{" in text or "\\fbox{" in text:
        boxed = last_boxed(text)
        return None if boxed is None else Extracted(boxed.strip(), "boxed")
    for how, pattern in FALLBACKS:
        matches = pattern.findall(text[-TAIL:])
        if matches:
            return Extracted(matches[-1].strip(), how)
    return None


# Comparing answers

LAYOUT = re.compile(
    r"\\(?:left|right|displaystyle|limits|,|!|;|:|quad|qquad| )(?![a-z])|[$€£¥~]|\\[$%]|%|\^\{?\\circ\}?|°"
)
WORDS = re.compile(r"\\(?:text|mathrm|mbox|textbf|mathbf|operatorname)\{([^{}]*)\}")
UNIT_NAMES = "mm|cm|dm|km|m|mg|g|kg|ml|l|s|min|h|mph|ft|in|元|个|米|厘米|千米|公里|克|千克|天|小时|分钟|人"
UNIT = re.compile(  # behind a number: words, known abbreviations, or anything set as text
    rf"(?<=[\d)}}])(?:\s+[a-z]{{2,}}|\s*(?:{UNIT_NAMES})|\s*\\(?:text|mathrm|mbox)\{{[^{{}}]*\}})+"
    r"(?:\^\{?[23]\}?|[²³])?$",
    re.IGNORECASE,
)
NAME = re.compile(r"\s*\\?[a-zA-Z]\w{0,20}\s*(?:\([a-z]\))?\s*=")
FRACTION = re.compile(r"\\frac\s*(?:\{([^{}]*)\}|(\w))\s*(?:\{([^{}]*)\}|(\w))")
MIXED = re.compile(r"(?<![\d.])(\d+)\s*\\frac\{(\d+)\}\{(\d+)\}")
ROOT = re.compile(r"\\sqrt\s*(?:\[(\d)\])?\s*(?:\{([^{}]*)\}|(\w))")
SIGNS = {"\\cdot": "*", "\\times": "*", "\\div": "/", "\\pi": " pi ", "−": "-"}
FUNCTION_WORDS = ("pi", "sqrt", "cbrt", "sin", "cos", "tan", "log", "ln", "exp", "abs")


def normalise(answer: str) -> str:
    """An answer undressed: no layout, currency, per cent, degrees, thousands commas, unit, or 'x ='."""
    text = re.sub(r"\\[dt]frac", r"\\frac", answer.strip().rstrip(".。"))
    text = LAYOUT.sub("", text).strip()
    if re.fullmatch(r"[-+]?[\d,]+(\.\d+)?\D{0,20}", text):
        text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    if text.count("=") == 1 and NAME.match(text):
        text = text.partition("=")[2]
    unit = UNIT.search(text.strip())
    if unit and unit[0].strip() not in FUNCTION_WORDS:
        text = text.strip()[: unit.start()]
    text = " ".join(WORDS.sub(r"\1", text).split())
    return text[1] if re.fullmatch(r"\([A-Za-z]\)", text) else text  # the letter of a choice


def plain(text: str) -> str:
    r"""LaTeX -> the syntax of core.expressions: \frac{1}{2}\sqrt{3} -> ((1)/(2))((3)^(1/2))."""
    text = MIXED.sub(r"(\1+(\2)/(\3))", text)
    for _ in range(8):
        before = text
        text = FRACTION.sub(lambda m: f"(({m[1] or m[2]})/({m[3] or m[4]}))", text)
        text = ROOT.sub(lambda m: f"(({m[2] or m[3]})^(1/{m[1] or 2}))", text)
        if text == before:
            break
    for latex, sign in SIGNS.items():
        text = text.replace(latex, sign)
    text = text.replace("{", "(").replace("}", ")").replace("\\", " ")
    # In mathematics xy is x times y: names are single letters, functions and constants excepted.
    return re.sub(r"[a-zA-Z]+", lambda m: m[0] if m[0] in FUNCTION_WORDS else " ".join(m[0]), text)


def split_list(text: str) -> tuple[str, list[str], str] | None:
    """'(1, 2/3)' -> ('(', ['1', '2/3'], ')'); None if there is no comma outside brackets."""
    pairs = (("(", ")"), ("[", "]"), ("\\{", "\\}"), ("(", "]"), ("[", ")"), ("", ""))
    opening, closing = next(pair for pair in pairs if text.startswith(pair[0]) and text.endswith(pair[1]))
    inner = text[len(opening) : len(text) - len(closing)]
    parts, depth = [""], 0
    for character in inner:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return None
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return (opening, [part.strip() for part in parts], closing) if len(parts) > 1 else None


def same_answer(given: str, expected: str, symbolic: bool = True) -> bool:
    """Whether two final answers are the same. Never raises; asks sympy only if `symbolic`, and briefly."""
    if max(len(given), len(expected)) > MAX_ANSWER:
        return given.strip() == expected.strip() != ""
    left, right = normalise(given), normalise(expected)
    if not left or not right:
        return False
    if re.sub(r"\s", "", left).lower() == re.sub(r"\s", "", right).lower():
        return True
    lists = split_list(left), split_list(right)
    if lists[0] and lists[1]:
        return same_list(lists[0], lists[1], symbolic)
    if lists[0] or lists[1]:
        return False
    try:
        trees = parse(plain(left)), parse(plain(right))
    except ExpressionError:
        return False
    free = sorted(names(trees[0]) - set(CONSTANTS))
    if set(free) != names(trees[1]) - set(CONSTANTS):
        return False
    if not free:
        return same_value(*trees, CONSTANTS) is True
    if not symbolic or is_words(left) or is_words(right):
        return False
    # With names in it: try a few odd points, which settles almost every case, and let sympy prove the rest.
    points = [{name: Fraction(start + 7 * i, 11) for i, name in enumerate(free)} for start in (3, 5, 8)]
    tried = [same_value(*trees, {**CONSTANTS, **point}) for point in points]
    if False in tried or True not in tried:
        return False
    return equivalent(plain(left), plain(right), SYMBOLIC_SECONDS)


def same_value(left: Tree, right: Tree, values: Mapping[str, Number]) -> bool | None:
    """Whether two trees have the same value at a point, exactly if rational; None if one has none."""
    try:
        a, b = evaluate(left, values), evaluate(right, values)
    except ExpressionError:
        return None
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    return math.isclose(a, b, rel_tol=1e-9)


def is_words(text: str) -> bool:
    """Whether an answer is in words, which are no product of letters: listen is not silent."""
    return bool(set(re.findall("[a-z]{3,}", re.sub(r"\\[a-zA-Z]+", " ", text).lower())) - set(FUNCTION_WORDS))


def same_list(left: tuple[str, list[str], str], right: tuple[str, list[str], str], symbolic: bool) -> bool:
    """Points and intervals in order and with the same brackets; sets and bare lists in any order."""
    (opening, given, closing), (opening_, expected, closing_) = left, right
    ordered = opening in ("(", "[") or opening_ in ("(", "[")
    if len(given) != len(expected) or ordered and (opening, closing) != (opening_, closing_):
        return False
    if ordered:
        symbolic = symbolic and len(given) <= 3
        return all(same_answer(a, b, symbolic) for a, b in zip(given, expected, strict=True))
    remaining = list(expected)
    for part in given:
        match = next((other for other in remaining if same_answer(part, other, symbolic=False)), None)
        if match is None:
            return False
        remaining.remove(match)
    return True


# Rewards by task


def math_reward(completion: str, answer: str, boxed_only: bool = False, symbolic: bool = True) -> float:
    """1.0 if the completion's final answer is `answer`, else 0.0.

    boxed_only: answers outside \\boxed{} count as none, as in DeepScaleR's and Moxin's training.
    """
    found = extract_answer(completion)
    if found is None or boxed_only and found.how != "boxed":
        return 0.0
    return float(same_answer(found.answer, answer, symbolic))


def final_text(completion: str) -> str:
    """The answer where it is marked, else all that follows the thinking: for tasks without more to say."""
    found = extract_answer(completion)
    marked = found is not None and found.how in ("boxed", "<answer>", "####")
    return (found.answer if marked else after_thinking(completion)).strip()


def sorting_reward(completion: str, answer: str) -> float:
    """1.0 if the completion is the expected sequence, spaces aside."""
    return float(final_text(completion).split() == answer.split())


def countdown_reward(completion: str, answer: str) -> float:
    """1.0 if the completion makes the target from the numbers, each used once. `answer` is '3 5 7 = 22'.

    Only + - * / and parentheses count: the text is parsed and walked with exact fractions, never evaluated.
    """
    numbers, _, target = answer.partition("=")
    expression, *claim = final_text(completion).split("=")
    try:
        tree = parse(expression)
        right = evaluate(tree) == Fraction(target.strip())
    except ExpressionError:
        return 0.0
    allowed = operators(tree) <= {"+", "-", "*", "/"}
    used = Counter(literals(tree)) == Counter(map(Fraction, numbers.split()))
    return float(right and allowed and used and (not claim or claim[0].strip() == target.strip()))


REWARDS: dict[str, Callable[..., float]] = {
    "math": math_reward,
    "sorting": sorting_reward,
    "countdown": countdown_reward,
}


def is_well_formed(completion: str) -> bool:
    """Moxin's format: one <think>...</think>, then an answer in a box."""
    thought, end, reply = completion.partition("</think>")
    once = completion.count("<think>") == 1 and completion.count("</think>") == 1
    return once and bool(end) and thought.lstrip().startswith("<think>") and last_boxed(reply) is not None
