"""Stage 1: pretraining, from raw text to a base model.

    loss = - sum_t log p(x_t | x_<t) / N,      N = predicted tokens of the whole step, over all processes

Moxin-7B (arXiv 2412.06845, section 3): 2 T tokens of text and code in three phases, context 2k, then 4k,
then "capability enhancement"; AdamW, cosine to a tenth. MOSS-16B: English, Chinese and code (360 B, 100 B,
220 B tokens) on a GPT-2 vocabulary extended by Chinese merges. What each paper leaves open stands beside the
preset that fills it.

    python pretrain.py                                  tiny model, embedded corpus, a laptop
    torchrun --nproc_per_node=8 pretrain.py             small model, one node
    python pretrain.py --data my_texts/:3 more.jsonl:1  your own text, mixed 3 to 1
"""

import math
import re
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch

import core.surgery as surgery
from core.checkpoint import load_pretrained, load_weights, read_config, save_pretrained
from core.config import RunConfig, UsageError, UserError, parse, require, run_main
from core.estimate import print_estimate
from core.generate import generate
from core.optimizer import make_adamw, make_muon, take_step
from core.parallel import new_model, parallelize, unsharded
from core.resume import Checkpointer
from core.run import Run, Speedometer, SpikeGuard, due
from data.text import Batch, Corpus, HubUnreachable, PackedBatches, parse_source, prepare, val_batches
from data.tokenizer import Tokenizer, load_tokenizer
from kernels import Bounds, make_bounds
from model import PRESETS as SHAPES
from model import Config as Shape
from model import Transformer, flops_per_token, num_parameters

EMBEDDED = ("python-code:3", "python-docs:2", "drills:5")


@dataclass(kw_only=True)
class Config(RunConfig):
    data: tuple[str, ...] = EMBEDDED  # sources as NAME_OR_PATH[:weight] (docs/recipes.md)
    phases: tuple[str, ...] = ()  # STEPS@SEQ_LEN[@DATA+DATA...] in turn; tokens in a step stay equal
    tokenizer: str = ""  # folder or file; empty = that of --init_from, else one trained on the data
    model: str = "tiny"  # shape, one of model.PRESETS
    layers: int = 0  # 0 = the shape's own, here and below
    dim: int = 0
    heads: int = 0
    kv_heads: int = 0
    ffn_dim: int = 0
    vocab_size: int = 0
    expand_layers: int = 0  # deepen the --init_from model to this many layers by copying (Moxin: 32 to 36)
    expand_identity: bool = False  # added layers start as the identity (LLaMA Pro)
    optimizer: Literal["adamw", "muon"] = "adamw"
    z_loss: float = 0.0  # weight of log^2 Z, keeps logits from drifting (PaLM, section 5); 1e-4 is usual
    document_mask: bool = True  # no attention between packed documents
    val_data: tuple[str, ...] = ()  # validate on these sources instead of on a held-out part of --data
    decontaminate: tuple[str, ...] = ()  # drop documents sharing 13 words in a row with these files
    skip_bad: bool = False  # count unreadable lines and files instead of stopping
    max_tokens: int = 0  # prepared of each source; 0 = all of local ones, what the run reads of hub ones
    val_tokens: int = 16_384  # validation tokens of each source
    prompts: tuple[str, ...] = ("def ", "The ", "今天")  # continued at each validation


