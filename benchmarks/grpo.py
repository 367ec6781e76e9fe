"""What reinforcement teaches small models, with controls.

    python benchmarks/grpo.py [EXPERIMENT] [--seeds 0 1 2]

Each row is a whole run of grpo.py on one thread. "CPU-s" are processor seconds of demonstrations and of
reinforcement, without evaluation. Experiments:

    sorting      sort 8 digits; controls: rewards given to the wrong completions, demonstrations for as long
    countdown    make a number from three; the same controls
    steps        six operations in a row with thoughts, against demonstrations of the answer alone
    calculator   products of large numbers with the calculator, and without
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUPERVISED = ["--steps", "1", "--lr", "0"]  # demonstrations only: the one rollout changes nothing
LONGER = ["--num_samples", "8", "--seq_len", "160", "--micro_batch_size", "128", "--max_new_tokens", "64"]
MOSS = [
    "--data",
    "products",
    "--chat_format",
    "moss",
    "--system",
    "Calculator: enabled. API: Calculate(expression)",
]

# experiment -> rows: (name, arguments of grpo.py)
EXPERIMENTS: dict[str, dict[str, list[str]]] = {
    "sorting": {
        "demonstrations + GRPO": [],
        "  rewards shuffled": ["--shuffle_rewards"],
        "demonstrations, same time": ["--warm_steps", "450", *SUPERVISED],
    },
    "countdown": {
        "demonstrations + GRPO": ["--data", "countdown", "--warm_steps", "400"],
        "  rewards shuffled": ["--data", "countdown", "--warm_steps", "400", "--shuffle_rewards"],
        "demonstrations, same time": ["--data", "countdown", "--warm_steps", "800", *SUPERVISED],
    },
    "steps": {
        "thoughts + GRPO": ["--data", "steps", "--warm_steps", "200", "--steps", "20", *LONGER],
        "answers alone, same time": ["--data", "steps-direct", "--warm_steps", "900", *SUPERVISED, *LONGER],
    },
    "calculator": {
        "calculator + GRPO": [
            *MOSS,
            "--tools",
            "calculator",
            "--warm_steps",
            "400",
            "--steps",
            "20",
            *LONGER,
        ],
        "calculator switched off": [*MOSS, "--warm_steps", "400", *SUPERVISED, *LONGER],
    },
}


def run(arguments: list[str], seed: int) -> dict:
    """One run of grpo.py in a process of its own; its summary."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "grpo.py"), "--out", f"{folder}/run", "--seed", str(seed)]
        command += ["--device", "cpu", "--eval_every", "0", "--save_every", "0", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        return json.loads(Path(folder, "run", "summary.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("experiment", nargs="?", choices=EXPERIMENTS, default="sorting")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    print(
        f"{options.experiment:28s} seed   greedy          pass@1          pass@8          CPU-s", flush=True
    )
    for name, arguments in EXPERIMENTS[options.experiment].items():
        for seed in options.seeds:
            summary = run(arguments, seed)
            columns = [
                f"{summary['before'][figure]:.3f} -> {summary['after'][figure]:.3f}"
                for figure in ("greedy", "pass@1", "pass@8")
            ]
            spent = summary["cpu_seconds"]
            seconds = f"{spent['warm start']:.0f} + {spent['rollouts and updates']:.0f}"
            print(f"{name:28s} {seed:<4d}   {'   '.join(columns)}   {seconds}", flush=True)


if __name__ == "__main__":
    main()
