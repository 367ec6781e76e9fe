"""Every task on made rows in the published schema of its data set: prompt, options, right answer, grade."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from core.config import UserError
from data.task_rows import Item, items_of, read_file, rows_of, with_examples
from data.tasks import SUITES, TASKS, controls, overlap

SENTENCE = "The cup did not fit the box because the _ was too large."
# task: row of the data set, prompt and right continuation as the harness writes them
OPTIONS: dict[str, tuple[dict[str, Any], str, str]] = {
    "hellaswag": (
        {
            "activity_label": "Cooking",
            "ctx_a": "A man [title] stirs.",
            "ctx_b": "he",
            "endings": ["eats [step] soup.", "flies away."],
            "label": "0",
        },
        "Cooking: A man. stirs. He",
        " eats soup.",
    ),
    "piqa": (
        {"goal": "Open it.", "sol1": "Pull.", "sol2": "Sing.", "label": 1},
        "Question: Open it.\nAnswer:",
        " Sing.",
    ),
    "arc_easy": (
        {"question": "Which?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
        "Question: Which?\nAnswer:",
        " b",
    ),
    "commonsenseqa": (
        {"question": "Where? ", "choices": {"label": list("ABCDE"), "text": list("vwxyz")}, "answerKey": "C"},
        "Question: Where?\nA. v\nB. w\nC. x\nD. y\nE. z\nAnswer:",
        " C",
    ),
    "mmlu": (
        {"question": " Why?", "subject": "us_history", "choices": ["p", "q", "r", "s"], "answer": 3},
        "Why?\nA. p\nB. q\nC. r\nD. s\nAnswer:",
        " D",
    ),
    "ceval": (
        dict(id=1, question="哪个？", A="甲", B="乙", C="丙", D="丁", answer="B", subject="law"),
        "哪个？\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案：",
        " B",
    ),
    "cmmlu": (
        dict(Question="哪个？", A="甲", B="乙", C="丙", D="丁", Answer="A", subject="nutrition"),
        "哪个？\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案：",
        " A",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str) -> None:
    row, prompt, right = OPTIONS[name]
    item = TASKS[name].item({"subject": ""} | row)
    assert item.prompt == prompt and f" {item.options[item.gold]}" == right
    assert item.example == prompt + right


def test_intros() -> None:
    assert TASKS["mmlu"].item(OPTIONS["mmlu"][0]).intro == (
        "The following are multiple choice questions (with answers) about us history.\n\n"
    )
    assert TASKS["ceval"].item(OPTIONS["ceval"][0]).intro.startswith("以下是中国关于法学的单项选择题")
    assert TASKS["cmmlu"].item(OPTIONS["cmmlu"][0]).intro.startswith("以下是关于营养学的单项选择题")


def test_both_schemas_of_commonsenseqa() -> None:
    old = {
        "answerKey": "B",
        "question": {"stem": "Where?", "choices": [{"label": x, "text": x * 2} for x in "ABCDE"]},
    }
    item = TASKS["commonsenseqa"].item(old)
    assert item.gold == 1 and "B. BB\n" in item.prompt


def test_winogrande_puts_the_names_into_the_prompt() -> None:
    item = TASKS["winogrande"].item({"sentence": SENTENCE, "option1": "cup", "option2": "box", "answer": "1"})
    assert item.prompts == (
        "The cup did not fit the box because the cup",
        "The cup did not fit the box because the box",
    )
    assert item.options == ("was too large.",) * 2 and item.gold == 0
    assert item.example == "The cup did not fit the box because the cup was too large."


def test_truthfulqa() -> None:
    targets = {"choices": ["yes", "no", "maybe"], "labels": [1, 0, 1]}
    row = {"question": "Is it?", "mc1_targets": targets, "mc2_targets": targets}
    one, two = TASKS["truthfulqa_mc1"], TASKS["truthfulqa_mc2"]
    item = two.item(row)
    assert item.prompt.startswith("Q: What is human life") and item.prompt.endswith("Spain.\n\nQ: Is it?\nA:")
    assert two.grade([0.0, 0.0, 0.0], item)["acc"] == pytest.approx(2 / 3)
    assert two.grade([-900.0, -1000.0, -1000.0], item)["acc"] == pytest.approx(1)
    assert one.grade([-1.0, -2.0, -3.0], one.item(row))["acc"] == 1


def test_accuracy_plain_and_per_character() -> None:
    item = Item("", options=("ab", "abcdefgh"), gold=1)
    grade = TASKS["piqa"].grade([-3.0, -4.0], item)
    assert grade == {"acc": 0.0, "acc_norm": 1.0}  # -3 / 2 < -4 / 8


# Written answers


@pytest.mark.parametrize(
    ("text", "flexible", "strict"),
    [
        ("He has 3 + 4 = 7.\n#### 7", 1, 1),
        ("#### 7 and then #### 8", 0, 1),
        ("so it is $7.", 1, 0),
        ("#### 7,000", 0, 0),
        ("seven", 0, 0),
        ("7 apples", 1, 0),
    ],
)
def test_gsm8k(text: str, flexible: int, strict: int) -> None:
    item = TASKS["gsm8k"].item({"question": "How many?", "answer": "3 and 4.\n#### 7"})
    assert item.prompt == "Question: How many?\nAnswer:"
    assert item.example == "Question: How many?\nAnswer: 3 and 4.\n#### 7"
    assert TASKS["gsm8k"].grade(text, item) == {"flexible_extract": flexible, "strict_match": strict}


def test_mathematics() -> None:
    task = TASKS["math"]
    item = task.item(
        {"problem": "What is $1/2 + 1/2$?", "solution": "It is $\\boxed{1}$.", "level": "Level 1"}
    )
    assert item.prompt == "Problem:\nWhat is $1/2 + 1/2$?\n\nSolution:" and item.answer == "1"
    assert task.grade("so $\\boxed{\\frac{2}{2}}$", item) == {"correct": 1.0}
    rows = {
        "math500": {"problem": "P", "solution": "\\boxed{5}", "answer": "5"},
        "amc23": {"question": "P", "answer": 5.0},
        "minerva": {"question": "P", "answer": "5"},
        "olympiadbench": {"question": "P", "final_answer": ["$5$"]},
    }
    for name, row in rows.items():
        item = TASKS[name].item(row)
        assert item.prompt == ("P\nPlease reason step by step, and put your final answer within \\boxed{}.")
        assert TASKS[name].grade("<think>4?</think> \\boxed{5}", item)["correct"] == 1
        assert TASKS[name].grade("\\boxed{4}", item)["correct"] == 0


def test_bbh_with_and_without_published_thoughts(tmp_path: Path) -> None:
    rows = {"canary": "x", "examples": [{"input": "not ( True ) is", "target": "False"}] * 3}
    (tmp_path / "boolean.json").write_text(json.dumps(rows))
    (item, *_) = items_of(TASKS["bbh"], "bbh", str(tmp_path / "boolean.json"), "test")
    assert item.subject == "boolean" and item.prompt == "Q: not ( True ) is\nA: Let's think step by step.\n"
    assert TASKS["bbh"].grade("We see. So the answer is False.\n", item) == {"exact_match": 1.0}
    assert TASKS["bbh"].grade("So the answer is True.", item) == {"exact_match": 0.0}
    thoughts = tmp_path / "cot-prompts"
    thoughts.mkdir()
    (thoughts / "boolean.txt").write_text("canary\n-----\nSolve it.\n\nQ: a\nA: b")
    (tmp_path / "bbh").mkdir()
    (tmp_path / "boolean.json").rename(tmp_path / "bbh" / "boolean.json")
    (item, *_) = items_of(TASKS["bbh"], "bbh", str(tmp_path / "bbh" / "boolean.json"), "test")
    assert item.intro == "Solve it.\n\nQ: a\nA: b\n\n"


def test_popqa() -> None:
    row = {"question": "What is his occupation?", "possible_answers": '["politician", "political leader"]'}
    item = TASKS["popqa"].item(row)
    assert item.example == "Q: What is his occupation?\nA: politician"
    assert TASKS["popqa"].grade(" He is a Politician", item) == {"contains": 1.0}
    assert TASKS["popqa"].grade(" painter", item) == {"contains": 0.0}


def test_humaneval_counts_samples() -> None:
    row = {
        "prompt": "def f():\n",
        "test": "def check(f):\n    assert f() == 1\n",
        "entry_point": "f",
        "canonical_solution": "    return 1\n",
    }
    item = TASKS["humaneval"].item(row)
    assert item.prompt == "def f():\n" and item.answer.endswith("assert f() == 1\n\ncheck(f)\n")
    assert TASKS["humaneval"].grade([True], item) == {"pass@1": 1.0}
    grade = TASKS["humaneval"].grade([True] + [False] * 19, item)
    assert grade == pytest.approx({"pass@1": 0.05, "pass@10": 0.5})


# Pictures


def test_pictures(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"image": "a.png", "question": "What?", "answer": "Two dogs"}\n')
    (item,) = items_of(TASKS["gqa"], "gqa", str(tmp_path / "rows.jsonl"), "validation")
    assert item.pictures == (tmp_path / "a.png",)
    assert TASKS["gqa"].grade("two dogs.", item) == {"exact_match": 1.0}
    assert TASKS["gqa"].grade("dogs", item) == {"exact_match": 0.0}
    annotators = Item("", ["yes"] * 2 + ["no"] * 8)
    assert TASKS["vizwiz"].grade("yes", annotators)["vqa_accuracy"] == pytest.approx(
        (2 / 3 * 8 + 1 / 3 * 2) / 10
    )
    assert TASKS["vizwiz"].grade("No.", annotators)["vqa_accuracy"] == 1


def test_pope_f1_is_a_weighted_mean() -> None:
    """Against the formula, over every mixture of verdicts."""
    from core.comparison import mean_and_error

    said = ["yes", "Yes, there is", "no", "no", "yes", "perhaps"]
    truth = ["yes", "no", "yes", "no", "yes", "yes"]
    grades = [TASKS["pope"].grade(s, Item("", [t])) for s, t in zip(said, truth, strict=True)]
    counted = [grade for grade in grades if "f1" in grade]
    f1, _ = mean_and_error([g["f1"] for g in counted], [g["f1:weight"] for g in counted])
    assert f1 == pytest.approx(2 * 2 / (2 * 2 + 1 + 2))
    assert sum(g["accuracy"] for g in grades) == 3


def test_boxes() -> None:
    assert overlap([0, 0, 2, 2], [1, 0, 3, 2]) == pytest.approx(1 / 3)
    item = Item("", ["[0.1, 0.1, 0.5, 0.5]"])
    assert TASKS["refcoco_plus"].grade("[0.12, 0.1, 0.5, 0.5]", item) == {"iou_50": 1.0}
    assert TASKS["refcoco_plus"].grade("[0.6, 0.6, 0.9, 0.9]", item) == {"iou_50": 0.0}
    assert TASKS["refcoco_plus"].grade("nowhere", item) == {"iou_50": 0.0}


def test_controls_change_one_thing() -> None:
    items = TASKS["scenes"].made(6, 0)
    changed = controls(items)
    assert set(changed) == {"shuffled_pictures", "no_picture"}
    for item, other, none in zip(items, *changed.values(), strict=True):
        assert item.prompt == other.prompt == none.prompt and item.answer == other.answer
        assert other.pictures[0] is not item.pictures[0] and none.pictures == ()
    talk = TASKS["instructions"].made(20, 0)
    off = controls(talk)["tools_off"]
    assert all(a.messages[1:] == b.messages[1:] for a, b in zip(talk, off, strict=True))
    assert not any("enabled. API" in item.messages[0]["content"] for item in off)


# Made on the spot


def test_made_tasks_are_the_same_every_time_and_answerable() -> None:
    for name, task in TASKS.items():
        if task.made is None:
            continue
        items = task.made(4, 3)
        assert len(items) == 4 and [i.prompt for i in items] == [i.prompt for i in task.made(4, 3)], name
    for name in ("arithmetic", "sorting", "steps", "countdown", "products"):
        task = TASKS[name]
        for item in task.made(5, 0):
            assert item.answer.held_out
            assert task.grade(item.answer.demonstration["content"], item) == {"correct": 1.0}
            assert task.grade("I do not know", item) == {"correct": 0.0}
    for item in TASKS["instructions"].made(20, 0):
        assert TASKS["instructions"].grade(item.answer.messages[-1]["content"], item) == {"right": 1.0}


def test_held_out_text_is_not_in_the_training_part() -> None:
    from data.sources import documents, held_out_packages, parse_source
    from data.text import Options

    packages = held_out_packages(Options().val_fraction)
    texts = {item.prompt for item in TASKS["bpb"].made(4, 0) if item.subject == "python-docs"}
    for document in documents(parse_source("python-docs")):
        if document.text[:8000] in texts:
            assert document.group in packages
            texts.remove(document.text[:8000])
        if not texts:
            break
    assert not texts


# Files and examples


def rows(count: int) -> list[dict[str, Any]]:
    return [{"goal": f"goal {i}", "sol1": f"a{i}", "sol2": f"b{i}", "label": i % 2} for i in range(count)]


def test_files_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows(3)))
    (tmp_path / "b.json").write_text(json.dumps(rows(3)))
    for name, delimiter in (("c.csv", ","), ("d.tsv", "\t")):
        with open(tmp_path / name, "w", newline="") as file:
            writer = csv.DictWriter(file, ["goal", "sol1", "sol2", "label"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows(3))
    found = [items_of(TASKS["piqa"], "piqa", str(path), "test") for path in sorted(tmp_path.iterdir())]
    assert len(found) == 4 and all(items == found[0] for items in found)


def test_folders_have_splits_and_subjects(tmp_path: Path) -> None:
    for split, subject, count in (("test", "law", 2), ("dev", "law", 3), ("test", "art", 1)):
        folder = tmp_path / subject
        folder.mkdir(exist_ok=True)
        lines = [json.dumps({"question": f"{split} {i}"}) for i in range(count)]
        (folder / f"{split}-00000-of-00001.jsonl").write_text("\n".join(lines))
    assert [(row["subject"], row["question"]) for row in rows_of(str(tmp_path), "test")] == [
        ("art", "test 0"),
        ("law", "test 0"),
        ("law", "test 1"),
    ]
    with pytest.raises(UserError, match="no validation file"):
        list(rows_of(str(tmp_path), "validation"))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ('{"goal": "g", "sol1": "a", "label": 0}', "row 1 does not fit the task piqa .no field 'sol2'"),
        ('{"goal": "g", "sol1": "a", "sol2": "b", "label": 7}', "row 1 does not fit"),
        ('{"goal"', "bad.jsonl:1"),
        ("[1, 2]", "bad.jsonl:1"),
        ("", "no rows"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, content: str, what: str) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(UserError, match=what):
        items_of(TASKS["piqa"], "piqa", str(tmp_path / "bad.jsonl"), "test")


def test_empty_texts_are_named(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n{"text": ""}\n')
    with pytest.raises(UserError, match="row 2 does not fit the task bpb .an empty text"):
        items_of(TASKS["bpb"], "bpb", str(tmp_path / "texts.jsonl"), "test")


def test_examples() -> None:
    items = [TASKS["piqa"].item(row) for row in rows(9)]
    heads = with_examples(items, items, 2, first=False, same=True)
    assert all(head.count("Question: ") == 2 and head.endswith("\n\n") for head in heads)
    assert all(item.example not in head for item, head in zip(items, heads, strict=True))
    assert len(set(heads)) > 3 and heads == with_examples(items, items, 2, False, True)
    pool = [TASKS["piqa"].item(row) for row in rows(30)[20:]]
    assert (
        with_examples(items[:2], pool, 3, first=True, same=False)
        == ["".join(f"{one.example}\n\n" for one in pool[:3])] * 2
    )
    assert with_examples(items, pool, 0, False, False) == [""] * 9
    with pytest.raises(UserError, match="--shots 30"):
        with_examples(items, pool, 30, False, False)


def test_examples_of_a_subject() -> None:
    law, art = (TASKS["mmlu"].item(OPTIONS["mmlu"][0] | {"subject": s}) for s in ("law", "art"))
    heads = with_examples([law, art], [law, art, art], 1, first=True, same=False)
    assert [head.count("about law") for head in heads] == [1, 0]


def test_suites_name_tasks() -> None:
    for words in SUITES.values():
        for word in words:
            name, _, shots = word.partition("@")
            assert name in TASKS and (shots.isdecimal() or not shots)


def test_readers_take_no_code(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"goal": "__import__(\'os\')"}')
    with open(path, "rb") as stream:
        assert next(read_file(stream, str(path))) == {"goal": "__import__('os')"}
