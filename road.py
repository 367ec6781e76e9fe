"""The whole road in one command: text -> base -> instruct -> preferences -> reasoning -> vision -> report.

Nothing is trained here. Each stage below is a command that you could type yourself; this script starts what
is ready, two at a time on a CPU, shows how far all of it is, and draws report.html at the end. Killed at any
instant, run it again: finished stages are kept, the others go on from their newest checkpoint.

    python road.py                        preset tiny without a GPU, small with one
    python road.py --only instruct dpo    these stages and what they need
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from core.config import UsageError, UserError, nearest, parse, run_main
from core.report import Comparison, write_report
from core.run import write_json


@dataclass(kw_only=True)
class Config:
    preset: str = "auto"  # of every stage; auto = tiny without a CUDA device, small with one
    out: str = ""  # folder of all stages; empty = runs/road-PRESET
    only: tuple[str, ...] = ()  # these stages and what they need; empty = all
    jobs: int = 0  # stages at a time; 0 = one with GPUs, two on a CPU of two cores or more
    seed: int = 0  # of every stage


PRESETS: dict[str, dict[str, Any]] = {"tiny": {}, "small": {}}


@dataclass(frozen=True)
class Stage:
    """One command. {out} is its folder, {road} that of all stages; {run} = --preset, --seed and --out."""

    name: str
    what: str  # what is trained on what, for the report
    command: str
    needs: tuple[str, ...] = ()
    minutes: float = 1.0  # of one core at tiny size, to estimate what remains


# Which models are evaluated at the end, on which tasks of data/tasks.py. Reinforcement makes right answers
# likelier, the most probable one may be right before: so `steps` is sampled.
EVALUATED = {
    "base": "bpb,instructions,steps --temperature 1",
    "instruct": "bpb,instructions,instructions_reworded",
    "dpo": "instructions",
    "tagged": "instructions",
    "thoughts": "steps --temperature 1",
    "reasoning": "steps --temperature 1",
    "vlm": "scenes,scenes_new_pairs",
}

# fmt: off
STAGES = (
    Stage("base", "a tokenizer and a language model, from text that is already on this machine",
          "pretrain.py {run}", minutes=3),
    Stage("towers", "two small vision encoders, on drawn scenes",
          "vlm.py {run} --stage towers", minutes=1),
    Stage("instruct", "the base model, on generated conversations in English and Chinese, with tools",
          "sft.py {run} --init_from {road}/base/model", ("base",), minutes=19),
    Stage("pairs", "pairs of the instruct model's own answers, told apart by rules that check them",
          "data/pairs.py --model {road}/instruct/model --prompts conversations --count 400 "
          "--max_new_tokens 64 --seed {seed} --out {out}", ("instruct",), minutes=0.8),
    Stage("dpo", "the instruct model, on these pairs (Moxin's way)",
          "dpo.py {run} --init_from {road}/instruct/model --data {road}/pairs/pairs.jsonl "
          "--eval_prompts conversations --eval_samples 1 --chat_format moss --seq_len 384 --batch_size 8 "
          "--micro_batch_size 2 --lr 1e-4 --max_new_tokens 64 --eval_every 0",
          ("instruct", "pairs"), minutes=0.3),
    Stage("preference", "a model of which answer is better, on these pairs (MOSS's way)",
          "preference.py {run} --init_from {road}/instruct/model --data {road}/pairs/pairs.jsonl "
          "--chat_format moss --seq_len 384 --batch_size 8 --micro_batch_size 2 --epochs 2 --lr 3e-4",
          ("instruct", "pairs"), minutes=0.2),
    Stage("tags", "its scores of all answers, as tags from worst to best",
          "preference.py {run} --score {road}/pairs/pairs.jsonl --scorer {road}/preference/model "
          "--chat_format moss --seq_len 384 --micro_batch_size 4",
          ("pairs", "preference"), minutes=0.3),
    Stage("tagged", "the instruct model, on its own answers with their tags",
          "sft.py {run} --init_from {road}/instruct/model --data {road}/tags/tagged.jsonl "
          "--chat_format moss --quality_tags --keep_noisy --steps 80 --batch_size 8 --lr 1e-3 "
          "--optimizer adamw --eval_every 0", ("instruct", "tags"), minutes=0.5),
    Stage("problems", "problems of several steps, solved aloud by rule",
          "data/problems.py steps 3000 {out}/thoughts.jsonl", minutes=0.1),
    Stage("thoughts", "the base model, on these solutions (a chain of thought)",
          "sft.py {run} --init_from {road}/base/model --data {road}/problems/thoughts.jsonl "
          "--chat_format tulu --seq_len 256 --batch_size 16 --steps 360 --eval_every 0",
          ("base", "problems"), minutes=1),
    Stage("reasoning", "that model, by reinforcement on problems of the same kind (GRPO)",
          "grpo.py {run} --init_from {road}/thoughts/model --data steps --max_new_tokens 64 "
          "--seq_len 128 --prompts 32 --batch_size 128 --micro_batch_size 32 --steps 100 --warmup_steps 4 "
          "--lr 3e-4 --eval_problems 100 --eval_samples 4 --eval_every 0",
          ("thoughts",), minutes=2),
    Stage("vlm", "the instruct model with both encoders, on questions about drawn scenes",
          "vlm.py {run} --init_from {road}/instruct/model "
          "--vision {road}/towers/towers/dino-tiny {road}/towers/towers/siglip-tiny --steps 900 "
          "--batch_size 8 --micro_batch_size 8 --eval_rows 270",
          ("instruct", "towers"), minutes=3),
    *(Stage(f"eval-{name}", f"the model of {name}, on questions that no stage trained on",
            f"eval.py {{run}} --model {{road}}/{name}/model --tasks {tasks} --made 100",
            (name,), minutes=0.2)
      for name, tasks in EVALUATED.items()),
)
# fmt: on

COMPARISONS = (
    Comparison("instruct", "instructions", "eval-base", "eval-instruct"),
    Comparison("dpo", "instructions", "eval-instruct", "eval-dpo"),
    Comparison("tagged", "instructions", "eval-instruct", "eval-tagged"),
    Comparison("thoughts", "steps", "eval-base", "eval-thoughts"),
    Comparison("reasoning", "steps", "eval-thoughts", "eval-reasoning"),
)
TALKS = (
    ("Questions, some of which need a tool", "eval-instruct", "instructions"),
    ("A chain of thought", "eval-reasoning", "steps"),
    ("A picture and a question", "eval-vlm", "scenes"),
)


def selected(only: tuple[str, ...]) -> list[Stage]:
    """The stages asked for and everything that they need, in the order of STAGES."""
    stages = {stage.name: stage for stage in STAGES}
    wanted, queue = set(), list(only or stages)
    while queue:
        name = queue.pop()
        if name not in stages:
            raise UsageError(
                f"--only {name}: no such stage{nearest(name, stages)}; one of {', '.join(stages)}"
            )
        wanted.add(name)
        queue += stages[name].needs
    return [stage for stage in STAGES if stage.name in wanted]


class Job:
    """A stage at work in its own process; what it says goes to ROAD/NAME.log."""

    def __init__(self, stage: Stage, road: Path, config: Config, threads: int, lock: int) -> None:
        self.stage, self.folder, self.log = stage, road / stage.name, road / f"{stage.name}.log"
        run = f"--preset {config.preset} --seed {config.seed} --out {self.folder}"
        command = stage.command.format(road=road, out=self.folder, run=run, seed=config.seed)
        self.command = command.split()
        resume = ["--resume"] if any((self.folder / "checkpoints").glob("step_*")) else []
        gpus = torch.cuda.device_count()
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={gpus}"] if gpus > 1 else []
        self.started = time.monotonic()
        self.folder.mkdir(exist_ok=True)
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, *self.command, *resume],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                pass_fds=(lock,),  # the road stays taken for as long as any of its stages lives
                start_new_session=True,  # Ctrl-C is for this script, which passes it on
            )

    def share(self) -> float:
        """How much is done, by the last step in its metrics."""
        try:
            last = json.loads((self.folder / "metrics.jsonl").read_text().splitlines()[-1])
            steps = json.loads((self.folder / "config.json").read_text())["steps"]
            return min(1.0, last["step"] / steps)
        except (OSError, IndexError, KeyError, ValueError):  # not there yet, or just being written
            return 0.0

    def ended(self) -> dict[str, Any] | None:
        """None while it runs; then its command, exit code, time and memory."""
        pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if not pid:
            return None
        self.process.returncode = os.waitstatus_to_exitcode(status)
        return {
            "command": " ".join(["python", *self.command]),
            "exit_code": self.process.returncode,
            "seconds": time.monotonic() - self.started,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "peak_memory_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        }


class Ledger:
    """ROAD/stages.json: how each stage ended and what it cost, over all its starts."""

    def __init__(self, road: Path) -> None:
        self.path = road / "stages.json"
        self.stages = json.loads(self.path.read_text()) if self.path.exists() else {}

    def finished(self) -> set[str]:
        """Stages that ended well and were not deleted since."""
        kept = {path.name for path in self.path.parent.iterdir()}
        return {name for name, spent in self.stages.items() if not spent["exit_code"]} & kept

    def add(self, name: str, spent: dict[str, Any]) -> None:
        past = self.stages.get(name, {})
        for key in ("seconds", "cpu_seconds"):
            spent[key] += past.get(key, 0.0)
        spent["peak_memory_bytes"] = max(spent["peak_memory_bytes"], past.get("peak_memory_bytes", 0))
        self.stages[name] = {**spent, "starts": past.get("starts", 0) + 1}
        write_json(self.path, self.stages)


class Progress:
    """A bar with the time that remains on a terminal, a line every half minute elsewhere."""

    def __init__(self, stages: list[Stage], finished: set[str]) -> None:
        self.stages, self.started, self.told = stages, time.monotonic(), 0.0
        self.at_start: float | None = None  # what was done when this run began to look
        total = sum(stage.minutes for stage in stages)
        self.bar = tqdm(
            total=total,
            initial=self.minutes(finished, []),
            disable=not sys.stderr.isatty(),
            bar_format="{percentage:3.0f} % |{bar}| {elapsed}, about {remaining} left  {desc}",
        )

    def minutes(self, finished: set[str], jobs: list[Job]) -> float:
        done = sum(stage.minutes for stage in self.stages if stage.name in finished)
        return done + sum(job.stage.minutes * job.share() for job in jobs)

    def show(self, finished: set[str], jobs: list[Job]) -> None:
        done = self.minutes(finished, jobs)
        self.at_start = done if self.at_start is None else self.at_start
        names = ", ".join(f"{job.stage.name} {job.share():.0%}" for job in jobs)
        self.bar.set_description_str(names, refresh=False)
        self.bar.update(max(0.0, done - self.bar.n))
        now = time.monotonic()
        if self.bar.disable and now - self.told > 30:
            pace = (done - self.at_start) / (now - self.started)
            left = f"about {(self.bar.total - done) / pace / 60:.0f} min left" if pace else "starting"
            print(f"{done / self.bar.total:.0%} done, {left}: {names}", flush=True)
            self.told = now


def stop(jobs: list[Job], ledger: Ledger) -> None:
    """Ask the stages to save a checkpoint and leave; those that have not after a minute are ended."""
    for job in jobs:
        os.killpg(job.process.pid, signal.SIGTERM)
    deadline = time.monotonic() + 60
    for job in jobs:
        while not (spent := job.ended()):
            if time.monotonic() > deadline:
                os.killpg(job.process.pid, signal.SIGKILL)
            time.sleep(0.1)
        ledger.add(job.stage.name, spent)


def take(road: Path) -> int:
    """Lock the folder, waiting for stages that a killed run left behind. It opens with its last holder."""
    lock = os.open(road / ".lock", os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{road} is in use, or a stage of a killed run is still at work: waiting for it", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def walk(stages: list[Stage], road: Path, config: Config) -> None:
    """Run every stage that is not finished, each once what it needs is. Raises UserError if one fails."""
    cores = os.cpu_count() or 1
    at_once = config.jobs or (1 if torch.cuda.is_available() else min(2, cores))
    lock, ledger = take(road), Ledger(road)
    finished = ledger.finished()
    waiting = [stage for stage in stages if stage.name not in finished]
    progress, jobs = Progress(stages, finished), []
    try:
        while waiting or jobs:
            ready = [stage for stage in waiting if finished.issuperset(stage.needs)]
            for stage in ready[: at_once - len(jobs)]:
                waiting.remove(stage)
                jobs.append(Job(stage, road, config, max(1, cores // at_once), lock))
            for job in list(jobs):
                if spent := job.ended():
                    jobs.remove(job)
                    ledger.add(job.stage.name, spent)
                    if spent["exit_code"]:
                        last = job.log.read_text().strip().rpartition("\n")[2]
                        raise UserError(f"stage {job.stage.name} failed: {last[:300]} (all of it: {job.log})")
                    finished.add(job.stage.name)
                    tqdm.write(f"{job.stage.name}: done in {spent['seconds'] / 60:.1f} min")
            progress.show(finished, jobs)
            time.sleep(0.5)
    finally:
        stop(jobs, ledger)
        progress.bar.close()
        os.close(lock)


def main() -> None:
    config = parse(Config, PRESETS, about=__doc__)
    stages = selected(config.only)
    road = Path(config.out or f"runs/road-{config.preset}")
    road.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        walk(stages, road, config)
    except KeyboardInterrupt:
        raise UserError(f"stopped; run the same command again to go on in {road}") from None
    evaluations = {name: f"eval-{name}" for name in EVALUATED}
    path = write_report(road, [(s.name, s.what) for s in stages], evaluations, COMPARISONS, TALKS)
    print(f"done: open {path} in a browser")


if __name__ == "__main__":
    run_main(main)