# fmt: off
PRESETS = {
    "tiny": dict(
        model="tiny", steps=800, seq_len=256, batch_size=12, micro_batch_size=12, optimizer="muon",
        lr=5e-3, min_lr=5e-5, warmup_steps=20, eval_every=200, save_every=200,
    ),
    # About 1 B tokens of English, Chinese and code.
    "small": dict(
        model="small", steps=2000, seq_len=2048, batch_size=256, micro_batch_size=8, compile=True,
        data=("hub/allenai/c4/en/c4-train.*.json.gz:5",
              "hub/allenai/c4/multilingual/c4-zh.tfrecord-*.json.gz:2",
              "hub/codeparrot/codeparrot-clean:3"),
        lr=6e-4, min_lr=6e-5, warmup_steps=100, eval_every=250, save_every=250, val_tokens=262_144,
    ),
    # Published: AdamW 0.9/0.95, weight decay 0.1, cosine to 10 %, context 2k then 4k, SlimPajama + DCLM +
    # the-stack, peak learning rate 2e-6, which fits a model continued from pretrained weights. Not published:
    # batch, warm-up, tokens of each phase, mixture weights. Ours: 4 M tokens a step, 2,000 warm-up steps,
    # 80 : 20 : 4 of 2 T tokens; the third phase's data are yours to name (STEPS@4096@DATA).
    "moxin-7b": dict(
        model="moxin-7b", steps=478_400, seq_len=2048, batch_size=2048, micro_batch_size=4,
        phases=("368000@2048", "92000@4096", "18400@4096"),
        data=("hub/cerebras/SlimPajama-627B/train:5", "hub/mlfoundations/dclm-baseline-1.0:4",
              "hub/bigcode/the-stack-dedup:1"),
        lr=2e-6, min_lr=2e-7, warmup_steps=2000, checkpointing="selective", compile=True,
        eval_every=1000, save_every=1000, val_tokens=1_048_576,
    ),
    # Published: continued from CodeGen-16B on 100 B Chinese + 20 B English tokens, context 2048. MOSS's own
    # optimiser settings are not published; these follow CodeGen (arXiv 2203.13474): 2 M tokens a step, 3,000
    # warm-up steps, weight decay 0.1, peak 0.5e-4.
    "moss-16b": dict(
        model="moss-16b", steps=60_000, seq_len=2048, batch_size=1024, micro_batch_size=2,
        data=("hub/Skywork/SkyPile-150B:5", "hub/allenai/c4/en/c4-train.*.json.gz:1"),
        lr=5e-5, min_lr=5e-6, warmup_steps=3000, checkpointing="full", compile=True,
        eval_every=1000, save_every=1000, val_tokens=1_048_576,
    ),
}
# fmt: on


@dataclass(frozen=True)
class Phase:
    """`steps` steps at `seq_len` on `data`; `first` is the run's step at which it begins."""

    first: int
    steps: int
    seq_len: int
    rows: int
    data: tuple[str, ...]


def plan_phases(config: Config) -> list[Phase]:
    """Moxin's schedule of contexts and mixtures. Without --phases, one phase of --steps."""
    phases, first = [], 0
    for text in config.phases or (f"{config.steps}@{config.seq_len}",):
        match = re.fullmatch(r"(\d+)@(\d+)(?:@(.+))?", text)
        require(match is not None, f"--phases {text!r}: expected STEPS@SEQ_LEN[@DATA+DATA]")
        steps, seq_len, data = match.groups()
        rows, rest = divmod(config.batch_size * config.seq_len, int(seq_len))
        require(rows > 0 and rest == 0, f"--phases {text!r}: {seq_len} does not divide a step's tokens")
        sources = tuple(data.split("+")) if data else config.data
        phases.append(Phase(first, int(steps), int(seq_len), rows, sources))
        first += int(steps)
    require(first == config.steps, f"--phases have {first} steps in all, --steps says {config.steps}")
    return phases


def load_corpus(config: Config, run: Run, phases: list[Phase]) -> tuple[Corpus, Tokenizer]:
    """Tokenised documents of every source of every phase, and the tokenizer that made them."""
    folder = config.tokenizer or config.init_from
    tokenizer = load_tokenizer(folder) if folder else None
    vocab_size = config.vocab_size or SHAPES[config.model].vocab_size
    options = {
        name: getattr(config, name) for name in ("val_data", "decontaminate", "skip_bad", "max_tokens")
    }
    sources = tuple(dict.fromkeys(source for phase in phases for source in phase.data))
    if any(source.startswith("hub/") for source in sources):
        options["max_tokens"] = config.max_tokens or config.steps * config.batch_size * config.seq_len
    run.say(f"text: {' '.join(sources)} (prepared once, then found in the cache)")
    try:
        return prepare(sources, tokenizer, vocab_size=vocab_size, run=run, **options)
    except HubUnreachable as error:
        if config.data != PRESETS[config.preset].get("data"):
            raise  # the user asked for this source by name
        run.say(
            f"{'!' * 78}\n{error}\nTraining on the embedded corpus instead: {' '.join(EMBEDDED)}\n{'!' * 78}"
        )
        phases[:] = [replace(phase, data=EMBEDDED) for phase in phases]
        return prepare(EMBEDDED, tokenizer, vocab_size=vocab_size, run=run, **options)


