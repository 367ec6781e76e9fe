"""Shared by all tests: one thread, no network, slow tests off by default, and the optional folder of real
data."""

import os
import signal
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--run-slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run with --run-slow (make test-slow)"))


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Runs catch SIGINT and SIGTERM to save first; the test session gets its own handlers back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data kept outside the project (NANOMOXIN_DATA or ../shared/data); skips without
    it."""
    folder = Path(os.environ.get("NANOMOXIN_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set NANOMOXIN_DATA")
    return folder


def run_processes(
    work: Callable[..., Any], processes: int, folder: Path, *arguments: Any, **keywords: Any
) -> list:
    """`work(*arguments, **keywords)` in that many gloo processes; what it returns, by rank.

    `work` must be a module-level function. Processes come from a server that has imported torch once and run
    no thread, so a start takes a fraction of a second. Raises with the traceback of the first process that
    fails.
    """
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "core.resume", "core.parallel", "data.text"])
    results = context.Queue()
    store = str(folder / f"store-{uuid.uuid4().hex}")
    workers = [
        context.Process(
            target=_process, args=(rank, processes, store, results, work, arguments, keywords), daemon=True
        )
        for rank in range(processes)
    ]
    for worker in workers:
        worker.start()
    found: dict[int, Any] = {}
    try:
        while len(found) < processes:
            rank, value, failure = results.get(timeout=120)
            assert not failure, f"process {rank}: {failure}"
            found[rank] = value
    finally:
        for worker in workers:
            worker.kill()  # a run in there may be catching SIGTERM
            worker.join()
    return [found[rank] for rank in range(processes)]


def _process(
    rank: int, processes: int, store: str, results: Any, work: Callable, arguments: tuple, keywords: dict
) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, processes), rank=rank, world_size=processes
        )
        results.put((rank, work(*arguments, **keywords), ""))
    except BaseException:  # whatever it was, the parent must hear of it rather than wait
        results.put((rank, None, traceback.format_exc()))
    signal.pause()  # peers may still be talking to this process; the parent ends it
