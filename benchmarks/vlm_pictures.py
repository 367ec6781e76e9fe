"""What vlm.py learns from real pictures, and the way from words to a drawing and back.

    python benchmarks/vlm_pictures.py scenes RUNS [--seeds 0 1 2]         drawn scenes, by kind of question
    python benchmarks/vlm_pictures.py nlvr FOLDER [options of vlm.py]     true or false statements
    python benchmarks/vlm_pictures.py emoji FOLDER [options of vlm.py]    names in English and Chinese
    python benchmarks/vlm_pictures.py round_trip MODEL [--count 100]      description, drawing, description

RUNS is a folder for the runs of vlm.py, one a seed; those that are there are not made again. FOLDER is one of
`nlvr/` (statements.jsonl, images/: Suhr et al. 2017) and `emoji/` (captions.json, pictures). Its data is
written down as LLaVA rows, the last ones held out (statements and pictures that training never saw), and
given to vlm.py, which prints the share of right answers with the right picture, with another, and with none.
Names of emoji are then looked for among those of 100 held-out pictures.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from core import tools
from core.scenes import SceneError, describe, parse, random_scene
from data.scene_rows import HELD_OUT, KINDS, pairs
from data.seeing import Seer

ROOT = Path(__file__).resolve().parent.parent


def row(image: str, question: str, answer: str) -> dict:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"image": image, "conversations": turns}


def scenes(folder: Path, seeds: list[int], options: list[str]) -> None:
    """vlm.py with its own data, towers included, for several seeds: means, and in brackets least and most."""
    summaries = []
    for seed in seeds:
        run = folder / f"vlm-tiny-seed{seed}"
        if not (run / "summary.json").is_file():
            command = [sys.executable, str(ROOT / "vlm.py"), "--seed", str(seed), "--out", str(run), *options]
            subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        summary = json.loads((run / "summary.json").read_text())
        summaries.append(summary["after"] | summary["blind"])
        print(f"seed {seed}: {summary['cpu_seconds']:.0f} processor seconds")
    for title, prefix in (("up to three", ""), ("up to two", "up_to_two_"), ("new pairs", "new_pairs_")):
        columns = ("accuracy", "shuffled", "no_picture", "blind")
        print(title.ljust(12) + "".join(column.rjust(18) for column in columns))
        for kind in ("", *(f"/{kind}" for kind in KINDS[:-1])):
            cells = [[summary[f"{prefix}{column}{kind}"] for summary in summaries] for column in columns]
            shown = [f"{sum(c) / len(c):.2f} [{min(c):.2f} {max(c):.2f}]" for c in cells]
            print((kind[1:] or "all").ljust(12) + "".join(cell.rjust(18) for cell in shown))


def nlvr_rows(folder: Path, rng: random.Random) -> tuple[list[dict], list[dict]]:
    """(training, held-out) rows; a statement and all its pictures are on one side."""
    records = [json.loads(line) for line in (folder / "statements.jsonl").read_text().splitlines()]
    sentences = sorted({record["sentence"] for record in records})
    rng.shuffle(sentences)
    held = set(sentences[: len(sentences) // 5])
    sides: tuple[list[dict], list[dict]] = ([], [])
    for record in records:
        sides[record["sentence"] in held].append(
            row(f"images/{record['image']}", record["sentence"], record["label"])
        )
    return sides


def emoji_rows(folder: Path, rng: random.Random) -> tuple[list[dict], list[dict]]:
    """(training, held-out) rows: a picture's name, once in each language."""
    records = json.loads((folder / "captions.json").read_text())
    records = [record for record in records if (folder / record["file"]).is_file()]
    rng.shuffle(records)
    asked = {"en": "What is it?", "zh": "这是什么？"}
    rows = [row(r["file"], question, r[language]) for r in records for language, question in asked.items()]
    split = 2 * (len(records) * 4 // 5)
    return rows[:split], rows[split:]


@torch.no_grad()
def retrieve(folder: Path, pictures: Path, rows: list[dict]) -> None:
    """How high each picture's own name ranks among the names of all, by log p(name | picture) less its mean
    over the pictures (a name may be likely whatever is seen). Recall at 1 and 10, and what chance gives."""
    seer, count = Seer(folder), len(rows)
    features = seer.look([pictures / row["image"] for row in rows])
    question = rows[0]["conversations"][0]["value"].removeprefix("<image>\n")
    prompt = seer.prompt(question)
    scores = torch.empty(count, count)  # [name, picture]
    for number, row in enumerate(rows):
        name = [*seer.tokenizer.encode(row["conversations"][1]["value"]), seer.tokenizer.eos_id]
        tokens = torch.tensor([prompt + name]).expand(count, -1)
        targets = torch.tensor([[-100] * (len(prompt) - 1) + name + [-100]]).expand(count, -1)
        logp, _ = seer.model.logprobs(tokens, targets, features=features)
        scores[number] = logp.sum(1)
    scores -= scores.mean(1, keepdim=True)
    rank = (scores > scores.diagonal()).sum(0)  # names that fit picture j better than its own
    found = ", ".join(f"at {k} {(rank < k).float().mean():.2f} (chance {k / count:.2f})" for k in (1, 10))
    print(f"{question} {count} held-out pictures, own name found {found}")


def learn(kind: str, folder: Path, options: list[str]) -> None:
    """Write the rows and run vlm.py on them."""
    rng = random.Random(0)
    training, held_out = {"nlvr": nlvr_rows, "emoji": emoji_rows}[kind](folder, rng)
    answers = [rows["conversations"][1]["value"] for rows in held_out]
    majority = max(answers.count(answer) for answer in set(answers)) / len(answers)
    print(
        f"{kind}: {len(training)} rows, {len(held_out)} held out; always the commonest answer: {majority:.3f}"
    )
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "rows.jsonl"
        rng.shuffle(training)
        path.write_text("\n".join(json.dumps(rows, ensure_ascii=False) for rows in training + held_out))
        command = [
            sys.executable,
            str(ROOT / "vlm.py"),
            "--data",
            str(path),
            "--images",
            str(folder.resolve()),
        ]
        command += ["--eval_rows", str(len(held_out)), "--out", f"{temporary}/run", *options]
        subprocess.run(command, check=True, cwd=ROOT)
        for language in (0, 1) if kind == "emoji" else ():
            retrieve(Path(temporary) / "run/model", folder, held_out[language:200:2])


def round_trip(folder: Path, count: int, most: int) -> None:
    """Describe random scenes, have the text-to-image tool draw them, and the model read the drawings back."""
    seer, rng = Seer(folder), random.Random(123)
    scenes = []
    while len(scenes) < count:
        scene = random_scene(rng, rng.randint(1, most))
        if not pairs(*scene.items) & HELD_OUT:  # colours on shapes that training has shown
            scenes.append(scene)
    languages = [("en", "zh")[number % 2] for number in range(count)]
    drawn = [
        tools.call("Text2Image", describe(scene, language), 2.0)[1]
        for scene, language in zip(scenes, languages, strict=True)
    ]
    questions = ["Describe the picture." if language == "en" else "描述这张图片。" for language in languages]
    answers = seer.answer(questions, seer.look(drawn).split(1), 64)
    whole = found = things = 0
    for scene, answer in zip(scenes, answers, strict=True):
        try:
            read = set(parse(answer).items)
        except SceneError:
            read = set()
        whole += read == set(scene.items)
        found += len(read & set(scene.items))
        things += len(scene.items)
    shares = f"{whole / count:.2f} of the scenes whole, {found / things:.2f} of the {things} things in them"
    print(f"{count} descriptions drawn and read back: {shares}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=["scenes", "nlvr", "emoji", "round_trip"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--most", type=int, default=3, help="things in a scene")
    arguments, options = parser.parse_known_args()
    torch.set_num_threads(1)
    if arguments.kind == "scenes":
        scenes(arguments.folder, arguments.seeds, options)
    elif arguments.kind == "round_trip":
        round_trip(arguments.folder, arguments.count, arguments.most)
    else:
        learn(arguments.kind, arguments.folder, options)


if __name__ == "__main__":
    main()
