"""The road: stages in order, resumed after a kill, a failure in one line, a report of what is there."""

import json
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

import road
from core.report import Comparison, write_report
from road import Config, Stage, selected, walk

ROOT = Path(__file__).resolve().parent.parent

# A stage of three steps. It notes each start, leaves a checkpoint after the first step, and goes on from it.
FAKE = """
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
(folder / "checkpoints").mkdir(parents=True, exist_ok=True)
first = 1 if "--resume" in sys.argv else 0
with open(folder.parent / "starts", "a") as file:
    print(folder.name, first, file=file)
(folder / "config.json").write_text(json.dumps({"steps": 3, "preset": "tiny", "seed": 0}))
for step in range(first, 3):
    with open(folder / "metrics.jsonl", "a") as file:
        print(json.dumps({"step": step + 1}), file=file)
    (folder / "checkpoints" / "step_000001").mkdir(exist_ok=True)
while "hold" in sys.argv and not (folder.parent / "go").exists():
    time.sleep(0.05)
if "fail" in sys.argv:
    sys.exit("the disk is full")
(folder / "summary.json").write_text(json.dumps({"before": {"x": 1}, "after": {"x": 2}}))
"""


@pytest.fixture
def fake(tmp_path):
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    return lambda name, *needs, rest="": Stage(name, f"about {name}", f"{script} {{out}} {rest}", needs)


def starts(folder):
    return [line.split() for line in (folder / "starts").read_text().splitlines()]


def test_real_stages_need_only_earlier_ones():
    names = [stage.name for stage in road.STAGES]
    assert len(set(names)) == len(names)
    for number, stage in enumerate(road.STAGES):
        assert set(stage.needs) <= set(names[:number])
        assert (ROOT / stage.command.split()[0]).exists()
        used = {other for other in names if f"{{road}}/{other}/" in stage.command}
        assert used <= set(stage.needs)


def test_only_brings_what_it_needs():
    last = road.STAGES[-1]
    wanted = {stage.name for stage in selected((last.name,))}
    assert {last.name, *last.needs} <= wanted
    with pytest.raises(road.UsageError, match="did you mean base"):
        selected(("bas",))


def test_each_stage_runs_once_after_what_it_needs(tmp_path, fake):
    stages = [fake("a"), fake("b"), fake("c", "a", "b")]
    walk(stages, tmp_path, Config(preset="tiny", jobs=2))
    walk(stages, tmp_path, Config(preset="tiny", jobs=2))  # all finished: nothing starts
    names = [name for name, _ in starts(tmp_path)]
    assert sorted(names) == ["a", "b", "c"] and names[-1] == "c"
    ledger = json.loads((tmp_path / "stages.json").read_text())
    assert ledger["c"]["exit_code"] == 0 and "fake.py" in ledger["c"]["command"]


def test_a_failing_stage_is_one_line_and_its_log(tmp_path, fake):
    with pytest.raises(road.UserError, match="stage a failed: the disk is full .*a.log"):
        walk([fake("a", rest="fail"), fake("b", "a")], tmp_path, Config(preset="tiny"))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_run_again(tmp_path, fake, number):
    """The second run waits for what the killed one left behind, then goes on from the checkpoint."""
    stage = fake("a", rest="hold")
    code = f"import road; road.STAGES = ({stage!r},); road.write_report = lambda *a: 'no report'; road.main()"
    code = f"from road import Stage; {code}"
    command = [sys.executable, "-c", code, "--preset", "tiny", "--out", str(tmp_path)]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (tmp_path / "a/checkpoints/step_000001").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(first.pid, number)
    first.communicate()
    again = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if number == signal.SIGKILL:  # the stage lived on; told to stop, the road would have ended it
        assert "preset" in again.stdout.readline() and "waiting for it" in again.stdout.readline()
    (tmp_path / "go").touch()
    assert again.wait(60) == 0, again.stderr.read()
    assert starts(tmp_path) == [["a", "0"], ["a", "1"]]


class Text(HTMLParser):
    """Tags and text of a page; an unknown tag would be a model's text taken for markup."""

    def __init__(self):
        super().__init__()
        self.tags, self.text = set(), ""

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)

    def handle_data(self, data):
        self.text += data


def test_report_shows_what_is_there_and_escapes_what_a_model_wrote(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/config.json").write_text('{"preset": "tiny", "seed": 3}')
    (tmp_path / "a/summary.json").write_text(
        '{"before": {"loss": 2.5}, "after": {"loss": 1.5}, "control": 9}'
    )
    for name, score in (("eval-a", 0), ("eval-b", 1)):
        (tmp_path / name).mkdir()
        task = {"sums": {"acc": {"value": score, "stderr": 0.0, "n": 4}}}
        (tmp_path / name / "summary.json").write_text(json.dumps({"tasks": task}))
        records = [
            dict(
                task="sums", id=i, prompt="1+1?", output="<script>alert(1)</script>", answer="2", score=score
            )
            for i in range(4)
        ]
        (tmp_path / name / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    path = write_report(
        tmp_path,
        [("a", "a thing")],
        {"first": "eval-a", "second": "eval-b", "not asked for": "eval-c"},
        [Comparison("a", "sums", "eval-a", "eval-b"), Comparison("c", "sums", "eval-b", "eval-c")],
        [("Sums", "eval-b", "sums"), ("More", "eval-c", "sums")],
    )
    page = Text()
    page.feed(path.read_text())
    assert "not asked for" not in page.text and "More" not in page.text
    assert "script" not in page.tags and "<script>alert(1)</script>" in page.text
    assert "better" in page.text and "+1" in page.text and "1.5" in page.text and "seed 3" in page.text
    assert "http://" not in path.read_text() and "https://" not in path.read_text()
