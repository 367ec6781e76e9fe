"""Two passes over real instructions from a small base model: the loss curve and the speed.

    python benchmarks/sft_real.py BASE FILE [FILE ...]

BASE is a model folder, the files are conversations in any schema of data/readers.py; one in fifty is held
out. Prints what was read, the training loss averaged over twelve stretches of the run, the held-out loss
before and after, and tokens a second.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median

ROOT = Path(__file__).resolve().parent.parent
STRETCHES = 12
SETTINGS = "--preset tiny --chat_format tulu --seq_len 512 --batch_size 16 --epochs 2 --lr 5e-3 --log_every 1"


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__.splitlines()[2].strip())
    base, *files = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "sft.py", *SETTINGS.split(), "--init_from", base, "--out", folder]
        start = time.perf_counter()
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, "--data", *files], cwd=ROOT, capture_output=True, text=True, env=one_thread
        )
        if done.returncode:
            sys.exit(done.stderr.strip().splitlines()[-1])
        seconds = time.perf_counter() - start
        summary = json.loads((Path(folder) / "summary.json").read_text())
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    size = -(-len(steps) // STRETCHES)
    print(f"{summary['conversations']}, {summary['tokens']:,} tokens in {len(steps)} steps, {seconds:.0f} s")
    for first in range(0, len(steps), size):
        part = steps[first : first + size]
        print(f"steps {part[0]['step']:4} to {part[-1]['step']:4}  loss {mean(s['loss'] for s in part):.3f}")
    before, after = summary["before"]["val_loss"], summary["after"]["val_loss"]
    print(f"held-out loss {before:.3f} -> {after:.3f} nats a trained token")
    print(f"{median(step['tokens_per_second'] for step in steps):,.0f} tokens/s, one thread")


if __name__ == "__main__":
    main()
