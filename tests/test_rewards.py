"""Rewards: the same answers in other clothes count, other answers never do, and no completion can do harm."""

import json
import random
import subprocess
import sys
import time

import pytest

from core import algebra, symbolic
from core.rewards import (
    countdown_reward,
    extract_answer,
    is_well_formed,
    math_reward,
    same_answer,
    sorting_reward,
)
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (r"\frac{1}{2}", "0.5"),
        (r"\dfrac12", "1/2"),
        (r"-\frac{3}{4}", r"\frac{-3}{4}"),
        (r"3\frac{1}{2}", "3.5"),
        ("1,234", "1234"),
        (r"\$11,\!111,\!100", "11111100"),
        (r"50\%", "50"),
        (r"90^\circ", "90"),
        ("5 cm", "5"),
        (r"10\text{ cm}^2", "10"),
        ("72 元", "72"),
        ("x=5", "5"),
        ("y = 2x+1", "2x+1"),
        (r"\text{(C)}", "C"),
        (r"\text{Even}", "even"),
        (r"\left(\frac{1}{2},3\right)", "(0.5, 3)"),
        ("1,2", "2,1"),
        (r"\{1,2\}", "2, 1"),
        (r"(-\infty,3]", r"(-\infty, 3]"),
        (r"\pi/4", r"\frac{\pi}{4}"),
        (r"2\sqrt{3}", r"\sqrt{12}"),
        (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
        ("(x+1)^2", "x^{2}+2x+1"),
        ("xy", "yx"),
        ("1e3", "1000"),
    ],
)
def test_same_answers(given, expected):
    assert same_answer(given, expected) and same_answer(expected, given)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", ""),
        ("5", ""),
        ("0.333", "1/3"),
        ("5x", "5"),
        ("5 pi", "5"),
        ("-5", "5"),
        ("50", "500"),
        ("1,2", "12"),
        ("(1,2)", "(2,1)"),
        ("[1,2)", "(1,2)"),
        ("1,2", "1,2,2"),
        ("5, 6", "5"),
        ("5 or 6", "5"),
        ("3:4", "3/4"),
        ("listen", "silent"),
        ("x^2", "x^3"),
        (r"9^{9^{9^{9}}}", "1"),
        ("0", "1e-12"),
        ("3.14159", r"\pi"),
    ],
)
def test_other_answers(given, expected):
    assert not same_answer(given, expected) and not same_answer(expected, given)


@pytest.mark.parametrize(
    ("completion", "answer", "how"),
    [
        (r"so \boxed{5}", "5", "boxed"),
        (r"\boxed{6}, no: \boxed{\frac{10}{2}}.", r"\frac{10}{2}", "boxed"),
        (r"<think>\boxed{6}</think>\boxed{5}", "5", "boxed"),
        (r"<think>a</think>\boxed{6}<think>b</think>\boxed{5}", "5", "boxed"),
        (r"\boxed{6} #### 7 <answer>8</answer>", "6", "boxed"),
        ("3+2=5\n#### 5", "5", "####"),
        ("<answer> 5 </answer>", "5", "<answer>"),
        ("The answer is 5.", "5", "answer is"),
        ("所以答案是5。", "5", "answer is"),
        ("we get 3 + 2 = 5.", "5", "last number"),
        ("it costs 1,234.50 dollars", "1,234.50", "last number"),
    ],
)
def test_where_answers_are_found(completion, answer, how):
    found = extract_answer(completion)
    assert (found.answer, found.how) == (answer, how)


@pytest.mark.parametrize(
    "completion",
    ["", "no answer", r"<think>\boxed{5}", "<think> the answer is 5", r"\boxed{5", r"\boxed{4} and \boxed{5"],
)
def test_where_no_answer_is_found(completion):
    assert extract_answer(completion) is None
    assert math_reward(completion, "5") == 0.0


def test_boxed_only():
    assert math_reward("#### 5", "5") == 1.0
    assert math_reward("#### 5", "5", boxed_only=True) == 0.0
    assert math_reward(r"\boxed{5}", "5", boxed_only=True) == 1.0


def test_format():
    assert is_well_formed("<think>a</think>\n\\boxed{1}")
    assert not is_well_formed("\\boxed{1}")
    assert not is_well_formed("<think>a</think><think>b</think>\\boxed{1}")
    assert not is_well_formed("<think>\\boxed{1}</think> 1")


def test_sorting():
    assert sorting_reward("1 2 3", "1 2 3") == 1.0
    assert sorting_reward("<think>hm 3 2</think> 1 2 3\n", "1 2 3") == 1.0
    assert [sorting_reward(wrong, "1 2 3") for wrong in ("1 2 2", "", "123", "1 2 3 3")] == [0.0] * 4


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("(7-3)*5", 1.0),
        ("(7-3)*5=20", 1.0),
        ("<think>7-3=4</think><answer>5*(7-3)</answer>", 1.0),
        ("(7-3)*5=21", 0.0),
        ("20", 0.0),
        ("(7-3)*5*1", 0.0),
        ("7*3-1", 0.0),
        ("5*5-5", 0.0),
        ("(7-3)^1*5", 0.0),
        ("3!+7*2", 0.0),
        ("5//1*(7-3)", 0.0),
        ("92**7**5**3", 0.0),
        ("", 0.0),
    ],
)
def test_countdown(completion, reward):
    assert countdown_reward(completion, "3 5 7 = 20") == reward


