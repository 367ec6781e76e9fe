"""Vocabulary extension, as MOSS extended GPT-2's: what it buys on the new language and costs on the old.

    python benchmarks/extension.py ENGLISH.jsonl CHINESE.jsonl [--steps N]

A 4,096-id tokenizer and a tiny model are made from English, the vocabulary is extended by 2,000 merges on
Chinese, the model gets rows for them and trains on Chinese. One page in ten is held out. Prints JSON:
held-out bytes a token before and after the extension, English ids changed, English loss at step 0 before and
after, and bits per byte of both languages before and after training. Writes runs/bench/extension.json.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(*words: str) -> None:
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stdout[-1500:]}{done.stderr[-1500:]}")


def split(source: str, folder: Path, name: str) -> tuple[str, str, list[str]]:
    """Every tenth line is held out; returns both paths and the held-out texts."""
    lines = Path(source).read_text(encoding="utf-8").splitlines(keepends=True)
    held = lines[::10]
    paths = folder / f"{name}-train.jsonl", folder / f"{name}-val.jsonl"
    paths[0].write_text("".join(line for i, line in enumerate(lines) if i % 10), encoding="utf-8")
    paths[1].write_text("".join(held), encoding="utf-8")
    return str(paths[0]), str(paths[1]), [json.loads(line)["text"] for line in held]


def main() -> None:
    from data.tokenizer import load_tokenizer

    steps = sys.argv[sys.argv.index("--steps") + 1] if "--steps" in sys.argv else "150"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["NANOMOXIN_CACHE"] = str(folder / "cache")
        english, english_val, english_texts = split(sys.argv[1], folder, "english")
        chinese, chinese_val, chinese_texts = split(sys.argv[2], folder, "chinese")
        small, wide = str(folder / "small"), str(folder / "wide")
        common = ("--steps", steps, "--save_every", "0", "--eval_every", "0", "--device", "cpu")
        run("data/tokenizer.py", "train", "--data", english, "--vocab_size", "4096", "--out", small)
        words = ("--data", english, "--val_data", english_val, "--tokenizer", small, *common)
        run("pretrain.py", *words, "--out", str(folder / "en"))
        extend = ("--tokenizer", small, "--data", chinese, "--n_merges", "2000", "--out", wide)
        run("data/tokenizer.py", "extend", *extend)
        words = ("--init_from", str(folder / "en/model"), "--tokenizer", wide, "--data", chinese, *common)
        run("pretrain.py", *words, "--val_data", english_val, chinese_val, "--out", str(folder / "zh"))
        first, second = (json.loads((folder / n / "summary.json").read_text()) for n in ("en", "zh"))
        old, new = load_tokenizer(small), load_tokenizer(wide)

        def bytes_a_token(tokenizer, texts: list[str]) -> float:
            return sum(len(t.encode()) for t in texts) / sum(len(tokenizer.encode(t)) for t in texts)

        unchanged = sum(old.encode(text) == new.encode(text) for text in english_texts)
        before = bytes_a_token(old, chinese_texts), bytes_a_token(new, chinese_texts)
        result = {
            "chinese_bytes_a_token": {
                "before": before[0],
                "after": before[1],
                "ratio": before[1] / before[0],
            },
            "english_documents_with_the_same_ids": f"{unchanged} of {len(english_texts)}",
            "english_bits_a_byte_at_step_0": {
                "before": first["after"]["bpb/english-val"],
                "after": second["before"]["bpb/english-val"],
            },
            "bits_a_byte_before_training_on_chinese": second["before"],
            "bits_a_byte_after_training_on_chinese": second["after"],
        }
        (ROOT / "runs/bench").mkdir(parents=True, exist_ok=True)
        (ROOT / "runs/bench/extension.json").write_text(json.dumps(result, indent=1))
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    main()
