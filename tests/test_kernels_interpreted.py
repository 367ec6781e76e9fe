"""Runs the kernel tests in Triton's interpreter, which needs a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not published for this system")
TESTS = Path(__file__).parent


def test_kernels_in_the_interpreter(request: pytest.FixtureRequest) -> None:
    """Every kernel test of these files, on the CPU: their failures are this test's output."""
    files = [str(TESTS / name) for name in ("test_attention.py", "test_decode.py", "test_pointwise.py")]
    options = ["--run-slow"] if request.config.getoption("--run-slow") else []
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "kernel", *options, *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_attention_benchmark_runs_at_toy_size() -> None:
    command = [sys.executable, str(TESTS.parent / "benchmarks" / "attention.py"), "--interpret"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("triton  largest difference") == 4
