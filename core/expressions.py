"""Arithmetic written by a model, read safely: text -> small tree -> exact value.

Used by the calculator, the equation solver and the rewards. Nothing is ever handed to Python's own evaluator:
the text is cut into tokens, parsed by the grammar below, and walked with `fractions.Fraction`, so `0.1 + 0.2`
is exactly `0.3`. Length, nesting and size of numbers are limited, so that every input is answered or refused
within milliseconds, power towers and factorials included.

    sum     = product (("+" | "-") product)*
    product = sign (("*" | "/" | "//" | "%") sign | power)*     no operator between = times: 2x, 3(x + 1)
    sign    = ("+" | "-")* power
    power   = postfix (("^" | "**") sign)?
    postfix = atom ("!" | "%")*                                 percent where no divisor follows the "%"
    atom    = number | name | name "(" sum ("," sum)* ")" | "(" sum ")"

A tree is a Fraction, a name (str), or a tuple (operator or function name, operands...).
"""

import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction

MAX_LENGTH = 500  # characters of an expression
MAX_DEPTH = 40  # nested parentheses, signs and powers
MAX_BITS = 1000  # of a numerator or denominator: about 300 decimal digits, within a float's range

Tree = Fraction | str | tuple
Number = Fraction | float

TOKEN = re.compile(
    r"\s*(?:([0-9]+\.?[0-9]*(?:[eE][+-]?[0-9]+)?|\.[0-9]+)|([^\W\d]\w*)|(\*\*|//|[-+*/%^!(),]))"
)
# The same signs from other keyboards and input methods. Superscripts are not mapped: 3² is not 32.
WIDE = "０１２３４５６７８９＋－−–×·÷∕＊／（）［］[]．，％＾！"
SAME_SIGNS = str.maketrans(WIDE, "0123456789+---**//*/()()().,%^!")


class ExpressionError(ValueError):
    """The text is not an expression this file can read, or its value is too large or undefined."""


def exact_root(value: Fraction, degree: int) -> Fraction | None:
    """The rational root of a rational number >= 0 where there is one, else None."""
    roots = []
    for part in (value.numerator, value.denominator):
        root = math.isqrt(part) if degree == 2 else round(part ** (1 / degree))
        if root**degree != part:
            return None
        roots.append(root)
    return Fraction(*roots)


def power(base: Number, exponent: Number) -> Number:
    """base ** exponent: exact for whole exponents and perfect roots, else a float; refused if too large."""
    if base == 0 and exponent < 0:
        raise ExpressionError("zero to a negative power")
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if abs(exponent) * (bits - 1) > MAX_BITS:
            raise ExpressionError("a power too large")
        if exponent.denominator == 1:
            return base**exponent.numerator
        root = exact_root(base, exponent.denominator) if base >= 0 and exponent.denominator <= 8 else None
        if root is not None:
            return root**exponent.numerator
    if base < 0 and exponent != int(exponent):
        raise ExpressionError("a broken power of a negative number")
    return float(base) ** float(exponent)


def factorial(value: Number) -> Fraction:
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= 170:
        raise ExpressionError("a factorial outside 0..170")
    return Fraction(math.factorial(value.numerator))


def divide(left: Number, right: Number) -> Number:
    if right == 0:
        raise ExpressionError("division by zero")
    return left / right


def whole(function: Callable[..., int]) -> Callable[..., Fraction]:
    """A function of whole numbers, refusing others."""

    def wrapped(*values: Number) -> Fraction:
        if any(not isinstance(value, Fraction) or value.denominator != 1 for value in values):
            raise ExpressionError(f"{function.__name__} of a number that is not whole")
        return Fraction(function(*(value.numerator for value in values)))

    return wrapped


