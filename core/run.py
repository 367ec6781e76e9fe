"""What every run needs that is not about its algorithm: processes, device, seeds, run folder, signals,
metrics, curves.

A run folder holds config.json (resolved configuration and versions), metrics.jsonl (one object a logged
step), checkpoints/ (core.resume), summary.json (what was measured at the end), curves.png and model/ (the
result).
"""

import contextlib
import dataclasses
import json
import math
import os
import platform
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from core.config import RunConfig, UserError, require

ROOT = Path(__file__).resolve().parent.parent

# Dense bf16 tensor-core peak in FLOP/s, from the makers' data sheets; used for MFU only.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12, "4090": 165e12}


class Run:
    """One training run on one process: where it computes, where it writes, whether it was asked to stop.

    Under torchrun every process makes one; `main` is True on the one that writes. Collective methods (`sum`,
    `should_stop`, `barrier`) must be called by all of them.
    """

    def __init__(self, config: RunConfig, stage: str) -> None:
        self.config = config
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0
        self.device = self._device()
        self.dtype = self._dtype()
        self._process_group()
        random.seed(config.seed)
        np.random.seed(config.seed % 2**32)
        torch.manual_seed(config.seed)
        self.folder = Path(config.out or f"runs/{stage}-{config.preset}")
        self._folder()
        self.start_step = 0
        self.started = time.monotonic()
        self.bar: tqdm | None = None
        self._signal: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._remember)
        self.say(
            f"{stage}: {self.world_size} process(es), {self.device.type}, {self.dtype}, into {self.folder}"
        )

    # Set-up

    def _device(self) -> torch.device:
        wanted = self.config.device
        require(
            wanted != "cuda" or torch.cuda.is_available(),
            "--device cuda: no CUDA device here; use --device cpu",
        )
        if wanted == "cpu" or not torch.cuda.is_available():
            return torch.device("cpu")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        return device

    def _dtype(self) -> torch.dtype:
        names = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        auto = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return names.get(self.config.dtype, auto)

    def _process_group(self) -> None:
        """One process makes a group of one, so that sharding and checkpoints have a single path."""
        if dist.is_initialized():
            return
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, device_id=self.device if self.device.type == "cuda" else None)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)

    def _folder(self) -> None:
        """Refuse to overwrite a run that could be continued; otherwise start its files afresh."""
        has_checkpoints = any((self.folder / "checkpoints").glob("step_*"))
        require(
            self.config.resume or not has_checkpoints,
            f"{self.folder} holds a run already: continue it with --resume or choose another --out",
        )
        require(
            has_checkpoints or not self.config.resume,
            f"--resume: no checkpoint in {self.folder}/checkpoints; start without it",
        )
        self.barrier()
        if not self.main:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(
                self.folder / "config.json", {**dataclasses.asdict(self.config), "environment": environment()}
            )
        except OSError as error:
            raise UserError(f"cannot write the run folder {self.folder}: {error.strerror}") from None
        if not self.config.resume:
            (self.folder / "metrics.jsonl").write_text("")

    # Between processes

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def sum(self, *values: float | torch.Tensor) -> list[float]:
        """Each value summed over all processes, in float64."""
        total = torch.stack([torch.as_tensor(v, dtype=torch.float64).cpu() for v in values])
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def rows(self, batch_size: int) -> slice:
        """This process's share of a global batch. Raises UsageError if it does not divide."""
        require(
            batch_size % self.world_size == 0,
            f"--batch_size {batch_size} must be a multiple of the number of processes ({self.world_size})",
        )
        share = batch_size // self.world_size
        return slice(self.rank * share, (self.rank + 1) * share)

    def _remember(self, number: int, frame: Any) -> None:
        if self._signal is not None:  # asked twice: stop at once
            os._exit(128 + number)
        self._signal = number

    def should_stop(self) -> bool:
        """True on every process once any of them got SIGINT or SIGTERM."""
        return self.sum(self._signal is not None)[0] > 0

    # Words and numbers

    def say(self, text: str) -> None:
        """One line for the person watching, from the main process only."""
        if self.main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def progress(self, steps: int) -> None:
        """Show a bar on a terminal; elsewhere `log` prints plain lines."""
        if self.main and sys.stderr.isatty():
            self.bar = tqdm(total=steps, initial=self.start_step, unit="step", dynamic_ncols=True)

    def log(self, step: int, steps: int, **values: float) -> None:
        """Append {"step": step, ...} to metrics.jsonl and show it. A no-op outside the main process."""
        if not self.main:
            return
        record = {"step": step, **values, "seconds": round(time.monotonic() - self.started, 3)}
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
        shown = " ".join(
            f"{name} {number(value)}" for name, value in values.items() if isinstance(value, int | float)
        )
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix_str(shown[:90])
        else:
            self.say(f"step {step}/{steps} {shown}")

    def metrics_bytes(self) -> int:
        """Length of metrics.jsonl, kept in each checkpoint so that a resumed run cuts off what came after
        it."""
        return (self.folder / "metrics.jsonl").stat().st_size if self.main else 0

    def cut_metrics(self, length: int) -> None:
        if self.main:
            os.truncate(self.folder / "metrics.jsonl", length)

    def finish(self, summary: dict[str, Any], panels: tuple[tuple[str, ...], ...]) -> None:
        """Write summary.json and curves.png (one panel for each group of metric names)."""
        if self.bar is not None:
            self.bar.close()
        if self.main:
            write_json(self.folder / "summary.json", summary)
            draw_curves(self.folder, panels)
        left = [name for name in ("summary.json", "curves.png", "model") if (self.folder / name).exists()]
        self.say(f"done: {', '.join(left)} in {self.folder}")
        self.barrier()


