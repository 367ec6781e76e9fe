"""Stage 5: a language model that sees.

    loss = - sum_{t in M} log p(x_t | pictures, x_<t) / N,      M = tokens of answers, their end tokens
    included

N is the number of tokens in M of the whole step, over all micro-batches and processes. Two frozen vision
transformers look at a picture; the features of their second-to-last blocks, joined by patch, go through a
projector of three linear layers and stand in the sequence where the picture does (Prismatic, arXiv
2402.07865; Moxin-VLM, arXiv 2412.06845, section 6). Moxin trains projector and language model together in one
stage; LLaVA first aligns the projector alone (--stage align).

    python vlm.py                                                tiny model, drawn scenes, small encoders, all
    here python vlm.py --check_data --data llava_v1_5_mix665k.json --images pictures/
    torchrun --nproc_per_node=8 vlm.py --preset moxin-7b --data llava_v1_5_mix665k.json --images pictures/
"""

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from core.checkpoint import load_weights, read_config, resolve_folder, save_pretrained
from core.config import RunConfig, UserError, parse, require, run_main
from core.estimate import print_estimate
from core.optimizer import make_adamw, make_muon, set_learning_rate, take_step
from core.parallel import clip_grad_norm, materialize, parallelize
from core.resume import Checkpointer
from core.run import Run, Speedometer, SpikeGuard, due
from core.towers import LEARNT, train_towers
from core.vision_checkpoint import load_vision_tower
from core.vlm_checkpoint import load_projector, save_vlm
from data.packing import Item
from data.picture_batches import Example, PictureBatches, VisionFormat, collate, texts_in
from data.pictures import JoinedRows, Resize, Rows, check_data, open_rows
from data.scene_rows import KINDS, SceneRows, words_apart
from data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from model import PATCH, VLM, Transformer, VisionTower, flops_per_token, num_parameters
from model import PRESETS as SHAPES
from model import Config as Shape


@dataclass(kw_only=True)
class Config(RunConfig):
    stage: Literal["finetune", "align", "towers"] = "finetune"  # projector alone; small encoders alone
    data: tuple[str, ...] = ("scenes",)  # LLaVA .json, .jsonl, tar of pairs; scenes = drawn here
    images: str = ""  # folder that the files' picture names are relative to; empty = beside the file
    vision: tuple[str, ...] = ()  # encoders' files or folders, DINOv2's first; empty = small ones, made here
    image_size: int = 96  # side of the picture that the encoders see, pixels
    resize: Resize = "naive"  # naive squeezes (Moxin), crop keeps the middle, letterbox pads
    chat_format: VisionFormat = "tulu"  # pure = Prismatic's "In: ... Out: ...", as Moxin
    cache_features: bool = True  # keep what the encoders said of each picture in the run folder
    workers: int = 2  # threads that read pictures ahead
    max_bad: float = 0.01  # share of broken rows beyond which the run stops
    check_data: bool = False  # open every row and picture, report, stop
    optimizer: Literal["adamw", "muon"] = "adamw"
    beta2: float = 0.999  # AdamW's second momentum; PyTorch's default, as in Prismatic
    scenes: int = 6000  # drawn pictures to train on
    askings: int = 12  # rows of questions about each, none alike
    objects: int = 3  # most things in one
    turns: int = 7  # questions about each
    eval_rows: int = 900  # held-out rows
    tower_steps: int = 600  # steps of training the small encoders
    tower_batch: int = 32  # scenes in each
    blind_steps: int = 200  # steps on words alone, where the language model is made here
    layers: int = 4  # its shape
    dim: int = 64
    vocab_size: int = 600

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.objects in range(1, 10), "--objects must be between 1 and 9")
        require(0 <= self.max_bad <= 1, "--max_bad must be between 0 and 1")
        require(self.dim % 32 == 0, f"--dim {self.dim} must be a multiple of 32, the size of a head")


