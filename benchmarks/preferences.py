"""What comparisons teach a small model that sorts eight digits, with controls; real pairs; speed.

    python benchmarks/preferences.py [--seeds 0 1 2]        the whole recipe on sorting, one thread
    python benchmarks/preferences.py --real FOLDER --model MODEL    pairs of people, English and Chinese
    python benchmarks/preferences.py --speed                pairs a CPU second against TRL's DPOTrainer

Sorting: the stages as commands, run in one process. A row is the share of right answers among four sampled
(temperature 1) to each of 200 held-out prompts. First DPO on pairs of the model's own answers; then MOSS's
way on answers of which half are spoilt, two digits exchanged: a preference model, tags by it alone,
fine-tuning.

Real pairs: FOLDER holds dpo_en_demo.json and dpo_zh_demo.json. Speed: the same model (4 layers, width 256,
vocabulary 1,000), pairs, batch of 16 pairs, cached reference, float32, AdamW, one thread; processes of either
in turn. Needs trl 1.16 and datasets.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import random
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
TUNING = "--chat_format tulu --optimizer adamw --lr 1e-3 --min_lr 0 --steps 100 --seq_len 128 --batch_size 64"
TUNING += " --micro_batch_size 32 --samples 0 --eval_every 0 --save_every 0 --weight_decay 0"


def stage(script: str, out: Path, words: str) -> dict:
    """Run one stage in this process; its summary."""
    command = ["--device", "cpu", "--preset", "tiny", "--out", str(out), *words.split()]
    before, sys.argv = sys.argv, [script, *command]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            importlib.import_module(script.removesuffix(".py")).main()
    finally:
        sys.argv = before
    summary = json.loads((out / "summary.json").read_text())
    print(f"{script} {' '.join(command)}\n  {summary.get('after', '')}", file=sys.stderr, flush=True)
    return summary


def right(folder: Path, quality: int | None = None, contrast: float = 0.0) -> float:
    """Share of right answers, sampled, to held-out prompts; asked for a quality if given."""
    from core.checkpoint import load_pretrained
    from core.generate import generate
    from data.chat import render
    from data.prompts import read_prompts
    from data.tokenizer import load_tokenizer

    model, tokenizer = load_pretrained(folder), load_tokenizer(folder)
    prompts = read_prompts("sorting", 200, 0, held_out=True)

    def asked(level: int | None) -> list[list[int]]:
        turn = {"role": "assistant"} | ({} if level is None else {"quality": level})
        return [render([*prompt.messages, turn], tokenizer, "tulu").ids for prompt in prompts]

    options = dict(stop_ids=(tokenizer.eos_id,), max_batch=256)
    if contrast:
        options |= dict(avoided=asked(0), contrast=contrast)
    made = generate(model, asked(quality), 16, 4, **options)
    texts = [[tokenizer.decode(one.tokens[:-1]) for one in group] for group in made]
    found = [prompt.check(text) for prompt, group in zip(prompts, texts, strict=True) for text in group]
    share = sum(found) / len(found)
    print(f"right {share:.3f}: {folder} {quality} {contrast}", file=sys.stderr, flush=True)
    return share


def sampled(seed: int, work: Path) -> dict[str, float]:
    """DPO on pairs of the model's own answers: both losses, each with its beta, at one learning rate."""
    same = f"--seed {seed} --save_every 0 --eval_every 0"
    norm = stage("dpo.py", work / "dpo", same)  # makes the start and the pairs too
    given = (
        f"--init_from {work / 'dpo/start'} --data {work / 'dpo/pairs.jsonl'} --eval_prompts sorting {same}"
    )
    summed = stage("dpo.py", work / "sum", f"{given} --loss sigmoid --beta 0.1")
    rows = {"start": norm["before"]["val_right"]}
    for name, summary in (("DPO, averages, beta 5", norm), ("DPO, sums, beta 0.1", summed)):
        rows[name] = summary["after"]["val_right"]
        for figure in ("accuracy", "chosen_drift", "rejected_drift"):
            rows[f"  {name}: {figure}"] = summary["after"][f"val_{figure}"]
    return rows


