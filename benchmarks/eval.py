"""Evaluation against lm-eval: the same numbers, question by question, and how much processor time they took.

    python benchmarks/eval.py [--limit N] [--batch N]

Needs lm_eval 0.4.13 and datasets, in an environment of their own.

A real small model (stories260k), real questions: CommonsenseQA by letter and, as ARC asks, by text, without
and with as many examples as fit into its context; GSM8K with 5 examples and both ways of finding the answer;
bits per byte of documents. Each side is a process of its own on one thread and in float32; its time is that
of making prompts, asking and scoring, without imports, loading and reading files. lm-eval runs its Hugging
Face backend, --batch 32.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DATA = Path(os.environ.get("NANOMOXIN_DATA", ROOT.parent / "shared" / "data"))
# name here -> (task, shots, lm-eval's own configuration file)
RUNS = {
    "letters, 0 shots": ("commonsenseqa", 0, "commonsense_qa/default.yaml"),
    "letters, 2 shots": ("commonsenseqa", 2, "commonsense_qa/default.yaml"),
    "texts, 0 shots": ("arc_easy", 0, "arc/arc_easy.yaml"),
    "texts, 5 shots": ("arc_easy", 5, "arc/arc_easy.yaml"),
    "GSM8K, 5 shots": ("gsm8k", 5, "gsm8k/gsm8k.yaml"),
    "bits per byte": ("bpb", 0, ""),
}
BITS = {
    "task": "bpb",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "bits_per_byte"}],
}


def prepare(folder: Path, limit: int) -> None:
    """The model in a form that both load alike, and the files, with the hub's fields."""
    from core.checkpoint import load_pretrained, save_pretrained
    from data.tokenizer import load_tokenizer

    source = DATA / "stories260k"
    save_pretrained(load_pretrained(source), folder / "model", load_tokenizer(source))
    questions = []
    for line in (DATA / "choice/commonsenseqa.dev.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        choices = {key: [one[key] for one in row["question"]["choices"]] for key in ("label", "text")}
        stem, right = row["question"]["stem"], row["answerKey"]
        questions.append({"question": stem, "choices": choices, "answerKey": right})
    texts = (DATA / "text/libreoffice_help.en.jsonl").read_text("utf-8").splitlines()
    lines = (DATA / "math/gsm8k.train.jsonl").read_text("utf-8").splitlines()
    problems = [{key: json.loads(line)[key] for key in ("question", "answer")} for line in lines]
    files = {
        "commonsenseqa": (questions[:limit], questions[limit:]),
        "arc_easy": (questions[:limit], questions[limit:]),
        "gsm8k": (problems[: limit // 4], problems[limit // 4 :]),
        "bpb": ([{"text": json.loads(line)["text"]} for line in texts[: limit // 4]], []),
    }
    for name, splits in files.items():
        for split, rows in zip(("test", "train"), splits, strict=True):
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            (folder / f"{name}.{split}.jsonl").write_text("".join(lines), "utf-8")


def ours(folder: Path) -> dict:
    import torch

    from data.asking import ASK, Asking, open_model
    from data.task_rows import items_of, with_examples
    from data.tasks import TASKS

    torch.set_num_threads(1)
    found, config = {}, Asking()
    pupil = open_model(folder / "model", config, torch.float32, torch.device("cpu"))
    for run, (name, shots, _) in RUNS.items():
        task, files = TASKS[name], [str(folder / f"{name}.{split}.jsonl") for split in ("test", "train")]
        items, pool = items_of(task, name, files[0], ""), items_of(task, name, files[1], "") if shots else []
        started = time.process_time()
        heads = with_examples(items, pool, shots, first=False, same=False)
        answers = ASK[task.how](pupil, items, heads, task, config)
        grades = [task.grade(given, item) for (given, _), item in zip(answers, items, strict=True)]
        seconds = time.process_time() - started
        prompts = [head + item.prompt for head, item in zip(heads, items, strict=True)]
        found[run] = {
            "seconds": seconds,
            "prompts": prompts,
            "grades": grades,
            "shown": [s for _, s in answers],
        }
    return found


def theirs(folder: Path) -> dict:
    import lm_eval
    import torch
    import yaml
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import get_task_dict

    torch.set_num_threads(1)
    batch = int(sys.argv[sys.argv.index("--batch") + 1]) if "--batch" in sys.argv else 32
    model = HFLM(pretrained=str(folder / "model"), device="cpu", dtype="float32", batch_size=batch)
    found = {}
    for run, (name, shots, file) in RUNS.items():
        path = Path(lm_eval.__file__).parent / "tasks" / file
        config = yaml.safe_load(path.read_text()) if file else dict(BITS)
        for key in ("dataset_name", "tag", "validation_split", "training_split"):
            config.pop(key, None)
        files = {split: str(folder / f"{name}.{split}.jsonl") for split in ("test", "train")}
        if not file:
            files.pop("train")
        config |= {"dataset_path": "json", "dataset_kwargs": {"data_files": files}, "num_fewshot": shots}
        config |= {"test_split": "test"} | ({"fewshot_split": "train"} if shots else {})
        tasks = get_task_dict([config])
        for task in tasks.values():
            task.set_fewshot_seed(1234)
        started = time.process_time()
        result = lm_eval.evaluate(model, tasks, bootstrap_iters=0, log_samples=True)
        seconds = time.process_time() - started
        (samples,) = result["samples"].values()
        samples = sorted(samples, key=lambda sample: sample["doc_id"])
        (scores,) = result["results"].values()
        found[run] = {"seconds": seconds, "scores": scores, "samples": samples}
    return found


def agreement(run: str, mine: dict, his: dict) -> str:
    """What is equal, in words and figures."""
    samples = his["samples"]
    name = RUNS[run][0]
    if name == "bpb":
        bits = sum(g["bits_per_byte"] * g["bits_per_byte:weight"] for g in mine["grades"])
        mean = bits / sum(g["bits_per_byte:weight"] for g in mine["grades"])
        return f"{mean:.6f} and {his['scores']['bits_per_byte,none']:.6f} bits per byte"
    if name == "gsm8k":
        by_filter = {
            key: [sample for sample in samples if sample["filter"] == key]
            for key in ("strict-match", "flexible-extract")
        }
        one = by_filter["strict-match"]
        prompts = sum(a == b["arguments"][0][0] for a, b in zip(mine["prompts"], one, strict=True))
        texts = sum(a == b["resps"][0][0] for a, b in zip(mine["shown"], one, strict=True))
        from data.task_rows import Item
        from data.tasks import TASKS

        same, asked = 0, 0
        for key, grade in (("strict-match", "strict_match"), ("flexible-extract", "flexible_extract")):
            for sample in by_filter[key]:
                item = Item("", sample["doc"]["answer"])
                verdict = TASKS["gsm8k"].grade(sample["resps"][0][0], item)[grade]
                same, asked = same + (verdict == sample["exact_match"]), asked + 1
        return (
            f"prompts {prompts}/{len(one)}, texts {texts}/{len(one)}, verdicts of both filters {same}/{asked}"
        )
    prompts = sum(a == b["arguments"][0][0] for a, b in zip(mine["prompts"], samples, strict=True))
    parts = [f"prompts {prompts}/{len(samples)}"]
    for metric in ("acc", "acc_norm"):
        if metric in samples[0]:
            same = sum(a[metric] == b[metric] for a, b in zip(mine["grades"], samples, strict=True))
            parts.append(f"{metric} {same}/{len(samples)}")
    off = max(
        abs(a - float(b[0][0]))
        for own, sample in zip(mine["shown"], samples, strict=True)
        for a, b in zip(own, sample["resps"], strict=True)
    )
    return ", ".join(parts) + f", log-likelihoods within {off:.1e}"


def main() -> None:
    if "--side" in sys.argv:
        side, folder = sys.argv[sys.argv.index("--side") + 1 :][:2]
        result = {"ours": ours, "lm-eval": theirs}[side](Path(folder))
        (Path(folder) / f"{side}.json").write_text(json.dumps(result, default=str))
        return
    limit = int(sys.argv[sys.argv.index("--limit") + 1]) if "--limit" in sys.argv else 200
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, limit)
        environment = {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(folder / "cache"),
        }
        for side in ("ours", "lm-eval"):
            command = [sys.executable, __file__, "--side", side, name, *sys.argv[1:]]
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
            if done.returncode:
                sys.exit(f"{side} failed: {done.stderr.strip()[-2000:]}")
        mine, his = (json.loads((folder / f"{side}.json").read_text()) for side in ("ours", "lm-eval"))
    print(f"{'':18}{'ours':>8}{'lm-eval':>9}{'ratio':>7}  CPU seconds; what is equal")
    for run in RUNS:
        a, b = mine[run]["seconds"], his[run]["seconds"]
        print(f"{run:18}{a:8.2f}{b:9.2f}{b / a:7.1f}  {agreement(run, mine[run], his[run])}", flush=True)
    a, b = (sum(one["seconds"] for one in side.values()) for side in (mine, his))
    print(f"{'all':18}{a:8.2f}{b:9.2f}{b / a:7.1f}")


if __name__ == "__main__":
    main()