# Prismatic's settings, which Moxin-VLM's configuration repeats: one stage, frozen encoders, 2 epochs of
# LLaVA-1.5's mixture (665,298 rows, 5,198 steps each), batch 128, 2e-5 with 3 % warm-up and cosine to 0,
# weight decay 0.1 but not on biases and norms, clip 1, squeezed to 224 pixels, 2,048 tokens of text beside
# 256 of picture. The paper says that the language model is Moxin-7B-Base, the code says Instruct; the prompt
# is the plain one. We take Base.
MOXIN: dict[str, Any] = dict(
    init_from="moxin-org/Moxin-7B-LLM",
    vision=("timm/vit_large_patch14_reg4_dinov2.lvd142m", "timm/vit_so400m_patch14_siglip_224.webli"),
    image_size=224,
    data=("llava_v1_5_mix665k.json",),
    chat_format="pure",
    cache_features=False,  # 1.1 MB a picture
    workers=8,
    seq_len=2048 + 256,
    steps=10_396,
    batch_size=128,
    micro_batch_size=4,
    lr=2e-5,
    warmup_steps=312,
    weight_decay=0.1,
    checkpointing="full",
    compile=True,
    eval_every=1000,
    save_every=1000,
)
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        chat_format="pure",
        optimizer="muon",
        steps=4500,
        seq_len=320,
        batch_size=16,
        micro_batch_size=16,
        lr=2.5e-3,
        min_lr=2.5e-5,
        schedule="wsd",
        warmup_steps=50,
        weight_decay=0.05,
        beta2=0.95,
        eval_every=1000,
        save_every=1000,
    ),
    "small": dict(
        init_from="runs/sft-small/model",
        scenes=100_000,
        steps=6000,
        seq_len=320,
        batch_size=128,
        micro_batch_size=128,
        lr=2e-4,
        warmup_steps=200,
        tower_steps=6000,
        tower_batch=128,
        eval_every=1000,
        save_every=1000,
    ),
    "moxin-7b": MOXIN,
    # LLaVA-1.5's first stage: projector alone, 558,128 captions once, batch 256, 1e-3, no weight decay.
    "moxin-7b-align": MOXIN
    | dict(
        stage="align",
        data=("blip_laion_cc_sbu_558k.json",),
        chat_format="caption",
        steps=2181,
        batch_size=256,
        lr=1e-3,
        warmup_steps=65,
        weight_decay=0.0,
    ),
}


Part = tuple[Rows, range]  # of a data set, the rows in use