def rounded(value: Number, places: Number = Fraction(0)) -> Fraction:
    """To the nearest, halves away from zero as taught at school (Python's own goes to the even neighbour)."""
    if not isinstance(places, Fraction) or places.denominator != 1 or abs(places) > 15:
        raise ExpressionError("round to a strange number of places")
    scaled = abs(Fraction(value)) * Fraction(10) ** places.numerator
    result = Fraction(math.floor(scaled + Fraction(1, 2))) / Fraction(10) ** places.numerator
    return result if value >= 0 else -result


OPERATORS: dict[str, Callable[..., Number]] = {
    "+": lambda left, right: left + right,
    "-": lambda left, right: left - right,
    "*": lambda left, right: left * right,
    "/": divide,
    "//": lambda left, right: Fraction(math.floor(divide(left, right))),
    "%": lambda left, right: left - right * math.floor(divide(left, right)),
    "^": power,
    "negative": lambda value: -value,
    "percent": lambda value: value / 100,
    "factorial": factorial,
}
FUNCTIONS: dict[str, Callable[..., Number]] = {
    "sqrt": lambda value: power(value, Fraction(1, 2)),
    "cbrt": lambda value: power(value, Fraction(1, 3)),
    "pow": power,
    "factorial": factorial,
    "abs": abs,
    "min": min,
    "max": max,
    "round": rounded,
    "floor": lambda value: Fraction(math.floor(value)),
    "ceil": lambda value: Fraction(math.ceil(value)),
    "gcd": whole(math.gcd),
    "lcm": whole(math.lcm),
    "exp": math.exp,
    "ln": math.log,
    "log": math.log,  # natural, as in Python; a second argument is the base
    "lg": math.log10,
    "log10": math.log10,
    "log2": math.log2,
    "sin": math.sin,  # radians
    "cos": math.cos,
    "tan": math.tan,
    "asin": math.asin,
    "acos": math.acos,
    "atan": math.atan,
}
CONSTANTS: dict[str, float] = {"pi": math.pi, "π": math.pi, "e": math.e}


class _Parser:
    """Recursive descent over the grammar above."""

    def __init__(self, text: str):
        if len(text) > MAX_LENGTH:
            raise ExpressionError(f"an expression longer than {MAX_LENGTH} characters")
        text = text.translate(SAME_SIGNS).strip()
        self.tokens: list[tuple[str, str]] = []  # (kind, text)
        position = 0
        while position < len(text):
            match = TOKEN.match(text, position)
            if not match or match[2] and not match[2].isidentifier():
                raise ExpressionError(f"{text[position]!r} does not belong in an expression")
            position = match.end()
            number, name, sign = match.groups()
            self.tokens.append(("number", number) if number else ("name", name) if name else ("sign", sign))
        self.position = 0
        self.depth = 0

    def peek(self) -> tuple[str, str]:
        return self.tokens[self.position] if self.position < len(self.tokens) else ("end", "")

    def take(self, *signs: str) -> str | None:
        """Step over the next token if it is one of these signs."""
        kind, text = self.peek()
        if kind != "sign" or text not in signs:
            return None
        self.position += 1
        return text

    def parse(self) -> Tree:
        tree = self.sum()
        if self.peek()[0] != "end":
            raise ExpressionError(f"unexpected {self.peek()[1]!r}")
        return tree

    def sum(self) -> Tree:
        tree = self.product()
        while sign := self.take("+", "-"):
            tree = (sign, tree, self.product())
        return tree

    def product(self) -> Tree:
        tree = self.sign()
        while True:
            if sign := self.take("*", "/", "//", "%"):
                tree = (sign, tree, self.sign())
            elif self.peek()[0] == "name" or self.peek()[1] == "(":
                tree = ("*", tree, self.power())
            else:
                return tree

    def sign(self) -> Tree:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ExpressionError("an expression nested too deeply")
        if self.take("-"):
            tree: Tree = ("negative", self.sign())
        elif self.take("+"):
            tree = self.sign()
        else:
            tree = self.power()
        self.depth -= 1
        return tree

    def power(self) -> Tree:
        tree = self.postfix()
        return ("^", tree, self.sign()) if self.take("^", "**") else tree

    def postfix(self) -> Tree:
        tree = self.atom()
        while True:
            if self.take("!"):
                tree = ("factorial", tree)
            elif self.peek()[1] == "%" and not self.divides_after():
                self.position += 1
                tree = ("percent", tree)
            else:
                return tree

    def divides_after(self) -> bool:
        """Whether the token after a "%" begins a number, so that it means remainder: 17 % 5, but 5% - 1."""
        following = self.tokens[self.position + 1 : self.position + 2]
        return bool(following) and (following[0][0] in ("number", "name") or following[0][1] == "(")

    def atom(self) -> Tree:
        kind, text = self.peek()
        self.position += 1
        if kind == "number":
            if abs(int(text.lower().partition("e")[2] or 0)) > 300:
                raise ExpressionError("an exponent too large")
            return Fraction(text)
        if kind == "name" and text in FUNCTIONS:
            if not self.take("("):
                raise ExpressionError(f"{text} needs parentheses")
            arguments = [self.sum()]
            while self.take(","):
                arguments.append(self.sum())
            self.close()
            return (text, *arguments)
        if kind == "name":
            return text
        if (kind, text) == ("sign", "("):
            tree = self.sum()
            self.close()
            return tree
        raise ExpressionError(f"unexpected {text!r}" if text else "an expression that ends too early")

    def close(self) -> None:
        if not self.take(")"):
            raise ExpressionError("a parenthesis that is not closed")