def spoilt_answers(seed: int, count: int, file: Path) -> None:
    """Two answers to each prompt, as data/pairs.py writes them: the right one, and one with two unequal
    digits exchanged. Half of what a model would learn from is wrong."""
    from data.prompts import read_prompts

    rng = random.Random(seed)
    with open(file, "w") as lines:
        for prompt in read_prompts("sorting", count, seed):
            right, wrong = prompt.answer, list(prompt.answer)
            while "".join(wrong) == right:
                i, j = rng.sample(range(len(right)), 2)
                wrong[i], wrong[j] = wrong[j], wrong[i]
            replies = [{"role": "assistant", "content": text} for text in (right, "".join(wrong))]
            chosen, rejected = ([*prompt.messages, reply] for reply in replies)
            responses = [{"content": reply["content"], "finish_reason": "stop"} for reply in replies]
            sides = {"chosen": chosen, "rejected": rejected, "responses": responses}
            lines.write(json.dumps(prompt.record() | sides) + "\n")


def tags(seed: int, work: Path) -> dict[str, float]:
    """MOSS's way on data of which half is spoilt: preference model, tags, fine-tuning, asking."""
    start, pairs, best = work / "dpo/start", work / "spoilt.jsonl", work / "best.jsonl"
    spoilt_answers(seed, 1500, pairs)
    given = f"--init_from {start} --data {pairs} --seed {seed} --save_every 0 --eval_every 0"
    model = stage("preference.py", work / "pm", given)["after"]
    control = stage("preference.py", work / "shuffled", f"{given} --shuffle_labels")["after"]
    stage("preference.py", work / "tags", f"--score {pairs} --scorer {work / 'pm/model'} --seed {seed}")
    tagged = work / "tags/tagged.jsonl"
    lines = tagged.read_text().splitlines(keepends=True)
    best.write_text("".join(line for line in lines if json.loads(line)["messages"][-1]["quality"] == 4))
    tuning = f"--init_from {start} --seed {seed} {TUNING}"
    stage("sft.py", work / "untagged", f"{tuning} --data {tagged}")
    stage("sft.py", work / "best", f"{tuning} --data {best}")
    stage("sft.py", work / "tagged", f"{tuning} --data {tagged} --quality_tags")
    dpo = stage("dpo.py", work / "spoilt", f"{given} --eval_prompts sorting")["after"]
    return {
        "preference model: held-out pairs right": model["val_accuracy"],
        "  labels shuffled": control["val_accuracy"],
        "  correlation of score and length": model["val_length_correlation"],
        "all answers, no tags": right(work / "untagged/model"),
        "best fifth alone, no tags": right(work / "best/model"),
        "DPO on the same pairs": dpo["val_right"],
        "tags, none asked for": right(work / "tagged/model"),
        **{f"tags, <quality_{level}> asked for": right(work / "tagged/model", level) for level in range(5)},
        "tags, best led away from worst by 0.5": right(work / "tagged/model", 4, 0.5),
    }


def table(found: list[dict[str, float]], seeds: list[int]) -> None:
    print(f"{'':42}" + "".join(f"seed {seed}".rjust(9) for seed in seeds) + "     mean")
    for name in found[0]:
        values = [rows[name] for rows in found]
        print(f"{name:42}" + "".join(f"{value:9.3f}" for value in [*values, statistics.mean(values)]))


def real(folder: Path, model: str, seeds: list[int]) -> None:
    """Preference model and DPO on 300 English and 300 Chinese pairs of people; a fifth held out."""
    data = " ".join(str(folder / f"dpo_{language}_demo.json") for language in ("en", "zh"))
    given = f"--init_from {model} --data {data} --too_long cut --seq_len 256 --batch_size 16"
    given += (
        " --micro_batch_size 8 --val_fraction 0.2 --save_every 0 --eval_every 0 --eval_samples 1 --epochs 1"
    )
    found = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as place:
            words, work = f"{given} --seed {seed}", Path(place)
            judged = stage("preference.py", work / "pm", f"{words} --lr 1e-3")["after"]
            tuned = stage("dpo.py", work / "dpo", f"{words} --lr 5e-5")["after"]
        found.append(
            {
                "preference model: held-out pairs right": judged["val_accuracy"],
                "  the longer answer is better": judged["val_longer_better"],
                "  correlation of score and length": judged["val_length_correlation"],
                "DPO: held-out pairs right": tuned["val_accuracy"],
                "  by summed log-probabilities": tuned["val_summed_accuracy"],
                "  chosen_drift": tuned["val_chosen_drift"],
                "  rejected_drift": tuned["val_rejected_drift"],
            }
        )
        print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    table(found, seeds)


# Speed