def test_gsm8k(real_data):
    """Every gold solution is right; four perturbed answers of each are wrong, in two ways of marking."""
    rows = [json.loads(line) for line in open(real_data / "math" / "gsm8k.train.jsonl")]
    right = wrong = 0.0
    for row in rows:
        reasoning, _, gold = row["answer"].partition("####")
        gold = gold.strip()
        right += math_reward(row["answer"], gold)
        number = gold.replace(",", "")
        for other in (
            str(int(number) + 1),
            f"-{number}" if number != "0" else "1",
            number + "1",
            number + ".5",
        ):
            wrong += math_reward(f"{reasoning}#### {other}", gold)
            wrong += math_reward(f"<think>{reasoning}</think> \\boxed{{{other}}}", gold)
    assert right >= 0.999 * len(rows) and wrong == 0


def hostile_completions(path: str) -> list[str]:
    """Completions made to hang the grader, to fill memory, to run as code (making `path`), or to fool it."""
    contents = ["9" + "^9" * n for n in range(1, 16)] + ["9" + "^{9" * n + "}" * n for n in range(1, 16)]
    contents += ["9" + "**9" * n for n in range(1, 8)] + ["9" * n + "!" for n in range(1, 12)]
    contents += ["9" * n for n in (50, 301, 4000, 100_000)] + ["0." + "3" * n for n in (50, 290, 9000)]
    contents += ["(" * n + "1" + ")" * n for n in (30, 45, 140, 50_000)]
    contents += ["{" * n + "1" + "}" * n for n in (9, 900)] + [
        r"\boxed{" * 20,
        r"\frac" * 60,
        "x^" * 90 + "x",
    ]
    contents += [r"\frac{" * n + "1" + "}{2}" * n for n in (5, 20, 50)]
    contents += [r"\sqrt{" * n + "2" + "}" * n for n in (5, 40)] + [
        r"\sqrt{-1}",
        r"\sqrt[9]{9}",
        r"\frac{1}{0}",
    ]
    contents += ["(x+1)^{999}", "(x+y+z)^{40}", "x^{x^{x^x}}", "(x+1)(x+2)^{6}", "(" * 30 + "x" + ")^9" * 30]
    contents += ["sin(" * 30 + "x" + ")" * 30, "(1+" * 38 + "x" + ")" * 38, "(x+2)^6(x+2)+1/9^9"]
    contents += [",".join(["x+1"] * n) for n in (2, 3, 70)] + [
        "(" + ",".join(["(x+1)^9"] * 3) + ")",
        "," * 290,
    ]
    contents += (
        "٣ ５ ½ ³ Ⅴ ∞ π 1\u200b 5\u202e \ufeff5 \x00 \ud800 𝟓 五 ５．０ ５/１ −5 ＋5 5° 5% $5$ 5€ €5".split(
            " "
        )
    )
    contents += (
        "nan inf 1e999999 1e-999999 0x5 5j None True 1_0 --5 5;5 5=5 = =5= {} [] () {5 5} [5 5)".split()
    )
    code = """__import__('os').system('touchPATH')|open('PATH','w')|exec("open('PATH','w')")|$(touch PATH)
        ().__class__.__bases__[0].__subclasses__()|eval("open('PATH','w')")|lambda: open('PATH','w')
        \\input{PATH}|\\write18{touch PATH}|';open('PATH','w');'|[open(p,'w') for p in ['PATH']]"""
    contents += [text.strip().replace("PATH", path) for line in code.splitlines() for text in line.split("|")]
    completions = [f"<think>x</think> \\boxed{{{text}}}" for text in contents]
    completions += [f"#### {text}" for text in contents] + [f"<answer>{text}</answer>" for text in contents]
    completions += ["<think>" + "wait " * 50_000, "<think>" * 20_000, "</think>" * 20_000]
    completions += [
        "<think></think>" * 9000,
        "\\boxed{" * 30_000,
        "\\boxed{5}" * 20_000,
        "\\boxed{" + "{}" * 50_000,
    ]
    completions += [
        "#### " * 30_000,
        "<answer>" * 20_000,
        "the answer is " * 9000,
        "1," * 60_000,
        "1.1." * 30_000,
    ]
    completions += [sign * 100_000 for sign in ("{", "}", "#", "-", "9", " ", "\n", "é", "\\", "<", "(")]
    return completions


def test_hostile_completions_are_scored_in_time(tmp_path):
    completions = hostile_completions(str(tmp_path / "made"))
    assert len(completions) >= 200
    symbolic.warm_up()
    slowest = 0.0
    for completion in completions:
        start = time.monotonic()
        assert math_reward(completion, "123457") == 0.0
        assert math_reward(completion, "(x+2)^7") == 0.0
        assert sorting_reward(completion, "1 2 3") == 0.0
        assert countdown_reward(completion, "3 5 7 92 = 22") == 0.0
        slowest = max(slowest, time.monotonic() - start)
    assert slowest < 1.0
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="the size of the process so far is read from /proc")
def test_memory_of_a_question_is_limited():
    """Work that needs more than its share of memory ends without an answer; a modest need is met."""
    code = "import sys; from core import algebra; algebra.equal = lambda size, _: bool(bytearray(int(size)));"
    code += "algebra.answer('equal', 9.0, sys.argv[1], '')"
    for size, wanted in ((algebra.MAX_MEMORY // 4, "true"), (2 * algebra.MAX_MEMORY, "null")):
        command = [sys.executable, "-c", code, str(size)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == wanted, done.stderr


def test_random_texts_never_raise():
    rng = random.Random(0)
    pieces = r"\boxed{ } { \frac \sqrt ( ) , = 1 2 x ^ / + - #### % \text{ cm pi \{ \} [ ] .".split()
    pieces += ["<think>", "</think>", "<answer>", "</answer>", " "]
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 20)))
        assert math_reward(text, rng.choice(["1", "(1,2)", "x+1"]), symbolic=False) in (0.0, 1.0)
        assert countdown_reward(text, "1 2 = 3") in (0.0, 1.0)