def parse(text: str) -> Tree:
    """Text -> tree. Raises ExpressionError for anything outside the grammar or past the limits."""
    return _Parser(text).parse()


def names(tree: Tree) -> set[str]:
    """The names in a tree, constants included, functions not."""
    if isinstance(tree, str):
        return {tree}
    return set().union(*map(names, tree[1:])) if isinstance(tree, tuple) else set()


def literals(tree: Tree) -> list[Fraction]:
    """The numbers written in a tree, from left to right."""
    if isinstance(tree, Fraction):
        return [tree]
    return [number for part in tree[1:] for number in literals(part)] if isinstance(tree, tuple) else []


def operators(tree: Tree) -> set[str]:
    """The operators and functions used in a tree."""
    return {tree[0]}.union(*map(operators, tree[1:])) if isinstance(tree, tuple) else set()


def evaluate(tree: Tree, values: Mapping[str, Number] = CONSTANTS) -> Number:
    """The value of a tree: a Fraction where it is exact, else a float. `values` gives its names.

    Raises ExpressionError where the value is undefined, complex, unknown or too large.
    """
    if isinstance(tree, Fraction):
        value: Number = tree
    elif isinstance(tree, str):
        if tree not in values:
            raise ExpressionError(f"unknown name {tree!r}")
        value = values[tree]
    else:
        function = OPERATORS.get(tree[0]) or FUNCTIONS[tree[0]]
        try:
            value = function(*(evaluate(part, values) for part in tree[1:]))
        except ExpressionError:
            raise
        except (TypeError, ArithmeticError, ValueError) as error:  # argument count; overflow; domain
            raise ExpressionError(f"{tree[0]}: {error}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ExpressionError("a value that is not finite")
    if not isinstance(value, float):
        value = Fraction(value)
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
            raise ExpressionError("a number too large")
    return value


def decimal(value: Number) -> str:
    """A number as a calculator shows it: exact if it ends within 12 decimals, else 12 significant digits."""
    if isinstance(value, Fraction):
        if value.denominator == 1:
            return str(value.numerator)
        scaled = value * 10**12
        if scaled.denominator == 1:
            digits = str(abs(scaled.numerator)).rjust(13, "0")
            return ("-" if value < 0 else "") + f"{digits[:-12]}.{digits[-12:]}".rstrip("0")
    return f"{float(value):.12g}"