def model_shape(config: Config, vocab_size: int) -> Shape:
    """The preset's shape with the command line's changes."""
    require(config.model in SHAPES, f"--model {config.model!r}: one of {', '.join(SHAPES)}")
    changes = {
        n: getattr(config, n) for n in ("layers", "dim", "heads", "kv_heads", "ffn_dim") if getattr(config, n)
    }
    shape = SHAPES[config.model]
    if config.dim or config.heads:
        dim, heads = config.dim or shape.dim, config.heads or shape.heads
        require(dim % heads == 0, f"--dim {dim} must be a multiple of --heads {heads}")
        changes |= {"head_dim": dim // heads, "init_std": dim**-0.5}
    longest = max(phase.seq_len for phase in plan_phases(config))
    try:
        return replace(shape, **changes, vocab_size=vocab_size, max_seq_len=max(shape.max_seq_len, longest))
    except ValueError as error:
        raise UsageError(str(error)) from None


def build_model(config: Config, run: Run, corpus: Corpus, tokenizer: Tokenizer) -> Transformer:
    """From scratch, or from a folder: as it is, deeper, or with the rows that a larger vocabulary needs."""
    if not config.init_from:
        model = new_model(model_shape(config, tokenizer.vocab_size), run)
        model.init_weights(config.seed)
        return model
    start, old = read_config(config.init_from), load_tokenizer(config.init_from)
    known = min(old.vocab_size, tokenizer.vocab_size)
    strange = next((i for i in range(known) if old.token_bytes(i) != tokenizer.token_bytes(i)), None)
    if strange is not None or tokenizer.vocab_size < old.vocab_size:
        where = f"id {known if strange is None else strange} differs"
        raise UserError(
            f"--tokenizer {config.tokenizer} does not continue that of {config.init_from} ({where})"
        )
    grown = tokenizer.vocab_size - start.vocab_size
    if grown <= 0 and not config.expand_layers:
        model = new_model(start, run)
        load_weights(model, config.init_from)
        return model
    # Surgery works on whole weights: each process makes the same model, then keeps its share.
    model = load_pretrained(config.init_from)
    if grown > 0:
        pieces = [
            old.encode_bytes(tokenizer.token_bytes(i)) for i in range(start.vocab_size, tokenizer.vocab_size)
        ]
        sample = next(val_batches(next(iter(corpus.val.values())), 256, 4096)).tokens.clamp(
            max=start.vocab_size - 1
        )
        model = surgery.extend_vocabulary(model, pieces, sample)
    if config.expand_layers:
        model = surgery.expand_depth(model, config.expand_layers, config.expand_identity)
    return parallelize(model.to(run.device), run)


@torch.no_grad()
def validate(model: Transformer, corpus: Corpus, config: Config, run: Run) -> dict[str, float]:
    """val_loss (nats a token, all sources) and bits per byte of each source: nats / (bytes x ln 2)."""
    nats_all = tokens_all = 0.0
    result = {}
    for name, stream in corpus.val.items():
        nats = tokens = size = 0.0
        for batch in val_batches(
            stream, config.seq_len, config.val_tokens, run.world_size * config.micro_batch_size
        ):
            share = batch.rows(run.rows(len(batch.tokens))).to(run.device)
            loss, count = model.loss(
                share.tokens, share.targets, bounds_of(share, model, config), share.positions
            )
            nats, tokens, size = nats + loss.item(), tokens + count.item(), size + share.bytes
        nats, tokens, size = run.sum(nats, tokens, size)
        result[f"bpb/{name}"] = nats / size / math.log(2)
        nats_all, tokens_all = nats_all + nats, tokens_all + tokens
    return {"val_loss": nats_all / tokens_all, **result}


def bounds_of(batch: Batch, model: Transformer, config: Config) -> Bounds | None:
    """Who sees whom: the sliding window where the model has one, and packed documents kept apart."""
    if not config.document_mask:
        return None
    return make_bounds(batch.tokens.shape[1], model.config.sliding_window, batch.doc_ids)


def samples(model: Transformer, tokenizer: Tokenizer, config: Config, run: Run) -> list[str]:
    """What the model makes of each prompt, at temperature 0.8."""
    start = [] if tokenizer.bos_id in (None, tokenizer.eos_id) else [tokenizer.bos_id]
    prompts = [start + tokenizer.encode(text) for text in config.prompts]
    with unsharded(model):
        made = generate(
            model,
            prompts,
            max_new_tokens=40,
            temperature=0.8,
            stop_ids=(tokenizer.eos_id,),
            seed=config.seed,
            tokenizer=tokenizer,
        )
    return [text + tokenizer.decode(c[0].tokens) for text, c in zip(config.prompts, made, strict=True)]


def report(
    model: Transformer, corpus: Corpus, tokenizer: Tokenizer, config: Config, run: Run
) -> dict[str, float]:
    """Validate, and print the figures and samples."""
    values = validate(model, corpus, config, run)
    run.say("validation: " + ", ".join(f"{name} {value:.3f}" for name, value in values.items()))
    for text in samples(model, tokenizer, config, run):
        run.say(f"  sample: {text!r}")
    return values


def main() -> None:
    config = parse(Config, PRESETS, about=__doc__)
    phases = plan_phases(config)
    for source in config.data:
        parse_source(source)
    shape = model_shape(config, config.vocab_size or SHAPES.get(config.model, SHAPES["tiny"]).vocab_size)
    if config.dry_run:
        return print_estimate(config, shape)

    run = Run(config, "pretrain")
    run.rows(config.batch_size)
    corpus, tokenizer = load_corpus(config, run, phases)
    run.say(corpus.table())
    model = build_model(config, run, corpus, tokenizer)
    make_optimizer = make_muon if config.optimizer == "muon" else make_adamw
    optimizer = make_optimizer(model, config.lr, config.weight_decay)
    guard = SpikeGuard()
    batches = [
        PackedBatches(corpus.train, corpus.mixture(phase.data), phase.seq_len, phase.rows, config.seed + i)
        for i, phase in enumerate(phases)
    ]
    identity = {
        "model": asdict(model.config),
        "data": corpus.fingerprint,
        "phases": [asdict(p) for p in phases],
    }
    identity |= {
        name: getattr(config, name) for name in ("seed", "lr", "schedule", "optimizer", "document_mask")
    }
    checkpoints = Checkpointer(run, model, optimizer, identity)
    state = checkpoints.resume(guard)
    before = state.get("before") or report(model, corpus, tokenizer, config, run)
    if not state:
        run.log(0, config.steps, **before)

    flops = flops_per_token(model.config, config.seq_len)
    run.say(f"{num_parameters(model.config):,} parameters, {flops:,} FLOPs a token, {config.steps} steps")
    run.progress(config.steps)
    speed = Speedometer(run, flops)
    step = run.start_step
    while step < config.steps:
        now, phase = [(i, p) for i, p in enumerate(phases) if p.first <= step][-1]
        with speed.waiting():
            batch = batches[now].batch(step - phase.first, run.rows(phase.rows)).to(run.device)
        (counted,) = run.sum((batch.targets >= 0).sum())
        if step == phase.first:
            guard.forget()

        # One optimizer step: the gradient of the summed loss / N, accumulated over micro-batches.
        loss_sum = torch.zeros((), device=run.device)
        for micro in batch.split(max(1, config.micro_batch_size * config.seq_len // phase.seq_len)):
            bounds = bounds_of(micro, model, config)
            nats, _ = model.loss(micro.tokens, micro.targets, bounds, micro.positions, config.z_loss)
            (nats / counted).backward()
            loss_sum += nats.detach()
        values = take_step(model, optimizer, guard, config, step, run.sum(loss_sum)[0] / counted)

        step += 1
        speed.add(config.batch_size * config.seq_len)
        stopping, last = run.should_stop(), step == config.steps
        if due(config.log_every, step) or last:
            values["tokens"] = step * config.batch_size * config.seq_len
            run.log(step, config.steps, **values, **speed.read())
        if due(config.eval_every, step) and not (last or stopping):
            run.log(step, config.steps, **report(model, corpus, tokenizer, config, run))
            speed.read()
        checkpoints.after_step(step, last, stopping, guard=guard.state_dict(), before=before)

    after = report(model, corpus, tokenizer, config, run)
    run.log(step, config.steps, **after)
    checkpoints.wait()
    save_pretrained(model, run.folder / "model", tokenizer)
    ledger = Counter()
    for part, phase in zip(batches, phases, strict=True):
        ledger.update(part.ledger(phase.steps))
    summary = {"before": before, "after": after, "unigram_control": corpus.unigram_bits_per_byte()}
    summary |= {"tokens": dict(ledger), "skipped_steps": guard.skipped}
    run.finish(summary, (("loss", "val_loss"), tuple(after)[1:], ("grad_norm",)))
    run.say(f"next: python chat.py --model {run.folder}/model --raw --prompt {config.prompts[0]!r}")
    run.say(f"      python sft.py --init_from {run.folder}/model")


if __name__ == "__main__":
    run_main(main)
