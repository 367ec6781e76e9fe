"""Stage 2: supervised fine-tuning, from a base model to one that answers, reasons in words, and uses tools.

    loss = - sum_{t in M} log p(x_t | x_<t) / N,      M = tokens the assistant writes, its end token included

N is the number of tokens in M of the whole step, over all micro-batches and processes (`--loss token`), or
the number of conversations (`--loss sum`: every token counts the same in all steps, as in Tulu 3).

Moxin Instruct (arXiv 2412.06845, section 4.1): tulu-3-sft-mixture in the tulu format. Moxin Reasoning's
start (section 4.2): long thoughts between <think> tags. MOSS (DOI 10.1007/s11633-024-1502-8): conversations
of several turns with thoughts, commands to tools and their results, in the moss format. data/chat.py
describes both formats.

    python sft.py                                         tiny model, generated conversations with tools
    python sft.py --init_from runs/pretrain-tiny/model    the same from the tiny base model
    python sft.py --init_from MODEL --chat_format tulu --data talks.jsonl more.json:0.5
    torchrun --nproc_per_node=8 sft.py --preset moxin-7b --init_from moxin-org/Moxin-7B-LLM
"""

import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from core import tools
from core.checkpoint import load_weights, read_config, resolve_folder, save_pretrained
from core.config import RunConfig, parse, require, run_main
from core.estimate import print_estimate
from core.optimizer import make_adamw, make_muon, take_step
from core.parallel import new_model, unsharded
from core.resume import Checkpointer
from core.run import Run, Speedometer, SpikeGuard, due
from data.chat import HEADERS, ChatFormat, TrainOn, chat_template, fit
from data.conversations import Example, documents, generate, is_right
from data.packing import Batch, Item, Packer, micro_batches
from data.readers import Message, read_conversations
from data.replies import replies
from data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from kernels import make_bounds
from model import Config as Shape
from model import Transformer, flops_per_token, num_parameters


@dataclass(kw_only=True)
class Config(RunConfig):
    data: tuple[str, ...] = ()  # NAME_OR_PATH[:weight], hub/OWNER/NAME too; empty = generated conversations
    val_data: tuple[str, ...] = ()  # validate on these instead of on a held-out part of --data
    val_fraction: float = 0.02  # that part
    examples: int = 6000  # generated conversations, where there is no --data
    questions: int = 1  # in each of them
    skip_bad: bool = False  # count unreadable records instead of stopping
    keep_noisy: bool = False  # train on malformed commands and citations of missing results too
    chat_format: ChatFormat = "moss"  # tulu or moss
    train_on: TrainOn = "assistant"  # moss-official trains the user's words too, as the published MOSS code
    loss: Literal["token", "sum"] = "token"  # divide by the step's trained tokens, or by its conversations
    epochs: float = 0.0  # passes over the data, in place of --steps; 0 = --steps
    warmup_ratio: float = 0.0  # share of the steps that warm up; 0 = --warmup_steps
    pack: bool = True  # several conversations in a row of seq_len; changes speed, not results
    too_long: Literal["drop", "truncate", "split"] = "truncate"  # longer than seq_len; cuts are between turns
    quality_tags: bool = False  # put the `quality` of each answer before it as <quality_k>
    tag_dropout: float = 0.1  # share of conversations that lose their tags, anew in each epoch
    tokenizer: str = ""  # folder or file; empty = that of --init_from, else one trained on the data
    optimizer: Literal["adamw", "muon"] = "adamw"
    layers: int = 3  # shape of the model that is made where there is no base model to start from
    dim: int = 96
    heads: int = 3
    vocab_size: int = 700
    eval_examples: int = 144  # generated questions asked before and after, in each held-out split
    samples: int = 3  # validation prompts answered in the log

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.train_on == "assistant" or self.chat_format == "moss",
            "--train_on moss-official needs --chat_format moss",
        )
        require(0 <= self.tag_dropout <= 1, "--tag_dropout must be between 0 and 1")
        require(0 < self.val_fraction < 1, "--val_fraction must be between 0 and 1")


