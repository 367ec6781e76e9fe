"""Packed fine-tuning against TRL's SFTTrainer: tokens of conversations a CPU second.

    python benchmarks/sft.py [--rounds N]      needs trl 1.16.0 and datasets, in an environment of their own

The same 2,000 generated conversations and tokenizer, the same Mistral-type model (4 layers, width 256,
vocabulary 1,000), rows of 512, about 8 rows a step, float32, AdamW, clipping at 1, every token trained, one
thread. Each round is a fresh process of either, in turn; medians over steps, then over rounds. Padding is not
counted. TRL packs the whole set best-fit and on a CPU lets the conversations of a row see each other; ours
packs each step and keeps them apart.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
LENGTH, ROWS, STEPS, WARM = 512, 8, 10, 3
SHAPE = dict(vocab_size=1000, layers=4, dim=256, heads=4, kv_heads=2, head_dim=64, ffn_dim=704)


def conversations():
    """The tokenizer, and the token ids of every conversation."""
    from data.chat import render
    from data.conversations import generate
    from data.tokenizer import train_tokenizer

    talks = [example.messages for example in generate(2000, with_tools=False)]
    texts = [message["content"] for talk in talks for message in talk]
    tokenizer = train_tokenizer(texts, SHAPE["vocab_size"])
    return tokenizer, [render(talk, tokenizer).ids for talk in talks]


def ours() -> list[float]:
    import numpy as np
    import torch

    from core.optimizer import make_adamw
    from core.parallel import clip_grad_norm
    from data.packing import Item, Packer, micro_batches
    from model import Config, Transformer
    from sft import batch_loss

    torch.set_num_threads(1)
    _, ids = conversations()
    items = [Item(np.array(row, np.int32), np.ones(len(row), bool)) for row in ids]
    count = round(ROWS * LENGTH / statistics.mean(map(len, ids)))
    packer = Packer([(items, 1.0)], count, seed=0)
    model = Transformer(Config(**SHAPE))
    optimizer = make_adamw(model, 1e-4, 0.0)
    speeds = []
    for step in range(STEPS):
        start = time.process_time()
        tokens = 0
        for batch in micro_batches(packer.step(step), LENGTH, True, ROWS):
            loss, counted = batch_loss(model, batch)
            (loss / counted).backward()
            tokens += int((batch.doc_ids >= 0).sum())
        clip_grad_norm(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        speeds.append(tokens / (time.process_time() - start))
    return speeds[WARM:]


def theirs() -> list[float]:
    import datasets.fingerprint
    import torch
    import transformers
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(1)
    # The names of cache files are hashes of pickled functions, which dill cannot make with every pyarrow.
    datasets.fingerprint.Hasher.hash = staticmethod(lambda value: uuid.uuid4().hex)
    tokenizer, ids = conversations()
    config = transformers.MistralConfig(
        vocab_size=SHAPE["vocab_size"],
        hidden_size=SHAPE["dim"],
        intermediate_size=SHAPE["ffn_dim"],
        num_hidden_layers=SHAPE["layers"],
        num_attention_heads=SHAPE["heads"],
        num_key_value_heads=SHAPE["kv_heads"],
        head_dim=SHAPE["head_dim"],
        sliding_window=None,
    )
    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *arguments, **keywords) -> None:
            times.append(time.process_time())

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        settings = SFTConfig(
            output_dir=folder,
            max_length=LENGTH,
            packing=True,
            per_device_train_batch_size=ROWS,
            max_steps=STEPS + 1,
            learning_rate=1e-4,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model=transformers.MistralForCausalLM(config),
            args=settings,
            train_dataset=Dataset.from_dict({"input_ids": ids}),
            processing_class=transformers.AutoTokenizer.from_pretrained(folder),
            callbacks=[Clock()],
        )
        tokens = ROWS * sum(map(len, ids)) / len(trainer.train_dataset)  # of a step, on average
        trainer.train()
    seconds = [after - before for before, after in pairwise(times)]
    return [tokens / duration for duration in seconds[WARM:]]


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps({"ours": ours, "trl": theirs}[sys.argv[2]]()))
        return
    rounds = int(sys.argv[sys.argv.index("--rounds") + 1]) if "--rounds" in sys.argv else 3
    speeds: dict[str, list[float]] = {"ours": [], "trl": []}
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **os.environ}
    for _ in range(rounds):
        for name, found in speeds.items():
            command = [sys.executable, __file__, "--one", name]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
            if done.returncode:
                sys.exit(f"{name} failed: {done.stderr.strip().splitlines()[-1]}")
            found.append(statistics.median(json.loads(done.stdout.splitlines()[-1])))
    ratios = [a / b for a, b in zip(speeds["ours"], speeds["trl"], strict=True)]
    for name, found in speeds.items():
        spread = f"{min(found):,.0f} to {max(found):,.0f}"
        print(f"{name:5} {statistics.median(found):8,.0f} tokens/CPU-s  ({spread})")
    print(f"ratio {statistics.median(ratios):8.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
