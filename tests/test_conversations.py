"""The generated conversations: right answers, real tool results, splits that do not leak."""

import re
from collections import Counter

import pytest

from core import tools
from data.conversations import PLAIN, TOOL_OF, WITH_TOOLS, Example, documents, generate, is_right
from data.readers import check, noise


@pytest.fixture(scope="module")
def examples() -> dict[str, list[Example]]:
    return {split: generate(1800, split) for split in ("train", "value", "template")}


def question(example: Example) -> str:
    return [message["content"] for message in example.messages if message["role"] == "user"][-1]


def test_same_arguments_give_same_examples(examples: dict[str, list[Example]]) -> None:
    assert generate(1800) == examples["train"]
    assert generate(50, seed=1) != examples["train"][:50]


def test_every_kind_in_both_languages(examples: dict[str, list[Example]]) -> None:
    off = {f"{kind}, tool off" for kind in WITH_TOOLS if kind != "no_result"}
    for split in examples.values():
        assert {e.kind for e in split} == {*PLAIN, *WITH_TOOLS, *off, "search, nothing found"}
        for kind in (*PLAIN, *WITH_TOOLS):
            written = "".join(question(example) for example in split if example.kind == kind)
            assert re.search("[a-z]{3}", written) and re.search("[\u4e00-\u9fff]", written), kind


def test_conversations_are_well_formed_and_right(examples: dict[str, list[Example]]) -> None:
    for split in examples.values():
        for example in split:
            check(example.messages)
            assert not noise(example.messages)
            assert is_right(example, example.messages[-1]["content"]), example
    plain = generate(60, with_tools=False)
    assert {example.kind for example in plain} == set(PLAIN)
    assert all(set(message) == {"role", "content"} for example in plain for message in example.messages)


def test_several_questions_share_one_opening() -> None:
    for example in generate(200, questions=3):
        check(example.messages)
        assert [turn["role"] for turn in example.messages].count("system") == 1
        assert sum(turn["role"] == "user" for turn in example.messages) >= 3
        on = [name for name in tools.TOOLS if f"API: {name}(" in example.messages[0]["content"]]
        for turn in example.messages:
            called = tools.parse_commands(turn.get("commands", ""))
            assert [command.name in on for command in called] in ([], [True])
            assert turn["role"] != "assistant" or bool(on) == ("thoughts" in turn)


def test_results_are_what_the_tools_give(examples: dict[str, list[Example]]) -> None:
    """Every command is run for real (equations, which start a process each, for a sample)."""
    index = tools.SearchIndex(documents())
    equations = 0
    for example in examples["train"] + examples["value"]:
        last = example.messages[-1]
        enabled = [
            name for name, tool in tools.TOOLS.items() if f"API: {name}(" in example.messages[0]["content"]
        ]
        assert (example.command is not None) == ("commands" in last)
        if example.command is None:
            continue
        assert tools.parse_commands(last["commands"]) == [example.command] and example.command.name in enabled
        equations += example.command.name == "Solve"
        if example.command.name == "Solve" and equations > 10 or example.command.name == "Text2Image":
            continue
        outcome = tools.run_commands(last["commands"], enabled, timeout=10.0, index=index)
        assert outcome.text == last["results"]
    picture = next(example for example in examples["train"] if example.kind == "picture")
    outcome = tools.run_commands(picture.messages[-1]["commands"], ["Text2Image"])
    assert outcome.text == picture.messages[-1]["results"] and len(outcome.pictures) == 1


def test_held_out_values_and_templates(examples: dict[str, list[Example]]) -> None:
    """A value is on one side only; a held-out template shares no question with training."""
    sums = {
        split: {example.command for example in those if example.kind == "calculation"}
        for split, those in examples.items()
    }
    assert not sums["train"] & sums["value"] and not sums["template"] & sums["value"]
    seen = {question(example) for example in examples["train"]}
    assert not seen & {question(example) for example in examples["template"]}

    def forms(split: str) -> set[str]:  # questions without their values
        kinds = ("arithmetic", "dates", "calculation")
        days = "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday|星期[一二三四五六日]"
        values = rf"(\d+|{days}|[-+*]|plus|minus|times|加|减|乘以| )+"
        return {re.sub(values, "_", question(e)) for e in examples[split] if e.kind in kinds}

    assert forms("value") <= forms("train")
    assert not forms("template") & forms("train")


def test_tools_that_are_off_are_not_used_and_the_reply_says_so(examples: dict[str, list[Example]]) -> None:
    for example in examples["train"]:
        meta, last = example.messages[0]["content"], example.messages[-1]
        if example.kind.endswith(", tool off"):
            name = TOOL_OF[example.kind.removesuffix(", tool off")]
            assert f"API: {name}(" not in meta and "commands" not in last
            assert re.search("switched off|已关闭", last["content"])
        if example.kind == "search, nothing found":
            assert last["results"].endswith("None")
            assert re.search("do not know|不知道", last["content"])


def test_some_searches_find_nothing(examples: dict[str, list[Example]]) -> None:
    found = Counter(e.kind for e in examples["train"] if e.kind in ("search", "search, nothing found"))
    assert 0.05 < found["search, nothing found"] / found.total() < 0.35


@pytest.mark.parametrize(
    ("answer", "reply", "right"),
    [
        ("408", "There are 408 jars.", True),
        ("408", "一共有408个。", True),
        ("408", "It is 4081.", False),
        ("408", "It is -408", False),
        ("408", "It is 1408.", False),
        ("408", "It is 408.5", False),
        ("-5", "3 - 8 = -5", True),
        ("Anna", "Hello Anna!", True),
        ("switched off", "the tool is switched off.", True),
        ("408", "", False),
    ],
)
def test_is_right(answer: str, reply: str, right: bool) -> None:
    assert is_right(Example("", [], answer), reply) == right
