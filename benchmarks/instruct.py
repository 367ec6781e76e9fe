"""What fine-tuning teaches the tiny model: the preset on several seeds, asked before and after.

    python benchmarks/instruct.py BASE [--seeds 3] [--out runs/instruct]

BASE is the model folder of `pretrain.py --preset tiny`. For each seed it runs `sft.py --preset tiny`; a seed
that is finished in --out is not run again. Then the same held-out sums are asked with the calculator on and
off: what differs is one line of the meta-instruction. With it off, a model should say so rather than guess.
Prints the least and the most of the seeds.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from core import tools  # noqa: E402
from core.checkpoint import load_pretrained  # noqa: E402
from data.conversations import Example, generate, is_right  # noqa: E402
from data.replies import replies  # noqa: E402
from data.tokenizer import load_tokenizer  # noqa: E402

SUMS = 300
SEED = 10_000  # of the questions, none of which a run has seen


def sums() -> list[Example]:
    """Held-out sums, with every tool on or off as it happens, and the calculator on."""
    kinds = generate(8 * SUMS, "value", SEED)
    return [example for example in kinds if example.kind == "calculation"][:SUMS]


def without_calculator(example: Example) -> Example:
    system = example.messages[0]["content"]
    on = [name for name in tools.TOOLS if f"API: {name}(" in system and name != "Calculate"]
    messages = [{"role": "system", "content": tools.meta_instruction(on)}, *example.messages[1:]]
    return Example(example.kind, messages, example.answer)


def calculator(folder: Path) -> dict[str, float]:
    """Exact answers with the calculator on and off, and the share of well-formed and of right commands."""
    model, tokenizer = load_pretrained(folder), load_tokenizer(folder)
    found = {}
    for state, examples in (("on", sums()), ("off", [without_calculator(example) for example in sums()])):
        talks = [example.messages[:-1] for example in examples]
        made = replies(model, tokenizer, talks, "moss", temperature=0.0)
        right = [is_right(example, reply["content"]) for example, reply in zip(examples, made, strict=True)]
        found[f"sums right, calculator {state}"] = sum(right) / len(right)
        if state == "on":
            called = [tools.parse_commands(reply.get("commands", "")) for reply in made]
            found["sums: well-formed command"] = sum(map(bool, called)) / len(called)
            found["sums: right command"] = sum(
                command == [example.command] for command, example in zip(called, examples, strict=True)
            ) / len(called)
        else:
            declined = [re.search("switched off|已关闭", reply["content"]) for reply in made]
            found["sums declined, calculator off"] = sum(map(bool, declined)) / len(declined)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("base", help="model folder to start from")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/instruct")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    before, after = [], []
    for seed in range(arguments.seeds):
        folder = arguments.out / str(seed)
        if not (folder / "summary.json").exists():
            command = [sys.executable, "sft.py", "--preset", "tiny", "--init_from", arguments.base]
            command += ["--seed", str(seed), "--out", str(folder)]
            one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=one_thread)
            if done.returncode:
                sys.exit(f"seed {seed} failed: {done.stderr.strip().splitlines()[-1]}")
        summary = json.loads((folder / "summary.json").read_text())
        before.append(summary["before"])
        after.append(summary["after"] | calculator(folder / "model"))
    print(f"{arguments.seeds} seeds, {SUMS} sums{'before':>29}{'after, least and most':>30}")
    for name in sorted(after[0], key=lambda name: ("accuracy" in name, name)):
        values = [seed[name] for seed in after]
        start = f"{max(seed[name] for seed in before):.3f}" if name in before[0] else ""
        print(f"{name.removeprefix('accuracy/'):40}{start:>10}{min(values):20.3f}{max(values):10.3f}")


if __name__ == "__main__":
    main()