SHAPE = dict(vocab_size=1000, layers=4, dim=256, heads=4, kv_heads=2, head_dim=64, ffn_dim=704)
PAIRS, BATCH, STEPS, WARM = 96, 16, 5, 1


def made_pairs() -> list[dict[str, list[int]]]:
    """Prompts and two answers as ids, of unlike lengths as answers are."""
    rng = random.Random(0)

    def ids(least: int, most: int) -> list[int]:
        return [rng.randrange(20, 1000) for _ in range(round(least * (most / least) ** rng.random()))]

    return [{"prompt": ids(16, 128), "chosen": ids(16, 256), "rejected": ids(16, 256)} for _ in range(PAIRS)]


def ours() -> list[float]:
    import numpy as np
    import torch

    import dpo
    from core.optimizer import make_adamw
    from core.parallel import clip_grad_norm
    from core.run import Run
    from data.packing import Item
    from data.pair_batches import PairItem
    from model import Config, Transformer

    torch.set_num_threads(1)

    def item(prompt: list[int], answer: list[int]) -> Item:
        return Item(np.array(prompt + answer, np.int32), np.arange(len(prompt + answer)) >= len(prompt))

    pairs = [PairItem(*(item(p["prompt"], p[side]) for side in ("chosen", "rejected"))) for p in made_pairs()]
    model = Transformer(Config(**SHAPE))
    with tempfile.TemporaryDirectory() as folder:
        config = dpo.Config(
            warm_steps=1, device="cpu", seq_len=512, micro_batch_size=4, batch_size=BATCH, out=f"{folder}/run"
        )
        run = Run(config, "dpo")
        reference = dpo.reference_logprobs(model, pairs, {}, config, run)
        optimizer = make_adamw(model, 1e-6, 0.0)
        speeds = []
        for step in range(STEPS):
            begun = time.process_time()
            numbers = [(step * BATCH + i) % PAIRS for i in range(BATCH)]
            dpo.step_loss(model, [pairs[n] for n in numbers], reference[numbers], config, run)
            clip_grad_norm(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            speeds.append(BATCH / (time.process_time() - begun))
    return speeds[WARM:]


def theirs() -> list[float]:
    import datasets.fingerprint
    import torch
    import transformers
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from data.tokenizer import train_tokenizer

    torch.set_num_threads(1)
    datasets.fingerprint.Hasher.hash = staticmethod(lambda value: uuid.uuid4().hex)
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

    names = {"prompt": "prompt_ids", "chosen": "chosen_ids", "rejected": "rejected_ids"}
    rows = {name: [pair[ours] for pair in made_pairs()] for ours, name in names.items()}
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(["."], 290).save(folder)
        settings = DPOConfig(
            output_dir=folder,
            max_length=512,
            loss_type=["sigmoid_norm"],
            beta=5.0,
            precompute_ref_log_probs=True,
            per_device_train_batch_size=BATCH,
            max_steps=STEPS + 1,
            learning_rate=1e-6,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        DPOTrainer._prepare_dataset = lambda self, dataset, *_: dataset  # the ids are there already
        trainer = DPOTrainer(
            model=transformers.MistralForCausalLM(config),
            args=settings,
            train_dataset=Dataset.from_dict(rows),
            processing_class=transformers.AutoTokenizer.from_pretrained(folder),
            callbacks=[Clock()],
        )
        trainer.train()
    seconds = [after - before for before, after in pairwise(times)]
    return [BATCH / duration for duration in seconds[WARM:]]


def speed(rounds: int) -> None:
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
        print(f"{name:5} {statistics.median(found):6.2f} pairs/CPU-s  ({min(found):.2f} to {max(found):.2f})")
    print(f"ratio {statistics.median(ratios):6.2f}  ({min(ratios):.2f} to {max(ratios):.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--real", type=Path, help="folder of dpo_en_demo.json and dpo_zh_demo.json")
    parser.add_argument("--model", default="runs/pretrain-tiny/model", help="what --real starts from")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--rounds", type=int, default=3, help="of --speed")
    parser.add_argument("--one", choices=["ours", "trl"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps({"ours": ours, "trl": theirs}[options.one]()))
    elif options.speed:
        speed(options.rounds)
    elif options.real:
        real(options.real, options.model, options.seeds)
    else:
        found = []
        for seed in options.seeds:
            with tempfile.TemporaryDirectory() as folder:
                found.append(sampled(seed, Path(folder)) | tags(seed, Path(folder)))
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
        table(found, options.seeds)


if __name__ == "__main__":
    main()
