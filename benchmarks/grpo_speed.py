"""Reinforcement steps a CPU second against TRL's GRPOTrainer, and where our time goes.

    python benchmarks/grpo_speed.py [--rounds N]      needs trl 1.16.0 and datasets, in a place of their own

The same model (0.36 M parameters, taught to sort 8 digits for a few seconds), tokenizer, prompts, reward, 32
prompts x 8 completions of at most 16 tokens, temperature 1, one update a rollout, no reference model,
float32, AdamW, clipping at 1, one thread. Each round is a fresh process of either, in turn; medians over
steps, then over rounds. TRL generates with transformers' `generate`.
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
PROMPTS, SAMPLES, LIMIT, STEPS, WARM = 32, 8, 16, 12, 4


def settings(folder: str):
    import grpo

    values = dict(prompts=PROMPTS, num_samples=SAMPLES, max_new_tokens=LIMIT, batch_size=PROMPTS * SAMPLES)
    values |= dict(temperature=1.0, lr=1e-5, schedule="constant", warmup_steps=0, device="cpu", out=folder)
    return grpo.Config(preset="tiny", **{**grpo.PRESETS["tiny"], **values})


def teach(folder: Path) -> None:
    """The model that both start from, in FOLDER/start."""
    from core.run import Run
    from data import demonstrations
    from data.problems import Problems

    config, problems = settings(str(folder / "run")), Problems(("sorting",), 0)
    talk = lambda number: problems.train(number).solved()  # noqa: E731
    demonstrations.teach(folder / "start", talk, config, Run(config, "benchmark"))


def ours(folder: str) -> dict[str, float]:
    """CPU seconds a step; generated tokens a CPU second of sampling; share of time in each phase."""
    import torch

    import grpo
    from core.optimizer import make_adamw
    from core.rollouts import Clock
    from core.run import Run, SpikeGuard
    from data.problems import Problems
    from data.tokenizer import load_tokenizer

    torch.set_num_threads(1)
    config = settings(folder + "/ours")
    run, stage = Run(config, "benchmark"), grpo.plan(config)[0]
    tokenizer, model, problems = (
        load_tokenizer(folder + "/start"),
        grpo.load(Path(folder, "start"), run),
        Problems(("sorting",), 0),
    )
    optimizer, guard = make_adamw(model, config.lr, 0.0, betas=(0.9, 0.999)), SpikeGuard(window=10**9)
    seconds, phases, made, cursor = [], Clock(), 0, 0
    for step in range(STEPS):
        begun = time.process_time()
        clock = phases if step >= WARM else Clock()
        episodes, cursor = grpo.collect(model, problems, tokenizer, config, run, step, stage, cursor, clock)
        with clock("update"):
            grpo.update(model, optimizer, guard, episodes, config, run, step, stage.limit)
        seconds.append(time.process_time() - begun)
        made += sum(len(episode.tokens) for episode in episodes) if step >= WARM else 0
    whole = sum(phases.seconds.values())
    shares = {f"share of {phase}": value / whole for phase, value in phases.seconds.items()}
    sampling = phases.cpu_seconds * shares["share of rollout"]
    speed = {"generated tokens a CPU second of sampling": made / sampling}
    return {"seconds": statistics.median(seconds[WARM:]), "tokens": made / (STEPS - WARM), **speed, **shares}


def theirs(folder: str) -> dict[str, float]:
    import datasets.fingerprint
    import torch
    import transformers
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from core.rewards import REWARDS
    from data.chat import render
    from data.problems import Problems
    from data.tokenizer import load_tokenizer

    torch.set_num_threads(1)
    # The names of cache files are hashes of pickled functions, which dill cannot make with every pyarrow.
    datasets.fingerprint.Hasher.hash = staticmethod(lambda value: uuid.uuid4().hex)
    tokenizer, problems = load_tokenizer(folder + "/start"), Problems(("sorting",), 0)
    chosen = [problems.train(number) for number in range(PROMPTS * (STEPS + 1))]
    texts = [
        tokenizer.decode(render(p.conversation(), tokenizer, add_generation_prompt=True).ids) for p in chosen
    ]
    times: list[float] = []
    lengths: list[int] = []

    def reward(
        completions: list[str], answer: list[str], completion_ids: list[list[int]], **_
    ) -> list[float]:
        lengths.append(sum(map(len, completion_ids)))
        return [REWARDS["sorting"](text, right) for text, right in zip(completions, answer, strict=True)]

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, *arguments, **keywords) -> None:
            times.append(time.process_time())

    arguments = GRPOConfig(
        output_dir=folder + "/trl",
        per_device_train_batch_size=PROMPTS * SAMPLES,
        num_generations=SAMPLES,
        max_completion_length=LIMIT,
        max_steps=STEPS + 1,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        beta=0.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder + "/start", dtype=torch.float32),
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": texts, "answer": [problem.answer for problem in chosen]}),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder + "/start"),
        callbacks=[Watch()],
    )
    trainer.train()
    seconds = [after - before for before, after in pairwise(times)]
    return {"seconds": statistics.median(seconds[WARM:]), "tokens": statistics.mean(lengths[WARM:])}


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps({"ours": ours, "trl": theirs}[sys.argv[2]](sys.argv[3])))
        return
    rounds = int(sys.argv[sys.argv.index("--rounds") + 1]) if "--rounds" in sys.argv else 3
    found: dict[str, list[dict[str, float]]] = {"ours": [], "trl": []}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        teaching = [sys.executable, __file__, "--teach", folder]
        subprocess.run(teaching, check=True, env=environment, stdout=subprocess.DEVNULL)
        for _ in range(rounds):
            for name, results in found.items():
                command = [sys.executable, __file__, "--one", name, folder]
                done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
                if done.returncode:
                    sys.exit(f"{name} failed: {done.stderr.strip().splitlines()[-1]}")
                results.append(json.loads(done.stdout.splitlines()[-1]))
    for name, results in found.items():
        seconds = [result["seconds"] for result in results]
        spread = f"({1 / max(seconds):.2f} to {1 / min(seconds):.2f})"
        tokens = statistics.mean(result["tokens"] for result in results)
        speed = f"{1 / statistics.median(seconds):5.2f} steps/CPU-s {spread}"
        print(f"{name:5} {speed}, {tokens:,.0f} tokens a step")
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(found["ours"], found["trl"], strict=True)]
    print(f"ratio {statistics.median(ratios):5.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    for name in list(found["ours"][0])[2:]:
        print(f"ours, {name}: {statistics.median(result[name] for result in found['ours']):,.2f}")


if __name__ == "__main__":
    teach(Path(sys.argv[2])) if sys.argv[1:2] == ["--teach"] else main()
