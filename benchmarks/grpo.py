"""What reinforcement teaches small models, with controls.

    python benchmarks/grpo.py [EXPERIMENT] [--seeds 0 1 2] [--picture]

Each row is a run of grpo.py on one thread; held-out problems before and after. CPU-s are processor seconds of
demonstrations and of reinforcement, evaluation not counted. Experiments:

    sorting      sort 8 digits
    countdown    reach a number with three others; held out by numbers and target
    steps        the last digit after five operations, with thoughts; one control is shown answers alone
    calculator   products of numbers of two or three digits with the calculator; the same model without it

Controls: the same start with rewards given to the wrong completions, and a new model taught by demonstrations
for at least 0.95 of the processor time that the first row took in all.
"""

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EVALUATE = ["--steps", "1", "--lr", "0"]  # the one rollout changes nothing
MOSS = "--chat_format moss --vocab_size 420 --system 'Calculator: enabled. API: Calculate(expression)'"
LONGER = "--prompts 16 --batch_size 128 --seq_len 128 --eval_problems 100"  # answers, so fewer of them
EXPERIMENTS = {  # arguments of grpo.py
    "sorting": "",
    "countdown": "--data countdown --warm_batch 64 --warm_steps 250 --max_new_tokens 14 --steps 220",
    "steps": "--data steps --warm_steps 200 --warm_lr 4e-3 --lr 2e-4 --steps 40 --eval_every 10 "
    f"--max_new_tokens 44 {LONGER}",
    "calculator": "--data products --warm_steps 300 --lr 3e-4 --steps 60 "
    f"--max_new_tokens 56 {LONGER} {MOSS} --tools calculator",
}


def run(folder: Path, seed: int, *arguments: str) -> dict:
    """One run of grpo.py in a process of its own; its summary."""
    command = [sys.executable, str(ROOT / "grpo.py"), "--out", str(folder), "--seed", str(seed)]
    command += "--preset tiny --device cpu --save_every 0 --eval_every 0".split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads((folder / "summary.json").read_text())


def rows(experiment: str, seed: int, folder: Path) -> dict[str, dict]:
    """The summaries of an experiment's runs with one seed, by name."""
    arguments = shlex.split(EXPERIMENTS[experiment])
    first = run(folder / "grpo", seed, *arguments)
    found = {"demonstrations + GRPO": first}
    if experiment == "calculator":  # [:-2]: all but --tools calculator
        without = [*arguments[:-2], "--init_from", str(folder / "grpo/model")]
        found["  the same, calculator off"] = run(folder / "off", seed, *without, *EVALUATE)
    start = ["--init_from", str(folder / "grpo/start"), "--shuffle_rewards"]
    found["  rewards shuffled"] = run(folder / "shuffled", seed, *arguments, *start)
    name = "demonstrations, same time"
    if experiment == "steps":
        name, arguments = "answers alone, same time", ["--data", "steps-direct", *arguments[2:]]
    found[name] = for_as_long(sum(first["cpu_seconds"].values()), folder, seed, *arguments)
    return found


def for_as_long(budget: float, folder: Path, seed: int, *arguments: str) -> dict:
    """The summary of a run with so many demonstrations as fill the budget of processor seconds.

    How many that is is known when they have been made, as the machine's speed changes: runs too short are
    made again with more.
    """
    steps, spent = 100, 0.0
    while spent < 0.95 * budget:
        words = [*arguments, "--warm_steps", str(steps), *EVALUATE]
        summary = run(folder / f"alone{steps}", seed, *words)
        spent = summary["cpu_seconds"]["demonstrations"]
        steps = math.ceil(steps * budget / spent)
    return summary


def show(name: str, seed: str, summaries: list[dict]) -> None:
    """A line of the table: means of some runs."""

    def mean(part: str, figure: str) -> float:
        return sum(summary[part][figure] for summary in summaries) / len(summaries)

    figures = [f for f in summaries[0]["after"] if f != "eval_length"]
    columns = [f"{mean('before', figure):.3f} -> {mean('after', figure):.3f}" for figure in figures]
    columns += [f"{mean('before', 'eval_length'):5.1f} -> {mean('after', 'eval_length'):5.1f}"]
    seconds = [mean("cpu_seconds", part) for part in ("demonstrations", "reinforcement")]
    print(f"{name:27s} {seed:4s}   {'   '.join(columns)}   {seconds[0]:3.0f} + {seconds[1]:3.0f}", flush=True)


def draw(runs: dict[str, Path], picture: Path) -> None:
    """Accuracy and length of sampled answers to held-out problems over the rollouts of some runs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for name, folder in runs.items():
        records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        points = [record for record in records if "pass@1" in record]
        for panel, key in zip(panels, ("pass@1", "eval_length"), strict=True):
            panel.plot([p["step"] for p in points], [p[key] for p in points], marker=".", label=name)
            panel.set(xlabel="rollouts", ylabel=key)
    panels[0].legend(fontsize=7)
    figure.savefig(picture, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("experiment", nargs="?", choices=EXPERIMENTS, default="sorting")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--picture", action="store_true", help="draw docs/grpo_EXPERIMENT.png")
    options = parser.parse_args()
    head = "   ".join(f"{name:14s}" for name in ("pass@1", "pass@8", "greedy", "length"))
    print(f"{options.experiment:27s} seed   {head}   CPU-s", flush=True)
    found: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            for name, summary in rows(options.experiment, seed, Path(folder, str(seed))).items():
                show(name, str(seed), [summary])
                found.setdefault(name, []).append(summary)
        for name, summaries in found.items():
            show(name, "mean", summaries)
        if options.picture:
            runs = {f"seed {seed}": Path(folder, str(seed), "grpo") for seed in options.seeds}
            draw(runs, ROOT / f"docs/grpo_{options.experiment}.png")


if __name__ == "__main__":
    main()