def load_rows(config: Config) -> tuple[Part, dict[str, Part]]:
    """(training rows, held-out rows by name). Of files, the last --eval_rows rows are held out."""
    if config.data == ("scenes",):
        size, most, count, seed = config.image_size, config.objects, config.eval_rows, config.seed
        train = SceneRows(config.scenes, seed, most, size, config.turns, askings=config.askings)
        asked = KINDS[:-1]  # a caption says many things: it has no one right answer
        held_out = {"": SceneRows(count, seed + 1, most, size, kinds=asked)}
        held_out["new_pairs_"] = SceneRows(count // 2, seed + 2, most, size, kinds=asked, held_out=True)
        if most > 2:
            held_out["up_to_two_"] = SceneRows(count, seed + 3, 2, size, kinds=asked)
        return (train, range(len(train))), {name: (rows, range(len(rows))) for name, rows in held_out.items()}
    rows = JoinedRows([open_rows(path, config.images) for path in config.data], config.seed, config.max_bad)
    split = len(rows) - config.eval_rows
    require(split > 0, f"--eval_rows {config.eval_rows}: the data has only {len(rows)} rows")
    return (rows, range(split)), {"": (rows, range(split, len(rows)))}


def report_data(config: Config) -> None:
    """--check_data: every broken row in one line, then the counts. UserError if there are any."""
    broken = 0
    for path in config.data:
        counts = check_data(open_rows(path, config.images))
        broken += counts["broken rows"]
        print(f"{path}: " + ", ".join(f"{count:,} {name}" for name, count in counts.items()))
    if broken:
        raise UserError(f"{broken:,} broken rows, named above")


def make_towers(config: Config, run: Run) -> dict[str, float]:
    """The small encoders, trained by one process into the run folder; how often each is right on a patch."""
    right = {}
    if run.main:
        sizes = config.image_size, config.tower_steps, config.tower_batch
        right = train_towers(run.folder / "towers", *sizes, config.seed, run.device, run.say)
    run.barrier()
    return right


def load_words(config: Config, rows: Rows) -> Tokenizer:
    """The tokenizer of --init_from, or one trained on what is asked and answered, in the format's pieces."""
    if config.init_from:
        return load_tokenizer(resolve_folder(config.init_from))
    asked = "In: {}\nOut:" if config.chat_format == "pure" else "<|user|>\n{}\n<|assistant|>\n"
    texts = []
    for i in range(min(2000, len(rows))):
        for message in rows.fetch(i, lambda row: row.messages):
            text = " ".join(texts_in(message))
            texts += words_apart(asked.format(text) if message["role"] == "user" else text)
    return train_tokenizer(texts, config.vocab_size)


def made_shape(config: Config, vocab_size: int) -> Shape:
    """Of the language model that is made where there is none to start from."""
    return Shape(
        vocab_size=vocab_size,
        layers=config.layers,
        dim=config.dim,
        heads=config.dim // 32,
        kv_heads=config.dim // 32,
        head_dim=32,
        rope_theta=1e10,  # most of a head does not turn: a word finds a patch by what it shows, not where
        ffn_dim=config.dim * 3,
        max_seq_len=max(1024, config.seq_len),
        tied=True,
        init_std=config.dim**-0.5,
    )


def planned_shape(config: Config) -> Shape:
    """The language model's shape as far as it is known without fetching it."""
    if not config.init_from:
        return made_shape(config, config.vocab_size)
    if Path(config.init_from).is_dir():
        return read_config(config.init_from)
    return SHAPES["moxin-7b" if config.preset.startswith("moxin-7b") else "small"]


def learn_words(config: Config, run: Run, vocab_size: int, batches: PictureBatches) -> Transformer:
    """A language model of the same conversations without their pictures: what seeing starts from, and the
    blind control. Every process makes the same one."""
    model = Transformer(made_shape(config, vocab_size), config.seed).to(run.device)
    optimizer = make_optimizer(model, config)
    for step in range(config.blind_steps):
        batch, _ = collate([blind(batches.words(int(i))) for i in batches.order(step)], run.device)
        nats, count = model.loss(batch.tokens, batch.targets)
        (nats / count).backward()
        clip_grad_norm(model, config.grad_clip)
        set_learning_rate(
            optimizer, config.lr * min(1.0, (step + 1) / 50, 2 * (1 - step / config.blind_steps))
        )
        optimizer.step()
        optimizer.zero_grad()
    return model


def blind(item: Item) -> Example:
    """The words alone."""
    return Example(item.without((PATCH,)), None)


def make_optimizer(model: Transformer, config: Config) -> torch.optim.Optimizer:
    make = make_muon if config.optimizer == "muon" else make_adamw
    return make(model, config.lr, config.weight_decay, betas=(0.9, config.beta2))


def build_model(config: Config, run: Run, folder: Path, tower: VisionTower) -> VLM:
    """The folder's language model with a projector: the folder's too, if it has one, else a new one."""
    with torch.device("meta"):
        model = VLM(read_config(folder), tower.dim)
    if config.stage == "align":
        model.requires_grad_(False).projector.requires_grad_(True)
    model = materialize(parallelize(model, run), run)
    model.init_weights(config.seed)
    load_weights(model, folder)
    if (folder / "vision").is_dir():
        load_projector(model, folder)
    return model


@torch.no_grad()
def answers_right(model: Transformer, examples: list[Example], size: int, run: Run) -> np.ndarray:
    """Which examples are answered word for word by greedy generation, [n] bool.

    One forward shows it: every trained token must be the most probable after those before it.
    """
    right = np.zeros(len(examples))
    padded = -(-len(examples) // run.world_size) * run.world_size  # all processes make as many forwards
    mine = np.arange(run.rank, padded, run.world_size) % len(examples)
    for start in range(0, len(mine), size):
        part = mine[start : start + size]
        batch, features = collate([examples[i] for i in part], run.device)
        inputs = {} if features is None else {"features": features}
        best = model(batch.tokens, **inputs).argmax(-1)
        right[part] = ((best == batch.targets) | (batch.targets < 0)).all(1).float().cpu().numpy()
    return np.array(run.sum(*right)) > 0


CONTROLS = ("accuracy", "shuffled", "no_picture", "blind")


def controls(examples: list[Example]) -> dict[str, list[Example]]:
    """The same questions with their pictures, with other questions' pictures, and with none."""
    kinds = np.array([0 if e.features is None else len(e.features) for e in examples])
    partner = np.arange(len(examples))
    for count in set(kinds):  # a picture for a picture, two for two
        partner[kinds == count] = np.roll(np.flatnonzero(kinds == count), 1)
    shuffled = [Example(e.item, examples[i].features) for e, i in zip(examples, partner, strict=True)]
    return {"accuracy": examples, "shuffled": shuffled, "no_picture": [blind(e.item) for e in examples]}


def report(model: VLM, held_out: dict[str, PictureBatches], config: Config, run: Run) -> dict[str, float]:
    """Share of held-out questions answered rightly, in all and by kind, with both controls."""
    values: dict[str, float] = {}
    for name, batches in held_out.items():
        examples, kinds = batches.all(), batches.kinds()
        for control, asked in controls(examples).items():
            right = answers_right(model, asked, config.micro_batch_size, run)
            values[f"{name}{control}"] = right.mean()
            for kind in dict.fromkeys(kinds) if len(set(kinds)) > 1 else ():
                values[f"{name}{control}/{kind}"] = right[np.array(kinds) == kind].mean()
    return values


def totals(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if "/" not in name}


def table(values: dict[str, float], held_out: Iterable[str]) -> str:
    """One table a held-out set: controls across, kinds down."""
    kinds = dict.fromkeys(name.partition("/")[2] for name in values)
    lines = []
    for name in held_out:
        lines.append((name.replace("_", " ") or "all ").ljust(12) + "".join(c.rjust(12) for c in CONTROLS))
        for kind in kinds:
            cells = [
                values[f"{name}{control}/{kind}" if kind else f"{name}{control}"] for control in CONTROLS
            ]
            lines.append((kind or "all").ljust(12) + "".join(f"{cell:12.3f}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    config = parse(Config, PRESETS, about=__doc__)
    if config.check_data:
        return report_data(config)
    if config.dry_run:
        return print_estimate(config, planned_shape(config))
    (rows, training), held_out_rows = load_rows(config)

    run = Run(config, "vlm")
    if config.stage == "towers":
        return run.finish({"after": make_towers(config, run)}, ())
    share = run.rows(config.batch_size)
    tokenizer = load_words(config, rows)
    sources = [path if Path(path).exists() else resolve_folder(path) for path in config.vision]
    if sources:
        tower = load_vision_tower(*sources, image_size=config.image_size)
    else:
        make_towers(config, run)
        tower = load_vision_tower(*(run.folder / "towers" / name for name in LEARNT))
    tower.to(run.device, run.dtype)

    def batches_of(rows: Rows, within: range) -> PictureBatches:
        return PictureBatches(
            rows,
            tokenizer,
            tower,
            "caption" if config.stage == "align" else config.chat_format,
            config.resize,
            config.seq_len,
            config.batch_size,
            config.seed,
            run.folder / "features" if config.cache_features else None,
            config.workers,
            within,
        )

    batches = batches_of(rows, training)
    held_out = {name: batches_of(*part) for name, part in held_out_rows.items()}
    if config.init_from:
        folder = resolve_folder(config.init_from)
    else:
        folder = run.folder / "language"
        is_there = (folder / "config.json").is_file()
        run.barrier()  # all have looked before one writes
        if not is_there:
            save_pretrained(learn_words(config, run, tokenizer.vocab_size, batches), folder, tokenizer)
    model = build_model(config, run, folder, tower)
    optimizer = make_optimizer(model, config)
    guard = SpikeGuard()
    identity = {"model": asdict(model.config), "data": [rows.fingerprint(), len(training)]}
    identity |= {
        name: getattr(config, name) for name in ("stage", "seed", "lr", "schedule", "steps", "batch_size")
    }
    checkpoints = Checkpointer(run, model, optimizer, identity)
    state = checkpoints.resume(guard)
    before = state.get("before") or report(model, held_out, config, run)

    run.say(
        f"{num_parameters(model.config):,} parameters of words, {len(training):,} rows, {config.steps} steps"
    )
    run.progress(config.steps)
    speed = Speedometer(run, flops_per_token(model.config, config.seq_len))
    step = run.start_step
    while step < config.steps:
        with speed.waiting():
            examples = batches.step(step, share)
        (counted,) = run.sum(sum(int(example.item.mask[1:].sum()) for example in examples))

        # One optimizer step: the gradient of the summed loss / N, accumulated over micro-batches.
        loss_sum = torch.zeros((), device=run.device)
        for start in range(0, len(examples), config.micro_batch_size):
            batch, features = collate(examples[start : start + config.micro_batch_size], run.device)
            nats, _ = model.loss(batch.tokens, batch.targets, features=features)
            (nats / max(counted, 1)).backward()
            loss_sum += nats.detach()
            speed.add(batch.tokens.numel() * run.world_size)
        values = take_step(model, optimizer, guard, config, step, run.sum(loss_sum)[0] / max(counted, 1))

        step += 1
        stopping, last = run.should_stop(), step == config.steps
        if due(config.log_every, step) or last:
            run.log(step, config.steps, **values, broken_rows=len(rows.bad), **speed.read())
        if due(config.eval_every, step) and not (last or stopping):
            run.log(step, config.steps, **totals(report(model, held_out, config, run)))
            speed.read()
        checkpoints.after_step(step, last, stopping, guard=guard.state_dict(), before=before)

    after = report(model, held_out, config, run)
    run.log(step, config.steps, **totals(after))
    # Before its first step the model knows words alone: without a picture, it is the blind one.
    blind_one = {
        name.replace("no_picture", "blind"): value for name, value in before.items() if "no_picture" in name
    }
    run.say(table(after | blind_one, held_out))
    checkpoints.wait()
    settings = {"chat_format": config.chat_format, "resize": config.resize}
    save_vlm(model, tower, run.folder / "model", tokenizer, **settings)
    summary = {
        "before": before,
        "after": after,
        "blind": blind_one,
        "broken_rows": len(rows.bad),
        "skipped_steps": guard.skipped,
        "cpu_seconds": time.process_time(),  # of this process, since it was started
    }
    run.finish(summary, (("loss",), ("accuracy", "shuffled", "no_picture"), ("grad_norm",)))
    run.say(f"next: python chat.py --model {run.folder}/model --image PICTURE")


if __name__ == "__main__":
    run_main(main)
