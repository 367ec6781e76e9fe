"""Stage 3a: direct preference optimisation, from pairs of answers of which one is better (arXiv 2305.18290).

    loss = - log sigmoid(beta (d(chosen) - d(rejected))),     d(y) = log p(y | x) - log p_ref(y | x)

averaged over the pairs of the whole step. `--loss sigmoid` sums d over the tokens of an answer (eq. 7);
`--loss sigmoid_norm` divides that by their number, so that beta means the same for long and short answers
(Tulu 3, arXiv 2411.15124, section 5). p_ref is the model at the start: its sums are computed once and kept.

Moxin Instruct (arXiv 2412.06845, section 4.1): Tulu 3's preference mixture, length-normalised, beta 5.

Watch the generations: accuracy over pairs can rise while the model gets worse at answering, because the
chosen answers become less likely too, only more slowly than the rejected (`chosen_drift` below 0).

    python dpo.py                                        a small model that sorts digits, made on the spot
    python dpo.py --init_from MODEL --data pairs.jsonl   pairs: data/pairs.py makes them, or a public file
    torchrun --nproc_per_node=8 dpo.py --preset moxin-7b --init_from SFT_MODEL
"""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from core.checkpoint import load_weights, read_config, resolve_folder, save_pretrained
from core.config import UserError, parse, require, run_main
from core.estimate import print_estimate
from core.optimizer import make_adamw, take_step
from core.parallel import new_model, unsharded
from core.resume import Checkpointer
from core.run import Run, Speedometer, SpikeGuard, due
from data.demonstrations import small_shape
from data.judges import RuleJudge
from data.packing import Packer
from data.pair_batches import PairBatch, PairConfig, PairData, PairItem, fingerprint, load_pairs, pair_batches
from data.pairs import start_and_pairs, weights_hash
from data.prompts import Prompt, read_prompts
from data.replies import replies
from data.tokenizer import load_tokenizer
from kernels import make_bounds
from model import Transformer, flops_per_token, num_parameters


@dataclass(kw_only=True)
class Config(PairConfig):
    loss: Literal["sigmoid", "sigmoid_norm"] = "sigmoid_norm"  # of summed or of average log-probabilities
    beta: float = 5.0  # how far from the reference: small = far. 5 suits averages, 0.1 sums
    nll_coef: float = 0.0  # adds this x the chosen answer's loss a token (arXiv 2404.19733, eq. 1)
    epochs: float = 1.0  # passes over the pairs; 0 = --steps
    warmup_ratio: float = 0.1  # share of the steps that warm up
    reference: str = ""  # file that keeps the reference's log-probabilities; empty = in the run folder

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta > 0, f"--beta must be above 0, got {self.beta}")


# fmt: off
PRESETS: dict[str, dict[str, Any]] = {
    # Ours, for one thread of a laptop.
    "tiny": dict(
        warm_steps=75, seq_len=64, batch_size=32, micro_batch_size=64, epochs=2, lr=1e-4, schedule="linear",
        weight_decay=0.0, log_every=5, eval_every=20, save_every=20,
    ),
    # Ours, for one GPU: a larger model on the same task.
    "small": dict(
        warm_steps=300, warm_batch=256, warm_lr=1e-3, layers=6, dim=384, heads=6, made_prompts=8000,
        seq_len=64, batch_size=128, micro_batch_size=256, epochs=2, lr=2e-5, schedule="linear",
        weight_decay=0.0, log_every=5, eval_every=50, save_every=50,
    ),
    # Moxin's script for open-instruct: length-normalised, beta 5, 5e-7 linear, warm-up 10 %, one epoch of
    # pairs up to 2,048 tokens, 128 a step, no weight decay, clip 1. Its start, Moxin's SFT model, was not
    # released: name yours. It counted the tokens of all assistant turns; we count those of the last.
    "moxin-7b": dict(
        init_from="runs/sft-moxin-7b/model", data=("hub/allenai/llama-3.1-tulu-3-8b-preference-mixture",),
        skip_bad=True, too_long="cut", val_fraction=0.002, seq_len=2048, batch_size=128, micro_batch_size=1,
        lr=5e-7, schedule="linear", weight_decay=0.0, checkpointing="full", compile=True, eval_every=500,
        save_every=250, max_new_tokens=512, eval_samples=1,
    ),
}
# fmt: on

# What is counted of each pair, beside the loss that is trained.
NAMES = ("pairs", "loss", "accuracy", "margin", "summed_accuracy", "summed_margin", "chosen_drift")
NAMES += ("rejected_drift", "chosen_length", "rejected_length")


