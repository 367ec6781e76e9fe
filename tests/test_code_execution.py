"""Programs that mean harm, each bounded. They run for real, in the process that is to hold them."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from core.code_execution import call_filter, isolation, passes, run

SECONDS = 2.0
HARMLESS = {
    "a test that passes": "def add(a, b):\n    return a + b\nassert add(2, 3) == 5",
    "an empty program": "",
    "threads": "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
    "numpy": "import numpy\nassert numpy.ones(3).sum() == 3",
    "Chinese": "assert '今天'[0] == '今'",
}
HARMFUL = {
    "a test that fails": "assert 1 == 2",
    "not Python": "def (",
    "exit code 0 before the end": "import os\nos._exit(0)",
    "quit": "quit()",
    "endless": "while True: pass",
    "asleep": "import time\ntime.sleep(1000)",
    "memory": "x = bytearray(3 << 30)",
    "memory bit by bit": "x = []\nwhile True: x.append(bytearray(1 << 20))",
    "flood": "while True: print('x' * 100_000)",
    "fork": "import os\nos.fork()",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "subprocess": "import subprocess\nsubprocess.run(['true'], check=True)",
    "daemon": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(1000)\nelse: 1 / 0",
    "internet": "import socket\nsocket.create_connection(('1.1.1.1', 80), 1)",
    "socket": "import socket\nsocket.socket()",
    "kill": "import os\nos.kill(os.getppid(), 9)",
    "kill everybody": "import os\nos.kill(-1, 9)",
    "a new file": "open('{folder}/new', 'w').write('x')",
    "an empty file": "open('{folder}/new', 'w')",
    "overwriting": "open('{folder}/victim', 'w').write('x')",
    "appending": "import os\nos.write(os.open('{folder}/victim', os.O_WRONLY | os.O_APPEND), b'x')",
    "deleting": "import os\nos.remove('{folder}/victim')",
    "renaming": "import os\nos.rename('{folder}/victim', '{folder}/other')",
    "truncating": "import os\nos.truncate('{folder}/victim', 0)",
    "environment": "import os\nos.environ['NANOMOXIN_SECRET']",
}


@pytest.fixture(scope="module", params=["namespaces", "filter"])
def how(request: pytest.FixtureRequest) -> str:
    order = ["namespaces", "filter", "none"]
    if order.index(isolation()) > order.index(request.param):
        pytest.skip(f"this machine gives {isolation()}, not {request.param}")
    return request.param


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless(name: str, how: str) -> None:
    assert run(HARMLESS[name], 20.0, how)


@pytest.mark.parametrize("name", HARMFUL)
def test_harmful(name: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOMOXIN_SECRET", "x")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    tmp_path.chmod(0o777)
    victim.chmod(0o666)
    started = time.monotonic()
    assert not run(HARMFUL[name].replace("{folder}", str(tmp_path)), SECONDS, how)
    assert time.monotonic() - started < SECONDS + 5
    assert victim.read_text() == "precious" and os.listdir(tmp_path) == ["victim"]
    assert not own_children()


def own_children() -> list[str]:
    listed = subprocess.run(["ps", "-o", "args=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    return [line for line in listed.stdout.splitlines() if "code_execution" in line]


def test_passes_uses_what_there_is() -> None:
    if isolation() == "none":
        pytest.skip("this machine cannot confine programs")
    assert passes("x = 1") and not passes("raise SystemExit(0)")


def test_jumps_of_the_filter_stay_inside() -> None:
    lines = call_filter()
    for place, (code, yes, no, _) in enumerate(lines):
        assert place + 1 + max(yes, no) < len(lines) or code == 0x06
    assert lines[-1][0] == 0x06