# fmt: off
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        examples=20_000, questions=3, steps=2600, seq_len=640, batch_size=12, optimizer="muon", lr=2.5e-3,
        min_lr=2.5e-5, warmup_steps=20, weight_decay=0.01, log_every=50, eval_every=500, save_every=500,
    ),
    "small": dict(
        examples=40_000, epochs=3, seq_len=2048, batch_size=128, micro_batch_size=8, lr=1e-4, min_lr=1e-5,
        warmup_ratio=0.03, weight_decay=0.0, layers=8, dim=512, heads=8, vocab_size=4000,
    ),
    # open-instruct's script as Moxin ran it: 2 epochs, 5e-6 linear, warm-up 3 %, 128 conversations of up to
    # 4,096 tokens, no weight decay, token-sum loss, gradient norm clipped at 1. It cut long conversations
    # inside a turn; we cut between turns.
    "moxin-7b": dict(
        init_from="moxin-org/Moxin-7B-LLM", data=("hub/allenai/tulu-3-sft-mixture",), chat_format="tulu",
        loss="sum", epochs=2, seq_len=4096, batch_size=128, micro_batch_size=1, lr=5e-6, schedule="linear",
        warmup_ratio=0.03, weight_decay=0.0, checkpointing="full", compile=True, eval_every=500,
        save_every=500,
    ),
    # arXiv 2412.06845, section 4.2: "the Tulu 3 SFT defaults" on these two sets. Not published: the split of
    # OpenR1, the length limit (Tulu's 4,096 would cut most thoughts before their answer) and the conversion
    # to <think>. Ours: the default split, 16,384 tokens, longer ones dropped. Some problems of OpenR1 have no
    # verified generation and are skipped.
    "moxin-7b-cot": dict(
        init_from="moxin-org/Moxin-7B-Instruct",
        data=("hub/open-thoughts/OpenThoughts-114k/data/*.parquet",
              "hub/open-r1/OpenR1-Math-220k/data/*.parquet"),
        skip_bad=True, chat_format="tulu", loss="sum", epochs=2, too_long="drop", seq_len=16_384,
        batch_size=128, micro_batch_size=1, lr=5e-6, schedule="linear", warmup_ratio=0.03, weight_decay=0.0,
        checkpointing="full", compile=True, eval_every=200, save_every=200,
    ),
    # finetune_moss.py and its README: 2 epochs, 1.5e-5 cosine to 0, warm-up 5 %, 128 conversations of up to
    # 2,048 tokens, weight decay 0.1, clip 1. --train_on moss-official for its loss on the user's words. Its
    # mixture also had FLANv2 (64 instances a task), which was not published.
    "moss-16b": dict(
        init_from="fnlp/moss-moon-003-base", data=("hub/fnlp/moss-003-sft-data",), epochs=2, seq_len=2048,
        batch_size=128, micro_batch_size=1, lr=1.5e-5, warmup_ratio=0.05, checkpointing="full", compile=True,
        eval_every=500, save_every=500,
    ),
}
# fmt: on


@dataclass
class Data:
    """What a run learns from and is judged by."""

    tokenizer: Tokenizer
    packer: Packer
    val_items: list[Item]
    val_talks: list[list[Message]]
    questions: dict[str, list[Example]]  # generated, by held-out split; none with --data
    counts: Counter  # what the length limit did to the conversations


