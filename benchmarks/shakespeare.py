"""Learning speed: pretrain.py against nanoGPT's documented CPU configuration on Tiny Shakespeare.

    python benchmarks/shakespeare.py FILE [NANOGPT_FOLDER]

FILE is Tiny Shakespeare (1.1 MB, the first 90 % train, the rest validate, as nanoGPT splits it). Both models
have 4 layers, 4 heads, width 128, one token a byte, context 64, one thread; ours gets at most the CPU seconds
that nanoGPT's 2,000 steps take. Without a clone of nanoGPT its reported 1.88 nats a character stands in, and
ours runs 2,000 steps of 12 sequences. Prints JSON and writes runs/bench/shakespeare.json.
"""

import json
import math
import os
import pickle
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPORTED_NATS = 1.88  # nanoGPT's README, "I only have a macbook"
OURS = (
    "--layers 4 --dim 128 --heads 4 --kv_heads 4 --ffn_dim 336 --seq_len 64 --batch_size 12 "
    "--micro_batch_size 12 --lr 2e-3 --min_lr 1e-4 --warmup_steps 50 --document_mask false --save_every 0 "
    "--log_every 100 --eval_every 100 --val_tokens 16000 --prompts ROMEO:"
).split()
THEIRS = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=50 "
    "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 "
    "--lr_decay_iters=2000 --dropout=0.0"
).split()


def cpu_seconds_of(command: list[str], folder: Path) -> tuple[float, str]:
    """CPU seconds, user and system, of a finished command, and what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def nanogpt(folder: Path, text: str) -> dict[str, float]:
    """nanoGPT's own train.py; its final evaluation is repeated by its own estimate, 20 batches a split."""
    data = folder / "data/shakespeare_char"
    letters = sorted(set(text))
    index = {letter: i for i, letter in enumerate(letters)}
    import numpy

    cut = int(0.9 * len(text))
    for name, part in (("train", text[:cut]), ("val", text[cut:])):
        numpy.array([index[letter] for letter in part], dtype=numpy.uint16).tofile(data / f"{name}.bin")
    meta = {"vocab_size": len(letters), "itos": dict(enumerate(letters)), "stoi": index}
    (data / "meta.pkl").write_bytes(pickle.dumps(meta))
    seconds, shown = cpu_seconds_of([sys.executable, "train.py", *THEIRS], folder)
    return {
        "cpu_seconds": seconds,
        "val_nats": float(re.findall(r"val loss ([\d.]+)", shown)[-1]),
        "steps": 2000,
    }


def ours(text: str, steps: int, out: Path) -> dict[str, object]:
    cut = int(0.9 * len(text))
    (out / "train.txt").write_text(text[:cut])
    (out / "val.txt").write_text(text[cut:])
    command = [sys.executable, "pretrain.py", "--vocab_size", str(vocabulary_of_bytes()), *OURS]
    command += ["--data", str(out / "train.txt"), "--val_data", str(out / "val.txt"), "--device", "cpu"]
    seconds, _ = cpu_seconds_of([*command, "--steps", str(steps), "--out", str(out / "run")], ROOT)
    records = [json.loads(line) for line in (out / "run/metrics.jsonl").read_text().splitlines()]
    curve = [(record["step"], record["bpb/val"] * math.log(2)) for record in records if "bpb/val" in record]
    return {"cpu_seconds": seconds, "val_nats": curve[-1][1], "steps": steps, "curve": curve}


def vocabulary_of_bytes() -> int:
    """256 bytes and the special tokens: no merges, so a token is a byte as in nanoGPT."""
    from data.tokenizer import SPECIAL_TOKENS

    return 256 + len(SPECIAL_TOKENS)


def main() -> None:
    text = Path(sys.argv[1]).read_text() if len(sys.argv) > 1 else sys.exit(__doc__)
    theirs = nanogpt(Path(sys.argv[2]).resolve(), text) if len(sys.argv) > 2 else {"val_nats": REPORTED_NATS}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NANOMOXIN_CACHE"] = f"{folder}/cache"
        mine = ours(text, 2000, Path(folder))
    result = {"nanogpt": theirs, "nanogpt_reported_nats": REPORTED_NATS, "ours": mine}
    reached = [step for step, nats in mine["curve"] if nats <= theirs["val_nats"]]
    if reached and "cpu_seconds" in theirs:
        share = mine["cpu_seconds"] * reached[0] / mine["steps"] / theirs["cpu_seconds"]
        result["share_of_nanogpt_cpu_seconds_to_its_final_loss"] = share
    (ROOT / "runs/bench").mkdir(parents=True, exist_ok=True)
    (ROOT / "runs/bench/shakespeare.json").write_text(json.dumps(result, indent=1))
    mine["curve"] = " ".join(f"{step}:{nats:.3f}" for step, nats in mine["curve"])
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    main()
