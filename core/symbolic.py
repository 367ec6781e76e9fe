"""Ask algebra questions of a process of its own, so that no input can hang or bloat the caller.

The server (`core.algebra`) imports sympy once. For each question it forks a child, and the kernel ends that
child when its time or memory is spent, whatever Python is doing at that moment. So a limit

- counts from when work on the question starts, not from when a busy machine got round to it,
- holds from every thread: nothing here needs the main thread or an event loop,
- costs nothing to enforce: the server and its sympy stay.

The caller's total wait, start of the server and queue included, is bounded by `MAX_WAIT`.
"""

import json
import os
import selectors
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

MAX_WAIT = 20.0  # seconds a caller waits at most, whatever happens
MAX_QUESTION = 1000  # characters


class _Server:
    """The server process, started at first use and again should it be gone."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen | None = None
        self.owner = 0  # process that started it: a fork of that one must start its own

    def start(self, deadline: float) -> None:
        root = Path(__file__).resolve().parent.parent
        self.process = subprocess.Popen(
            [sys.executable, "-m", "core.algebra"],
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self.owner = os.getpid()
        if self.read_line(deadline) != b"ready":
            self.stop()

    def read_line(self, deadline: float) -> bytes | None:
        """One line from the server, or None when the deadline passes or the server ends."""
        received = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while not received.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                piece = os.read(self.process.stdout.fileno(), 65536)
                if not piece:
                    return None
                received += piece
        return received.rstrip()

    def stop(self) -> None:
        if self.process is not None and self.owner == os.getpid():
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
        self.process = None

    def ask(self, question: str, limit: float, *texts: str) -> Any:
        if max(map(len, texts)) > MAX_QUESTION:
            return None
        deadline = time.monotonic() + MAX_WAIT
        if not self.lock.acquire(timeout=MAX_WAIT):
            return None
        try:
            if self.process is None or self.owner != os.getpid() or self.process.poll() is not None:
                self.stop()
                self.start(deadline)
            if self.process is None:
                return None
            try:
                os.write(self.process.stdin.fileno(), json.dumps([question, limit, *texts]).encode() + b"\n")
                line = self.read_line(deadline)
            except BrokenPipeError:
                line = None
            if line is None:  # an answer that comes later would be taken for that of the next question
                self.stop()
                return None
            return json.loads(line)
        finally:
            self.lock.release()


_server = _Server()


def solve_equations(text: str, limit: float = 1.0) -> str | None:
    """Solve polynomial equations: 'x+y=5; x-y=1' -> 'x = 3\\ny = 2'; None if unreadable, unsolvable, slow.

    Args: text, equations separated by ; or , with names as unknowns; limit, seconds of work.
    """
    return _server.ask("solve", limit, text)


def equivalent(left: str, right: str, limit: float = 1.0) -> bool:
    """Whether two expressions (the syntax of core.expressions) are equal; False if not known in time."""
    return bool(_server.ask("equal", limit, left, right))


def warm_up() -> None:
    """Start the server now, so that the first question does not pay for the import of sympy."""
    _server.ask("equal", 1.0, "1", "1")