def dpo_loss(logprobs: Tensor, reference: Tensor, lengths: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Loss of each pair, and all of NAMES summed over the pairs (the same without the gradient).

    logprobs, reference: log-probabilities summed over each answer, chosen first, [pairs, 2] float64; lengths:
    their numbers of tokens. margin is what beta multiplies in the loss; summed_margin the same of plain sums,
    in nats, whatever the loss.
    """
    drift = logprobs - reference
    scores = drift / lengths if config.loss == "sigmoid_norm" else drift
    margin = scores[:, 0] - scores[:, 1]
    losses = -F.logsigmoid(config.beta * margin)
    if config.nll_coef:
        losses = losses - config.nll_coef * logprobs[:, 0] / lengths[:, 0]
    with torch.no_grad():
        summed = drift[:, 0] - drift[:, 1]
        counted = [torch.ones_like(margin), losses, share_above(margin), margin, share_above(summed), summed]
        values = torch.stack([*counted, *drift.T, *lengths.double().T]).sum(1)
    return losses, values


def share_above(margin: Tensor) -> Tensor:
    """1 where the chosen answer is preferred, 1/2 where neither is."""
    return (margin.sign() + 1) / 2


def answer_logprobs(model: Transformer, micro: PairBatch) -> Tensor:
    """log p(answer | prompt) of every answer, [pairs, 2] float64; both answers of a pair in one forward."""
    batch = micro.batch
    bounds = make_bounds(batch.tokens.shape[1], model.config.sliding_window, batch.doc_ids)
    logprobs, _ = model.logprobs(batch.tokens, batch.targets, bounds, batch.positions)
    return micro.sums(logprobs)


def step_loss(
    model: Transformer, pairs: list[PairItem], reference: Tensor, config: Config, run: Run
) -> Tensor:
    """Add the gradient of the mean loss of these pairs, this process's share of them; NAMES, summed."""
    total = torch.zeros(len(NAMES), dtype=torch.double)
    for micro in pair_batches(pairs, config.seq_len, config.micro_batch_size, run.rank, run.world_size):
        micro = micro.to(run.device)
        known = reference[micro.numbers].to(run.device)
        losses, values = dpo_loss(answer_logprobs(model, micro), known, micro.lengths, config)
        if torch.is_grad_enabled():
            (losses.sum() / len(pairs)).backward()
        total += values.cpu()
    return total


def means(total: Tensor, run: Run) -> dict[str, float]:
    """NAMES over all processes, a pair."""
    pairs, *values = run.sum(*total)
    return {name: value / pairs for name, value in zip(NAMES[1:], values, strict=True)}


# The reference


@torch.no_grad()
def reference_logprobs(
    model: Transformer, pairs: list[PairItem], key: dict[str, str], config: Config, run: Run
) -> Tensor:
    """log p_ref of every answer, [pairs, 2] float64, computed once and kept in a file that says of what.

    Read where --reference names a file that exists, or the run is resumed; refused if it is of another model,
    of other pairs (as tokens) or of another precision.
    """
    path = Path(config.reference or run.folder / "reference.safetensors")
    if path.exists() and (config.reference or config.resume):
        try:
            with safe_open(path, framework="pt") as file:
                known, logprobs = file.metadata() or {}, file.get_tensor("logprobs")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: no log-probabilities of a reference ({error}); delete it") from None
        other = [name for name, value in key.items() if known.get(name) != value]
        if other:
            raise UserError(
                f"{path}: made with another {' and other '.join(other)}; name another --reference"
            )
        return logprobs
    run.say(f"log-probabilities of the reference, once: {path}")
    found = torch.zeros(len(pairs), 2, dtype=torch.double)
    for micro in pair_batches(pairs, config.seq_len, config.micro_batch_size, run.rank, run.world_size):
        found[micro.numbers] = answer_logprobs(model, micro.to(run.device)).cpu()
    if run.world_size > 1:
        dist.all_reduce(found)  # each pair was computed by one process
    if run.main:
        partial = path.with_name(f".{path.name}.partial")
        save_file({"logprobs": found}, partial, metadata=key)
        partial.replace(path)
    run.barrier()
    return found


# Before, during and after


def evaluate(
    model: Transformer, data: PairData, asked: list[Prompt], reference: Tensor, config: Config, run: Run
) -> dict[str, float]:
    """Held-out pairs, and answers sampled to held-out prompts with the reward that rules give them."""
    with torch.no_grad():
        values = means(step_loss(model, data.val, reference[len(data.train) :], config, run), run)
    own, judge = asked[run.rank :: run.world_size], RuleJudge()
    prompts = [prompt for prompt in own for _ in range(config.eval_samples)]
    talks = [prompt.messages for prompt in prompts]
    sampling = dict(max_new_tokens=config.max_new_tokens, seed=config.seed)
    with unsharded(model):
        made = replies(model, data.tokenizer, talks, config.chat_format, **sampling)
    tally = torch.zeros(4, dtype=torch.double)  # answers, rewards, checkable, right
    for number, (prompt, reply) in enumerate(zip(prompts, made, strict=True)):
        right = prompt.check(reply["content"])
        reward = judge.score(prompt, reply["content"])
        tally += torch.tensor([1, reward, right is not None, right or 0.0], dtype=torch.double)
        if number < 3:
            run.say(
                f"  {talks[number][-1]['content'][:80]!r} -> {reply['content'][:120]!r}  reward {reward:g}"
            )
    answers, rewards, checkable, right = run.sum(*tally)
    values["reward"] = rewards / answers
    if checkable:
        values["right"] = right / checkable
    return {f"val_{name}": value for name, value in values.items()}


def main() -> None:
    config = parse(Config, PRESETS, about=__doc__)
    if config.dry_run:
        own = small_shape(config, config.vocab_size)
        return print_estimate(config, read_config(config.init_from) if config.init_from else own)

    run = Run(config, "dpo")
    start, files = start_and_pairs(config, run)
    folder = resolve_folder(start)
    data = load_pairs(files, load_tokenizer(folder), config, run)
    source, moss = (
        config.eval_prompts or ("" if config.init_from else "sorting"),
        config.chat_format == "moss",
    )
    asked = (read_prompts(source, 200, config.seed, moss, held_out=True) if source else data.prompts)[:200]
    steps = math.ceil(config.epochs * len(data.train) / config.batch_size) or config.steps
    config = replace(config, steps=steps, warmup_steps=round(config.warmup_ratio * steps))
    model = new_model(read_config(folder), run)
    load_weights(model, folder)
    every = data.train + data.val
    key = {"model": weights_hash(folder), "pairs": fingerprint(every), "precision": str(run.dtype)}
    reference = reference_logprobs(model, every, key, config, run)

    optimizer, guard = make_adamw(model, config.lr, config.weight_decay, betas=(0.9, 0.999)), SpikeGuard()
    same = ("seed", "lr", "schedule", "steps", "batch_size", "loss", "beta", "nll_coef")
    identity = {"model": asdict(model.config), **key, **{name: getattr(config, name) for name in same}}
    checkpoints = Checkpointer(run, model, optimizer, identity)
    state = checkpoints.resume(guard)
    before = state.get("before") or evaluate(model, data, asked, reference, config, run)
    packer = Packer([(list(range(len(data.train))), 1.0)], config.batch_size, config.seed)

    run.say(f"{num_parameters(model.config):,} parameters, {steps} steps of {config.batch_size} pairs")
    run.progress(steps)
    speed = Speedometer(run, flops_per_token(model.config, config.seq_len))
    step = run.start_step
    while step < steps:
        numbers = packer.step(step)
        pairs = [data.train[number] for number in numbers]
        values = means(step_loss(model, pairs, reference[numbers], config, run), run)
        values |= take_step(model, optimizer, guard, config, step, values["loss"])

        step += 1
        speed.add(sum(len(pair.ids) for pair in pairs))
        stopping, last = run.should_stop(), step == steps
        if due(config.log_every, step) or last:
            run.log(step, steps, **values, **speed.read())
        if due(config.eval_every, step) and not (last or stopping):
            run.log(step, steps, **evaluate(model, data, asked, reference, config, run))
            speed.read()
        checkpoints.after_step(step, last, stopping, guard=guard.state_dict(), before=before)

    after = evaluate(model, data, asked, reference, config, run)
    run.log(step, steps, **after)
    checkpoints.wait()
    save_pretrained(model, run.folder / "model", data.tokenizer)
    summary = {"before": before, "after": after, "pairs": data.counts, "reference": key}
    panels = (("loss", "val_loss"), ("accuracy", "val_accuracy", "val_right"), ("margin", "val_margin"))
    run.finish(summary, (*panels, ("chosen_drift", "rejected_drift"), ("grad_norm",)))
    for name in after:
        run.say(f"  {name}: {before[name]:.3f} -> {after[name]:.3f}")
    run.say(f"done: {run.folder}/curves.png, {run.folder}/summary.json, model in {run.folder}/model")


if __name__ == "__main__":
    run_main(main)
