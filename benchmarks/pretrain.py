"""Speed and memory of a training step against a plain loop over transformers' MistralForCausalLM.

    python benchmarks/pretrain.py [--compile] [--rounds N]

Same shapes (4 layers, width 256, 4/2 heads, feed-forward 704, vocabulary 8192, 12 x 256 tokens a step), same
thread count (OMP_NUM_THREADS, default 1), float32, fused AdamW, clipping at 1. Each round is a fresh process
of either, in turn; medians of CPU seconds a step and of peak resident memory. Also: data loading's share of a
step.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROWS, LENGTH, VOCABULARY = 12, 256, 8192
STEPS, WARM = 6, 2


def our_step(compiled: bool) -> Callable:
    import torch

    from core.optimizer import make_adamw
    from core.parallel import clip_grad_norm
    from model import Config, Transformer

    model = Transformer(Config(vocab_size=VOCABULARY))
    if compiled:
        for layer in model.layers:
            layer.compile()
    optimizer = make_adamw(model, 1e-3, 0.1)

    def step(tokens: torch.Tensor, targets: torch.Tensor) -> float:
        loss, count = model.loss(tokens, targets)
        (loss / count).backward()
        clip_grad_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return (loss / count).item()

    return step


def their_step(compiled: bool) -> Callable:
    import torch
    import transformers

    config = transformers.MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        sliding_window=None,
        attn_implementation="sdpa",
        use_cache=False,
    )
    model = transformers.MistralForCausalLM(config)
    run = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )

    def step(tokens: torch.Tensor, targets: torch.Tensor) -> float:
        logits = run(tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def measure(who: str, compiled: bool) -> None:
    """Run in a process of its own: print CPU seconds of each step after the warm ones, and peak memory."""
    import torch

    torch.manual_seed(0)
    step = (our_step if who == "ours" else their_step)(compiled)
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH + 1))
    seconds = []
    for _ in range(WARM + STEPS):
        begun = time.process_time()
        loss = step(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
        seconds.append(time.process_time() - begun)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds[WARM:], "peak": peak, "loss": loss}))


def data_share() -> float:
    """CPU seconds to fetch a batch of the embedded corpus, over those of a compiled-free training step on
    it."""
    import torch

    from data.text import PackedBatches, prepare

    corpus, _ = prepare(("drills",), vocab_size=1024)
    batches = PackedBatches(corpus.train, {"drills": 1.0}, LENGTH, ROWS, 0)
    step = our_step(False)
    batches.batch(0)
    times = [0.0, 0.0]
    for i in range(1, 6):
        begun = time.process_time()
        batch = batches.batch(i)
        middle = time.process_time()
        step(batch.tokens, batch.targets)
        times[0] += middle - begun
        times[1] += time.process_time() - middle
    torch.set_num_threads(1)
    return times[0] / times[1]


def main() -> None:
    if "--measure" in sys.argv:
        return measure(sys.argv[-1], "--compile" in sys.argv)
    rounds = int(sys.argv[sys.argv.index("--rounds") + 1]) if "--rounds" in sys.argv else 5
    compiled = ["--compile"] if "--compile" in sys.argv else []
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    found: dict[str, list[dict]] = {"ours": [], "transformers": []}
    for _ in range(rounds):
        for who in found:
            command = [sys.executable, __file__, "--measure", *compiled, who]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            found[who].append(json.loads(done.stdout.splitlines()[-1]))
    summary = {
        who: {
            "cpu_seconds_a_step": statistics.median(s for run in runs for s in run["seconds"]),
            "peak_bytes": statistics.median(run["peak"] for run in runs),
        }
        for who, runs in found.items()
    }
    paired = [
        statistics.median(theirs["seconds"]) / statistics.median(mine["seconds"])
        for mine, theirs in zip(found["ours"], found["transformers"], strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NANOMOXIN_CACHE"] = folder
        summary["data_share_of_step"] = data_share()
    summary["speed_ratio_by_round"] = paired
    summary["speed_ratio"] = statistics.median(paired)
    summary["memory_ratio"] = summary["ours"]["peak_bytes"] / summary["transformers"]["peak_bytes"]
    summary["compiled"] = bool(compiled)
    (ROOT / "runs/bench").mkdir(parents=True, exist_ok=True)
    name = "pretrain-compiled.json" if compiled else "pretrain.json"
    (ROOT / "runs/bench" / name).write_text(json.dumps(summary, indent=1))
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    main()