def environment() -> dict[str, str]:
    """Versions and the git revision that produced a run."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or "cpu",
        "revision": git.stdout.strip() or "unknown",
        "command": " ".join(sys.argv),
    }


def write_text(path: Path, text: str) -> None:
    """Written whole, then renamed."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def number(value: float) -> str:
    """A figure for the eye: 12,345 or 0.00123."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory so far: allocated on the CUDA device, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def mfu(flops_per_second: float, device: torch.device) -> float | None:
    """Model FLOP/s utilisation of one device (PaLM, appendix B); None where its peak is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)
    return flops_per_second / peak if peak else None


class Speedometer:
    """Tokens a second, share of time spent waiting for data, MFU and peak memory since it was last read."""

    def __init__(self, run: Run, flops_per_token: float) -> None:
        self.run, self.flops_per_token = run, flops_per_token
        self._reset()

    def _reset(self) -> None:
        self.started, self.tokens, self.waited = time.monotonic(), 0, 0.0

    def add(self, tokens: int) -> None:
        self.tokens += tokens

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self.waited += time.monotonic() - begun

    def read(self) -> dict[str, float]:
        seconds = time.monotonic() - self.started
        speed = self.tokens / seconds
        utilisation = mfu(speed * self.flops_per_token / self.run.world_size, self.run.device)
        values = {"tokens_per_second": speed, "data_share": self.waited / seconds}
        values |= {"peak_memory_bytes": peak_memory_bytes(self.run.device)}
        self._reset()
        return values | ({} if utilisation is None else {"mfu": utilisation})


def due(every: int, step: int) -> bool:
    """Every so many steps; never where that is 0."""
    return every > 0 and step % every == 0


class SpikeGuard:
    """Rejects a step whose loss or gradient norm is not finite, or beyond mean + 6 sigma of the last 128
    steps.

    The decision uses values that are equal on all processes. Its memory goes into the checkpoint. A run whose
    steps are rejected `patience` times in a row is broken: UserError.
    """

    def __init__(self, window: int = 128, sigmas: float = 6.0, patience: int = 20) -> None:
        self.window, self.sigmas, self.patience = window, sigmas, patience
        self.history: list[list[float]] = [[], []]
        self.skipped = self.in_a_row = 0

    def accepts(self, loss: float, grad_norm: float) -> bool:
        accepted = all(self._normal(v, h) for v, h in zip((loss, grad_norm), self.history, strict=True))
        if accepted:
            self.in_a_row = 0
            for value, past in zip((loss, grad_norm), self.history, strict=True):
                past.append(value)
                del past[: -self.window]
            return True
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= self.patience:
            raise UserError(
                f"{self.in_a_row} steps in a row had a loss or gradient norm that is not finite or far off "
                f"(last: loss {loss:.4g}, gradient norm {grad_norm:.4g}); lower --lr or inspect the data"
            )
        return False

    def forget(self) -> None:
        """Other data begin: what was normal so far says nothing about them."""
        self.history = [[], []]

    def _normal(self, value: float, past: list[float]) -> bool:
        if not math.isfinite(value):
            return False
        if len(past) < self.window:
            return True
        mean = sum(past) / len(past)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in past) / len(past))
        return value <= mean + self.sigmas * max(deviation, 0.01 * abs(mean))

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history, self.skipped, self.in_a_row = state["history"], state["skipped"], state["in_a_row"]


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def draw_curves(folder: Path, panels: tuple[tuple[str, ...], ...]) -> None:
    """curves.png from metrics.jsonl: one panel for each group of names that has any values."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_metrics(folder)
    lines = [[(n, [(r["step"], r[n]) for r in records if n in r]) for n in names] for names in panels]
    lines = [[(n, points) for n, points in panel if points] for panel in lines]
    lines = [panel for panel in lines if panel]
    if not lines:
        return
    figure, axes = pyplot.subplots(1, len(lines), figsize=(4.5 * len(lines), 3.2), squeeze=False)
    for axis, panel in zip(axes[0], lines, strict=True):
        for name, points in panel:
            axis.plot(
                *zip(*points, strict=True), label=name, linewidth=1.2, marker="." if len(points) < 30 else ""
            )
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(folder / "curves.png", dpi=110)
    pyplot.close(figure)
