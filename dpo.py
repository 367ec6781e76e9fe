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

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from core.checkpoint import load_weights, read_config, save_pretrained
from core.config import UserError, parse, require, run_main
from core.estimate import print_estimate
from core.optimizer import make_adamw, take_step
from core.parallel import new_model, unsharded
from core.run import Run
from core.watch import Watch
from data.judges import RuleJudge
from data.packing import Packer
from data.pair_batches import SMALL, PairBatch, PairConfig, PairData, PairItem, fingerprint, micro_batches
from data.pairs import start_and_pairs, weights_hash
from data.prompts import Prompt, read_prompts
from data.replies import replies
from model import Transformer


@dataclass(kw_only=True)
class Config(PairConfig):
    loss: Literal["sigmoid", "sigmoid_norm"] = "sigmoid_norm"  # of summed or of average log-probabilities
    beta: float = 5.0  # how far from the reference: small = far. 5 suits averages, 0.1 sums
    nll_coef: float = 0.0  # adds this x the chosen answer's loss a token (arXiv 2404.19733, eq. 1)
    reference: str = ""  # file that keeps the reference's log-probabilities; empty = in the run folder

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.beta > 0, f"--beta must be above 0, got {self.beta}")


# fmt: off
PRESETS: dict[str, dict[str, Any]] = {
    # Ours, for one thread of a laptop.
    "tiny": dict(
        warm_steps=75, seq_len=64, batch_size=32, micro_batch_size=64, epochs=2, lr=3e-4, schedule="linear",
        weight_decay=0.0, log_every=5, eval_every=20, save_every=20,
    ),
    # Ours, for one GPU: a larger model on the same task.
    "small": dict(SMALL, epochs=2, lr=2e-5, weight_decay=0.0, log_every=5, eval_every=50, save_every=50),
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
    rows, bounds = micro.batch, micro.bounds(model.config.sliding_window)
    logprobs, _ = model.logprobs(rows.tokens, rows.targets, bounds, rows.positions)
    return micro.sums(logprobs)


def step_loss(
    model: Transformer, pairs: list[PairItem], reference: Tensor, config: Config, run: Run
) -> Tensor:
    """Add the gradient of the mean loss of these pairs, this process's share of them; NAMES, summed."""
    total = torch.zeros(len(NAMES), dtype=torch.double)
    for micro in micro_batches(pairs, config, run):
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
            what = " and other ".join(other)
            raise UserError(f"{path}: made with another {what}; name another --reference")
        return logprobs
    run.say(f"log-probabilities of the reference, once: {path}")
    found = torch.zeros(len(pairs), 2, dtype=torch.double)
    for micro in micro_batches(pairs, config, run):
        found[micro.numbers] = answer_logprobs(model, micro).cpu()
    if run.world_size > 1:
        dist.all_reduce(found)  # each pair was computed by one process
    if run.main:
        unfinished = path.with_name(f".{path.name}.partial")
        save_file({"logprobs": found}, unfinished, metadata=key)
        unfinished.replace(path)
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
        if number % config.eval_samples == 0 and number < 3 * config.eval_samples:
            asked_for, said = talks[number][-1]["content"][:80], reply["content"][:120]
            run.say(f"  {asked_for!r} -> {said!r}  reward {reward:g}")
    answers, rewards, checkable, right = run.sum(*tally)
    if answers:
        values["reward"] = rewards / answers
    if checkable:
        values["right"] = right / checkable
    return {f"val_{name}": value for name, value in values.items()}


def main() -> None:
    config = parse(Config, PRESETS, about=__doc__)
    if config.dry_run:
        return print_estimate(config, config.shape)

    run = Run(config, "dpo")
    start, data, config = start_and_pairs(config, run)
    asked, source = data.prompts[:200], config.eval_prompts or ("" if config.init_from else "sorting")
    if source:
        asked = read_prompts(source, 200, config.seed, config.chat_format == "moss", held_out=True)
    model = new_model(read_config(start), run)
    load_weights(model, start)
    # Before any forward: a sharded model gathers its weights in one, and those are not for the optimizer.
    optimizer = make_adamw(model, config.lr, config.weight_decay, betas=(0.9, 0.999))
    pairs = data.train + data.val
    key = {"model": weights_hash(start), "pairs": fingerprint(pairs), "precision": str(run.dtype)}
    reference = reference_logprobs(model, pairs, key, config, run)

    same = ("seed", "lr", "schedule", "steps", "batch_size", "loss", "beta", "nll_coef")
    identity = {"model": asdict(model.config), **key, **{name: getattr(config, name) for name in same}}
    packer = Packer([(list(range(len(data.train))), 1.0)], config.batch_size, config.seed)
    evaluation = partial(evaluate, model, data, asked, reference, config, run)
    watch = Watch(run, config, model, optimizer, identity, evaluation)
    for step in watch.steps():
        numbers = packer.step(step)
        batch = [pairs[number] for number in numbers]
        values = means(step_loss(model, batch, reference[numbers], config, run), run)
        values |= take_step(model, optimizer, watch.guard, config, step, values["loss"])
        watch.after_step(step, values, sum(len(pair.ids) for pair in batch))

    panels = (("loss", "val_loss"), ("accuracy", "val_accuracy", "val_right"), ("margin", "val_margin"))
    panels += (("chosen_drift", "rejected_drift"), ("grad_norm",))
    save = partial(save_pretrained, model, run.folder / "model", data.tokenizer)
    watch.conclude(save, {"pairs": data.counts, "reference": key}, panels)
    run.say(f"next: python chat.py --model {run.folder}/model")


if __name__ == "__main__":
    run_main(main)
