"""What vlm.py learns from real pictures, and the way from words to a drawing and back.

    python benchmarks/vlm_pictures.py nlvr FOLDER [vlm.py's options]      true or false statements about
    pictures python benchmarks/vlm_pictures.py emoji FOLDER [vlm.py's options]     names of emoji in English
    and Chinese python benchmarks/vlm_pictures.py round_trip MODEL [--count 100]      description -> drawing
    -> description

FOLDER is one of `nlvr/` (statements.jsonl, images/: Suhr et al. 2017) and `emoji/` (captions.json, pictures).
The data is written down as LLaVA rows, the last ones held out (statements and pictures that training never
saw), and given to vlm.py, which prints the share of right answers with the right picture, with another, and
with none.
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
from core.generate import generate
from core.scenes import SceneError, describe, parse, random_scene
from core.vlm_checkpoint import load_vlm, load_vlm_tower
from data.picture_batches import render_row
from data.pictures import Row, load_picture, prepare
from data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent


def row(image: str, question: str, answer: str) -> dict:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"image": image, "conversations": turns}


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
    """(training, held-out) rows: which of four names, in either language, belongs to the picture."""
    records = [
        r for r in json.loads((folder / "captions.json").read_text()) if (folder / r["file"]).is_file()
    ]
    rng.shuffle(records)
    split = len(records) * 4 // 5
    sides = []
    for part in (records[:split], records[split:]):
        rows = []
        for record in part:
            for language, ask in (("en", "Which is it?"), ("zh", "这是哪个？")):
                names = [r[language] for r in rng.sample(part, 4) if r is not record][:3] + [record[language]]
                rng.shuffle(names)
                choices = "\n".join(f"{letter}. {name}" for letter, name in zip("ABCD", names, strict=False))
                rows.append(row(record["file"], f"{ask}\n{choices}", "ABCD"[names.index(record[language])]))
        sides.append(rows)
    return sides[0], sides[1]


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


def round_trip(folder: Path, count: int, most: int) -> None:
    """Describe random scenes, have the text-to-image tool draw them, and the model read the drawings back."""
    model, (tower, settings) = load_vlm(folder), load_vlm_tower(folder)
    tokenizer = load_tokenizer(folder)
    rng = random.Random(123)
    same = parts = total = 0
    scenes = [random_scene(rng, rng.randint(1, most)) for _ in range(count)]
    prompts, features = [], []
    for number, scene in enumerate(scenes):
        language = ("en", "zh")[number % 2]
        _, picture = tools.call("Text2Image", describe(scene, language), 2.0)
        means = tuple(config.mean for config in tower.configs)
        pixels = prepare(load_picture(picture), tower.image_size, settings["resize"], means)
        features.append(tower(pixels[None]))
        question = "Describe the picture." if language == "en" else "描述这张图片。"
        content = [{"type": "image"}, {"type": "text", "text": question}]
        asked = Row([{"role": "user", "content": content}, {"role": "assistant", "content": ""}], [picture])
        item = render_row(asked, tokenizer, settings["chat_format"], tower.tokens)
        prompts.append(item.ids[: int(item.mask.argmax())].tolist())
    stop = (tokenizer.eos_id,)
    made = generate(model, prompts, 96, temperature=0, stop_ids=stop, tokenizer=tokenizer, features=features)
    for scene, (completion,) in zip(scenes, made, strict=True):
        try:
            read = set(parse(tokenizer.decode(completion.tokens[:-1])).items)
        except SceneError:
            read = set()
        same += read == set(scene.items)
        parts += len(read & set(scene.items))
        total += len(scene.items)
    shares = f"{same / count:.2f} of the scenes whole, {parts / total:.2f} of the things in them"
    print(f"{count} descriptions drawn and read back: {shares}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=["nlvr", "emoji", "round_trip"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--most", type=int, default=3, help="things in a scene")
    arguments, options = parser.parse_known_args()
    torch.set_num_threads(1)
    if arguments.kind == "round_trip":
        round_trip(arguments.folder, arguments.count, arguments.most)
    else:
        learn(arguments.kind, arguments.folder, options)


if __name__ == "__main__":
    main()
