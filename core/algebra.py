"""Algebra with sympy, and the server process that `core.symbolic` asks: `python -m core.algebra`.

Texts are parsed by `core.expressions` and turned into sympy objects one node at a time; sympy's own text
parsers, which evaluate Python, are never used. Each question is answered in a forked child whose time and
memory the kernel limits.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import sympy

from core.expressions import ExpressionError, Tree, decimal, names, parse

SAME_NAME = ("sqrt", "cbrt", "sin", "cos", "tan", "asin", "acos", "atan", "exp", "factorial")  # as in sympy
MAX_MEMORY = 1 << 30  # bytes of address space that a question may add
MAX_EQUATIONS = 6
MAX_DEGREE = 12
MAX_ANSWER = 1000  # characters


def to_sympy(tree: Tree, constants: dict[str, Any]) -> Any:
    """A tree of core.expressions as a sympy object. Names are unknowns unless they are constants."""
    if isinstance(tree, Fraction):
        return sympy.Rational(tree.numerator, tree.denominator)
    if isinstance(tree, str):
        return constants.get(tree) or sympy.Symbol(tree)
    operator, *parts = tree
    values = [to_sympy(part, constants) for part in parts]
    match operator, values:
        case "+", [left, right]:
            return left + right
        case "-", [left, right]:
            return left - right
        case "*", [left, right]:
            return left * right
        case "/", [left, right]:
            return left / right
        case (("^" | "pow"), [left, right]):
            return left**right
        case "negative", [value]:
            return -value
        case "percent", [value]:
            return value / 100
        case (("log" | "ln"), [value]):
            return sympy.log(value)
        case "log", [value, base]:
            return sympy.log(value, base)
        case (("lg" | "log10"), [value]):
            return sympy.log(value, 10)
        case "abs", [value]:
            return sympy.Abs(value)
        case _, [value] if operator in SAME_NAME:
            return getattr(sympy, operator)(value)
    raise ExpressionError(f"{operator} is not for equations")


def split_equations(text: str) -> list[tuple[Tree, Tree]]:
    """'x + y = 5; x - y = 1' -> pairs of trees. Separators: ; , 、 and new lines."""
    for separator in ("；", "，", "、", ",", "\n"):
        text = text.replace(separator, ";")
    equations = []
    for part in filter(None, map(str.strip, text.replace("＝", "=").replace("==", "=").split(";"))):
        sides = part.split("=")
        if len(sides) != 2:
            raise ExpressionError(f"{part!r} is not an equation")
        equations.append((parse(sides[0]), parse(sides[1])))
    if not 1 <= len(equations) <= MAX_EQUATIONS:
        raise ExpressionError(f"expected 1 to {MAX_EQUATIONS} equations")
    return equations


def show(value: Any, as_decimal: bool) -> str:
    """A solution as text: 160/3, 2.5, or both forms of an irrational number, sqrt(2) = 1.41421356237."""
    if value.is_Rational:
        fraction = Fraction(int(value.p), int(value.q))
        return decimal(fraction) if as_decimal else str(fraction)
    approximate = decimal(float(value))
    exact = str(value)
    return f"{exact} = {approximate}" if len(exact) <= 40 and "CRootOf" not in exact else approximate


def divisors(tree: Tree) -> Iterator[Tree]:
    """What a tree divides by: a solution that makes one of these zero is none, even if sympy cancels it."""
    if isinstance(tree, tuple):
        for part in tree[1:]:
            yield from divisors(part)
        if tree[0] == "/":
            yield tree[2]


def solve(text: str) -> str | None:
    """Real solutions of polynomial equations, one a line; None where there are none or infinitely many."""
    equations = split_equations(text)
    pi = {"pi": sympy.pi, "π": sympy.pi}
    unknowns = sorted(set().union(*(names(side) for equation in equations for side in equation)) - set(pi))
    if not 1 <= len(unknowns) <= MAX_EQUATIONS:
        return None
    symbols = [sympy.Symbol(name) for name in unknowns]
    differences = [to_sympy(left, pi) - to_sympy(right, pi) for left, right in equations]
    numerators = [sympy.fraction(sympy.together(difference))[0] for difference in differences]
    polynomials = [sympy.Poly(numerator, *symbols) for numerator in numerators]  # or it raises
    forbidden = [to_sympy(part, pi) for equation in equations for side in equation for part in divisors(side)]
    if any(polynomial.total_degree() > MAX_DEGREE for polynomial in polynomials):
        return None
    if len(symbols) == 1:
        common = sympy.gcd_list(polynomials) if len(polynomials) > 1 else polynomials[0]
        if common.is_zero:
            return None
        roots = sympy.real_roots(common) if common.degree() else []
        solutions = [{symbols[0]: root} for root in roots]
    else:
        solutions = sympy.solve([polynomial.as_expr() for polynomial in polynomials], symbols, dict=True)
    kept: list[dict] = []
    for solution in solutions:
        complete = len(solution) == len(symbols) and all(value.is_number for value in solution.values())
        if not complete:
            return None  # infinitely many
        is_real = all(value.is_real for value in solution.values())
        defined = all(sympy.simplify(divisor.subs(solution)) != 0 for divisor in forbidden)
        if is_real and defined and solution not in kept:
            kept.append(solution)
    kept.sort(key=lambda solution: [float(solution[symbol]) for symbol in symbols])
    return "\n".join(
        f"{symbol}{f'_{index}' if len(kept) > 1 else ''} = {show(solution[symbol], as_decimal='.' in text)}"
        for index, solution in enumerate(kept)
        for symbol in symbols
    )


def equal(left: str, right: str) -> bool:
    """Whether two expressions are the same for all values of their names."""
    constants = {"pi": sympy.pi, "π": sympy.pi, "e": sympy.E, "i": sympy.I}
    difference = to_sympy(parse(left), constants) - to_sympy(parse(right), constants)
    return sympy.simplify(difference) == 0


def answer(question: str, limit: float, *texts: str) -> None:
    """Work out one question in a forked child, print the answer as a line of JSON, and leave."""
    signal.setitimer(signal.ITIMER_REAL, limit)  # its default action ends the process, even inside C code
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MAX_MEMORY,) * 2)
    result: Any
    try:
        result = {"solve": solve, "equal": equal}[question](*texts) or None
    except Exception:  # noqa: BLE001  sympy raises many kinds; whatever it is, this question has no answer
        result = None
    if isinstance(result, str) and len(result) > MAX_ANSWER:
        result = None
    signal.setitimer(signal.ITIMER_REAL, 0)
    os.write(1, json.dumps(result).encode() + b"\n")
    os._exit(0)


def serve() -> None:
    """Answer the questions on standard input until it closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, and its end closes our input
    sympy.simplify(sympy.real_roots(sympy.Symbol("x") ** 2 - 2)[0])  # import what the first question would
    os.write(1, b"ready\n")
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            answer(*json.loads(line))
        if os.waitpid(child, 0)[1] != 0:
            os.write(1, b"null\n")


if __name__ == "__main__":
    serve()
