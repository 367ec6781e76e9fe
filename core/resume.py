"""Checkpoints to resume from: sharded, asynchronous, complete or absent, readable by any number of processes.

checkpoints/step_000123/ holds what torch.distributed.checkpoint wrote (model and optimizer) and state.json:
the step, the stage's own counters, what the run must be identical in to go on, and the size and CRC of every
file. It is written under a hidden name and renamed when complete, so a kill at any instant leaves the one
before.

No random state is stored: every draw in this project has a generator seeded by (seed, step, ...), so the step
says all.
"""

import json
import shutil
import threading
import zlib
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from core.config import UserError
from core.run import Run, SpikeGuard, due, write_json


class Checkpointer:
    """Saves and restores one run's model and optimizer. All methods are collective.

    `identity` is what must be equal for the loss curve to continue (model shape, data fingerprint, seed,
    batch ...); a checkpoint that differs is refused with the name of the first difference.
    """

    def __init__(
        self, run: Run, model: nn.Module, optimizer: torch.optim.Optimizer, identity: dict[str, Any]
    ) -> None:
        self.run, self.model, self.optimizer = run, model, optimizer
        self.identity = json.loads(json.dumps(identity))  # tuples become lists, as they will when read back
        self.folder = run.folder / "checkpoints"
        self.group = dist.new_group(
            backend="gloo"
        )  # its own, so that saving never mixes with training's collectives
        self.thread: threading.Thread | None = None
        self.error: UserError | None = None

    def after_step(self, step: int, last: bool, stopping: bool, **counters: Any) -> None:
        """Save where --save_every, the end or a signal asks for it. Raises UserError to end a stopped run."""
        if due(self.run.config.save_every, step) or last or stopping:
            self.save(step, **counters)
        if stopping:
            self.wait()
            raise UserError(
                f"stopped at step {step}, checkpoint saved; go on with --resume --out {self.run.folder}"
            )

    def save(self, step: int, **counters: Any) -> None:
        """Start writing step_{step}; training may go on at once. Raises UserError if the save before this
        failed."""
        self.wait()
        target = self.folder / f"step_{step:06d}"
        if target.exists():
            return
        partial = self.folder / f".step_{step:06d}.partial"
        if self.run.main:
            for left_over in self.folder.glob(".step_*.partial"):
                shutil.rmtree(left_over)
        self.run.barrier()
        state = {
            "step": step,
            "metrics_bytes": self.run.metrics_bytes(),
            "identity": self.identity,
            **counters,
        }
        model_state, optimizer_state = get_state_dict(self.model, self.optimizer)
        try:
            future = dcp.async_save(
                {"model": model_state, "optimizer": optimizer_state},
                storage_writer=dcp.FileSystemWriter(partial),
                process_group=self.group,
            )
        except Exception as error:
            raise self.failure(error, partial) from None
        self.thread = threading.Thread(target=self._complete, args=(future, partial, target, state))
        self.thread.start()

    def _complete(self, future: Future, partial: Path, target: Path, state: dict[str, Any]) -> None:
        """In the background: wait for the files, describe them in state.json, rename, drop the oldest."""
        try:
            future.result()
            if self.run.main:
                state["files"] = {path.name: describe(path) for path in sorted(partial.iterdir())}
                write_json(partial / "state.json", state)
                partial.rename(target)
                for old in complete(self.folder)[: -self.run.config.keep_checkpoints]:
                    shutil.rmtree(old)
        except BaseException as error:  # CheckpointException is no Exception; `wait` raises it in its place
            self.error = self.failure(error, partial)

    def wait(self) -> None:
        """Return when nothing is being written. Raises UserError if the last save failed."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            raise self.error

    def failure(self, error: BaseException, partial: Path) -> UserError:
        """What to tell the user; what was half written is removed."""
        reason = str(error).strip().splitlines()[-1][-200:]
        free = shutil.disk_usage(self.run.folder).free / 1e6
        if self.run.main:
            shutil.rmtree(partial, ignore_errors=True)
        kept = complete(self.folder)
        remains = f"the newest complete one is {kept[-1]}" if kept else "there is none before it"
        return UserError(
            f"cannot save a checkpoint in {self.folder} ({reason}; {free:.1f} MB were free on the disk); "
            f"{remains}; make room, then --resume"
        )

    def resume(self, guard: SpikeGuard) -> dict[str, Any]:
        """With --resume, `load` and restore the guard; else nothing to go on from, {}."""
        if not self.run.config.resume:
            return {}
        state = self.load()
        guard.load_state_dict(state["guard"])
        return state

    def load(self) -> dict[str, Any]:
        """Restore the newest checkpoint that is whole; returns its state.json. Damaged ones are named and
        skipped."""
        for folder in reversed(complete(self.folder)):
            damage = self._from_main(check(folder) if self.run.main else None)
            if damage:
                self.run.say(f"skipping damaged checkpoint {folder}: {damage}")
                continue
            state = json.loads((folder / "state.json").read_text())
            self._same_identity(folder, state["identity"])
            model_state, optimizer_state = get_state_dict(self.model, self.optimizer)
            content = {"model": model_state, "optimizer": optimizer_state}
            dcp.load(content, storage_reader=dcp.FileSystemReader(folder), process_group=self.group)
            set_state_dict(
                self.model,
                self.optimizer,
                model_state_dict=content["model"],
                optim_state_dict=content["optimizer"],
            )
            self.run.cut_metrics(state["metrics_bytes"])
            self.run.start_step = state["step"]
            self.run.say(f"resumed from {folder}")
            return state
        raise UserError(
            f"--resume: no usable checkpoint in {self.folder}; start without --resume into another --out"
        )

    def _same_identity(self, folder: Path, saved: dict[str, Any]) -> None:
        for name in sorted(saved.keys() | self.identity.keys()):
            if saved.get(name) != self.identity.get(name):
                both = f"{name} = {saved.get(name)}, this run has {self.identity.get(name)}"
                raise UserError(f"{folder} was made with {both}; resume with the same or start a new --out")

    def _from_main(self, value: Any) -> Any:
        """The main process's value, on every process."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]


def complete(folder: Path) -> list[Path]:
    """Renamed checkpoints, oldest first."""
    return sorted(folder.glob("step_*"))


def describe(path: Path) -> list[int]:
    """[size in bytes, CRC-32] of a file."""
    size = crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def check(folder: Path) -> str:
    """What is wrong with a checkpoint's files; empty if nothing is."""
    try:
        state = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        return f"state.json: {error}"
    for name, expected in state["files"].items():
        if not (folder / name).exists():
            return f"{name} is missing"
        if describe(folder / name) != expected:
            return f"{name} is not what was written (size or checksum)"
    return ""