def load_data(config: Config, run: Run) -> Data:
    """Read or generate the conversations, hold some out, render them."""
    sources, val_talks = read_sources(config, run) if config.data else generated(config)
    tokenizer = find_tokenizer(config, [talk for talks, _ in sources for talk in talks])
    tokenizer.chat_template = chat_template(tokenizer, config.chat_format)
    rendered, counts = [], Counter()
    for talks, weight in sources:
        items, done = render_all(talks, tokenizer, config)
        rendered.append((items, weight))
        counts.update(done)
    run.say("conversations: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
    require(
        any(items for items, _ in rendered),
        f"nothing to learn: no trained token within --seq_len {config.seq_len} in any conversation",
    )
    tags = [number for name, number in tokenizer.special_tokens.items() if name.startswith("<quality_")]
    packer = Packer(rendered, config.batch_size, config.seed, tuple(tags), config.tag_dropout)
    questions = {}
    if not config.data:
        count, seed, with_tools = config.eval_examples, config.seed + 1, config.chat_format == "moss"
        questions = {split: generate(count, split, seed, with_tools) for split in ("value", "template")}
    val_items = render_all(val_talks, tokenizer, config)[0]
    return Data(tokenizer, packer, val_items, val_talks, questions, counts)


Sources = list[tuple[list[list[Message]], float]]  # conversations and weight of each


def generated(config: Config) -> tuple[Sources, list[list[Message]]]:
    """Training and validation conversations of data/conversations.py."""
    with_tools = config.chat_format == "moss"
    made = generate(config.examples, "train", config.seed, with_tools, config.questions)
    held_out = generate(max(50, config.examples // 50), "value", config.seed, with_tools)
    return [([example.messages for example in made], 1.0)], [example.messages for example in held_out]


def read_sources(config: Config, run: Run) -> tuple[Sources, list[list[Message]]]:
    """--data, and --val_data or else a part held out of each source."""

    def read(word: str) -> tuple[list[list[Message]], float]:
        name, _, weight = word.rpartition(":")
        if not name or not weight.replace(".", "", 1).isdecimal():
            name, weight = word, "1"
        reading = read_conversations(name, config.skip_bad, config.keep_noisy)
        run.say(f"{name}: " + "\n  ".join(reading.summary()))
        return reading.conversations, float(weight)

    sources, held_out = [read(word) for word in config.data], []
    if config.val_data:
        return sources, [talk for word in config.val_data for talk in read(word)[0]]
    for number, (talks, weight) in enumerate(sources):
        require(len(talks) > 1, f"{config.data[number]}: only one conversation; give --val_data")
        order = np.random.default_rng(config.seed).permutation(len(talks))
        count = max(1, round(config.val_fraction * len(talks)))
        held_out += [talks[i] for i in order[:count]]
        sources[number] = ([talks[i] for i in sorted(order[count:])], weight)
    return sources, held_out


def render_all(
    talks: list[list[Message]], tokenizer: Tokenizer, config: Config
) -> tuple[list[Item], Counter]:
    """Conversations as items of at most seq_len tokens, and counts of what the length limit did to them."""
    items, counts = [], Counter()
    for talk in talks:
        if not config.quality_tags:
            talk = [{key: value for key, value in turn.items() if key != "quality"} for turn in talk]
        parts, done = fit(
            talk, tokenizer, config.seq_len, config.too_long, config.chat_format, config.train_on
        )
        counts.update(done)
        counts["with nothing to learn"] += sum(not any(part.mask) for part in parts)
        kept = [part for part in parts if any(part.mask)]
        items += [Item(np.array(part.ids, np.int32), np.array(part.mask, bool)) for part in kept]
    return items, +counts


def find_tokenizer(config: Config, talks: list[list[Message]]) -> Tokenizer:
    """The given one, that of the base model, or a small one trained on the conversations."""
    if config.tokenizer or config.init_from:
        return load_tokenizer(config.tokenizer or resolve_folder(config.init_from))
    texts = [str(value) for talk in talks[:2000] for message in talk for value in message.values()]
    return train_tokenizer(texts + list(HEADERS[config.chat_format]) * len(texts), config.vocab_size)


def model_shape(config: Config, vocab_size: int) -> Shape:
    """The base model's shape, or that of the small one made where there is none."""
    if config.init_from:
        return read_config(resolve_folder(config.init_from))
    return Shape(
        vocab_size=vocab_size,
        layers=config.layers,
        dim=config.dim,
        heads=config.heads,
        kv_heads=config.heads,
        head_dim=config.dim // config.heads,
        ffn_dim=config.dim * 8 // 3 // 8 * 8,
        max_seq_len=max(1024, config.seq_len),
        tied=True,
        init_std=config.dim**-0.5,  # at this width the usual 0.02 would learn nothing for long
    )


def build_model(config: Config, run: Run, tokenizer: Tokenizer) -> Transformer:
    """The base model, or a small one of random weights."""
    shape = model_shape(config, tokenizer.vocab_size)
    require(
        tokenizer.vocab_size <= shape.vocab_size,
        f"the tokenizer has {tokenizer.vocab_size} tokens, the model {shape.vocab_size} rows: not its own",
    )
    require(config.seq_len <= shape.max_seq_len, f"--seq_len: the model's limit is {shape.max_seq_len}")
    model = new_model(shape, run)
    if config.init_from:
        load_weights(model, resolve_folder(config.init_from))
    else:
        model.init_weights(config.seed)
    return model


def batch_loss(model: Transformer, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss summed over the trained tokens of a micro-batch, and their number; with none, both are 0."""
    bounds = make_bounds(batch.tokens.shape[1], model.config.sliding_window, batch.doc_ids)
    return model.loss(batch.tokens, batch.targets, bounds, batch.positions)


@torch.no_grad()
def validate(model: Transformer, items: list[Item], config: Config, run: Run) -> float:
    """Nats a trained token."""
    total = torch.zeros(2, dtype=torch.float64)
    for batch in micro_batches(
        items, config.seq_len, config.pack, config.micro_batch_size, run.rank, run.world_size
    ):
        total += torch.stack([value.double().cpu() for value in batch_loss(model, batch.to(run.device))])
    nats, count = run.sum(*total)
    return nats / max(1, count)


def report(model: Transformer, data: Data, config: Config, run: Run) -> dict[str, float]:
    """Validation loss, and the first validation prompts answered, printed."""
    values = {"val_loss": validate(model, data.val_items, config, run)}
    run.say(f"validation loss {values['val_loss']:.4f}")
    prompts = [talk[:-1] for talk in data.val_talks if talk[-1]["role"] == "assistant"][: config.samples]
    with unsharded(model):
        made = replies(model, data.tokenizer, prompts, config.chat_format, temperature=0.0)
    for prompt, reply in zip(prompts, made, strict=True):
        written = " | ".join(reply[key] for key in ("commands", "results", "content") if key in reply)
        run.say(f"  {prompt[-1]['content'][:100]!r} -> {written[:200]!r}")
    return values


def ask(model: Transformer, data: Data, config: Config, run: Run) -> dict[str, float]:
    """Share of right replies to generated questions, by split and kind; of right and well-formed commands.

    Greedy, with the tools run for real; each process asks a part. With --data there are no questions.
    """
    index = tools.SearchIndex(documents())
    kinds = {f"{split}/{e.kind}" for split, examples in data.questions.items() for e in examples}
    commands = [f"{split}/{what} commands" for split in data.questions for what in ("well-formed", "right")]
    names = [*data.questions, *sorted(kinds), *commands]
    tally = {name: [0, 0] for name in names}  # right, asked

    def count(name: str, good: bool) -> None:
        tally[name][0] += good
        tally[name][1] += 1

    for split, examples in data.questions.items():
        own = examples[run.rank :: run.world_size]
        talks = [example.messages[:-1] for example in own]
        with unsharded(model):
            made = replies(model, data.tokenizer, talks, config.chat_format, index, temperature=0.0)
        for example, reply in zip(own, made, strict=True):
            count(split, is_right(example, reply["content"]))
            count(f"{split}/{example.kind}", is_right(example, reply["content"]))
            if example.command:
                called = tools.parse_commands(reply.get("commands", ""))
                count(f"{split}/well-formed commands", bool(called))
                count(f"{split}/right commands", called == [example.command])
    sums = run.sum(*(value for name in names for value in tally[name])) if names else []
    pairs = zip(names, sums[::2], sums[1::2], strict=True)
    return {f"accuracy/{name}": right / asked for name, right, asked in pairs if asked}


def main() -> None:
    config = parse(Config, PRESETS, about=__doc__)
    base = f"runs/pretrain-{config.preset}/model"  # what `python pretrain.py` leaves behind
    if not config.init_from and Path(base).is_dir():
        config = replace(config, init_from=base)
    if config.dry_run:
        return print_estimate(config, model_shape(config, config.vocab_size))

    run = Run(config, "sft")
    run.say(f"starting from {config.init_from or f'random weights (no --init_from, no {base})'}")
    data = load_data(config, run)
    steps = math.ceil(config.epochs * data.packer.epoch_size / config.batch_size) or config.steps
    warmup = round(config.warmup_ratio * steps) or config.warmup_steps
    config = replace(config, steps=steps, warmup_steps=warmup)
    model = build_model(config, run, data.tokenizer)
    make_optimizer = make_muon if config.optimizer == "muon" else make_adamw
    optimizer = make_optimizer(model, config.lr, config.weight_decay, betas=(0.9, 0.999))
    guard = SpikeGuard()
    identity = {"model": asdict(model.config), "data": data.packer.fingerprint()}
    same = ("seed", "lr", "schedule", "steps", "batch_size", "optimizer", "loss")
    identity |= {name: getattr(config, name) for name in same}
    checkpoints = Checkpointer(run, model, optimizer, identity)
    state = checkpoints.resume(guard)
    before = state.get("before") or report(model, data, config, run) | ask(model, data, config, run)

    run.say(
        f"{num_parameters(model.config):,} parameters, {steps} steps of {config.batch_size} conversations"
    )
    run.progress(steps)
    speed = Speedometer(run, flops_per_token(model.config, config.seq_len))
    step, tokens, trained = run.start_step, state.get("tokens", 0), state.get("trained", 0)
    while step < steps:
        with speed.waiting():
            items = data.packer.step(step)
            micros = micro_batches(
                items, config.seq_len, config.pack, config.micro_batch_size, run.rank, run.world_size
            )
        counted, real, places = run.sum(
            sum((micro.targets >= 0).sum() for micro in micros),
            sum((micro.doc_ids >= 0).sum() for micro in micros),
            sum(micro.tokens.numel() for micro in micros),
        )

        # One optimizer step: the gradient of the summed loss / N, accumulated over micro-batches.
        divisor = max(1, counted) if config.loss == "token" else config.batch_size
        loss_sum = torch.zeros((), device=run.device)
        for micro in micros:
            nats, _ = batch_loss(model, micro.to(run.device))
            (nats / divisor).backward()
            loss_sum += nats.detach()
        loss = run.sum(loss_sum)[0] / max(1, counted)
        values = take_step(model, optimizer, guard, config, step, loss)

        step, tokens, trained = step + 1, tokens + int(real), trained + int(counted)
        speed.add(int(real))
        stopping, last = run.should_stop(), step == steps
        if due(config.log_every, step) or last:
            values |= {"tokens": tokens, "trained_tokens": trained, "fill": real / places}
            run.log(step, steps, **values, **speed.read())
        if due(config.eval_every, step) and not (last or stopping):
            run.log(step, steps, **report(model, data, config, run))
            speed.read()
        counters = {"guard": guard.state_dict(), "before": before, "tokens": tokens, "trained": trained}
        checkpoints.after_step(step, last, stopping, **counters)

    after = report(model, data, config, run) | ask(model, data, config, run)
    run.log(step, steps, **after)
    checkpoints.wait()
    save_pretrained(model, run.folder / "model", data.tokenizer)
    summary = {"before": before, "after": after, "conversations": dict(data.counts), "steps": steps}
    summary |= {"tokens": tokens, "trained_tokens": trained, "skipped_steps": guard.skipped}
    run.finish(summary, (("loss", "val_loss"), ("grad_norm",), ("tokens_per_second",)))
    for name in after:
        run.say(f"  {name}: {before[name]:.3f} -> {after[name]:.3f}")
    run.say(f"next: python chat.py --model {run.folder}/model")


if __name__ == "__main__":
    run_main(main)
