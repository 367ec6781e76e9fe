"""Problems: demonstrations are right, held-out keys stay held out, files are read or refused by line."""

import json

import pytest

from core.config import UserError
from core.rewards import REWARDS
from data import problems
from data.problems import TASKS, Problems, read_problems
from data.readers import read_conversations


@pytest.mark.parametrize("task", TASKS)
def test_demonstrations_are_right(task):
    """Each made task's demonstration earns the reward, and another problem's demonstration rarely does."""
    run = Problems((task,), seed=0)
    chosen = [run.train(index) for index in range(200)]
    rewards = [REWARDS[p.task](p.demonstration["content"], p.answer) for p in chosen]
    assert rewards == [1.0] * 200
    shifted = [
        REWARDS[p.task](q.demonstration["content"], p.answer)
        for p, q in zip(chosen, chosen[1:], strict=False)
    ]
    assert sum(shifted) < 40  # one digit in ten agrees by chance


@pytest.mark.parametrize("task", TASKS)
def test_held_out_keys_are_never_trained(task):
    run = Problems((task,), seed=3)
    trained = {run.train(index).key for index in range(2000)}
    tested = {problem.key for problem in run.test(200)}
    assert not trained & tested and len(tested) > 150
    assert len(trained) > 1500 or task == "arithmetic"


def test_countdown_key_ignores_order():
    first = problems.Problem("", "3 5 7 = 22", "countdown")
    assert first.key == problems.Problem("", "7 3 5 = 22", "countdown").key
    assert first.key != problems.Problem("", "3 5 7 = 21", "countdown").key


def test_order_is_a_function_of_the_seed():
    def prompts(seed):
        run = Problems(("sorting:2", "countdown:1"), seed)
        return [run.train(index).prompt for index in range(300)]

    first = prompts(0)
    assert first == prompts(0) != prompts(1)
    assert 150 < sum(prompt.startswith("sort") for prompt in first) < 250
    assert Problems(("sorting",), 0).test(5) == Problems(("sorting",), 1).test(5)


def test_multi_step_thoughts_are_true():
    run = Problems(("steps",), seed=0)
    for index in range(100):
        problem = run.train(index)
        words = problem.prompt.removeprefix("last digit: ").split()
        value = int(words[0])
        for word, thought in zip(
            words[1:], problem.demonstration["content"][7:].split("</think>")[0].split(), strict=True
        ):
            assert thought.startswith(f"{value}{word}=")
            value = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[word[0]](value, int(word[1:])) % 10
            assert thought.endswith(f"={value}")
        assert problem.answer == str(value)


ROWS = [
    {"question": "2+2?", "answer": "It is <<2+2=4>>4.\n#### 4"},
    {"problem": "1+1", "answer": "2", "solution": "so \\boxed{2}"},
    {"problem": "half", "solution": "hence \\boxed{\\frac{1}{2}}"},
    {"problem": "n", "answer": 7},
    {"problem": "make 3", "answer": "1 2 = 3", "task": "countdown"},
]


def test_files(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    read, remarks = read_problems(path)
    assert [p.answer for p in read] == ["4", "2", "\\frac{1}{2}", "7", "1 2 = 3"] and not remarks
    assert read[0].demonstration["content"] == "It is 4.\n\\boxed{4}"
    assert [p.task for p in read] == ["math"] * 4 + ["countdown"]
    (tmp_path / "p.json").write_text(json.dumps(ROWS))
    assert read_problems(tmp_path / "p.json")[0] == read


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"problem": "x"}', r"p\.jsonl:2: no `answer`"),
        ('{"answer": "x"}', r"p\.jsonl:2: no field 'question'"),
        ('{"problem": "", "answer": "1"}', "empty"),
        ('{"problem": 5, "answer": "1"}', "empty"),
        ('{"problem": "x", "answer": "1", "task": "cooking"}', "task"),
        ("[1]", "expected an object"),
        ("{", r"p\.jsonl:2"),
    ],
)
def test_bad_lines_are_named_or_skipped(tmp_path, line, what):
    path = tmp_path / "p.jsonl"
    path.write_text('{"problem": "x", "answer": "1"}\n' + line + "\n")
    with pytest.raises(UserError, match=what):
        read_problems(path)
    read, remarks = read_problems(path, skip_bad=True)
    assert len(read) == len(remarks) == 1


@pytest.mark.parametrize(
    ("source", "what"), [("sortng", "did you mean sorting"), ("nowhere.jsonl", "neither a file")]
)
def test_unknown_sources(source, what):
    with pytest.raises(UserError, match=what):
        Problems((source,), 0)


def test_files_are_passed_through_once_an_epoch(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps({"problem": f"p{n}", "answer": str(n)}) for n in range(50)))
    run = Problems((str(path),), seed=0)
    size = sum(not p.held_out for p in run.read[str(path)])
    assert 0 < size < 50
    first = [run.train(index).prompt for index in range(size)]
    second = [run.train(size + index).prompt for index in range(size)]
    assert sorted(first) == sorted(second) and first != second and len(set(first)) == size
    assert {p.prompt for p in run.test(50)} | set(first) == {f"p{n}" for n in range(50)}


def test_gsm8k(real_data):
    read, remarks = read_problems(real_data / "math" / "gsm8k.train.jsonl")
    assert len(read) == 7473 and not remarks
    assert all("<<" not in p.demonstration["content"] for p in read)
    assert all(REWARDS["math"](p.demonstration["content"], p.answer) == 1.0 for p in read[:500])


def test_solved_problems_are_conversations(tmp_path, monkeypatch):
    """What the command writes is read as conversations, thoughts and all, and holds no held-out problem."""
    path = tmp_path / "new" / "thoughts.jsonl"
    monkeypatch.setattr("sys.argv", ["problems.py", "steps", "200", str(path)])
    problems.main()
    talks = read_conversations(str(path)).conversations
    held_out = {problem.prompt for problem in Problems(("steps",), seed=0).test(2000)}
    assert len(talks) == 200 and not held_out & {talk[0]["content"] for talk in talks}
    assert all(talk[1]["content"].startswith("<think>") for talk in talks)
