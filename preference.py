"""Stage 3b: MOSS's preference-aware training (DOI 10.1007/s11633-024-1502-8): a model of which answers are
better, and answers tagged by it.

    loss = - log sigmoid(s(chosen) - s(rejected)),     s(y) = v . h(end of y)

averaged over the pairs of the whole step (Bradley & Terry 1952; arXiv 2203.02155, eq. 1): h is the hidden
state at the answer's end token, v a new vector, the rest a fine-tuned model.

MOSS tags responses with their quality, trains on the tagged text, and asks for the best tag when it answers;
there is no reinforcement. The paper's abstract and summary say so much. Its preference model, data and the
details were not published: the head, the quantile bins by language and category, their number and where the
tag stands are ours. Rates follow MOSS-RLHF (arXiv 2307.04964), by some of the same authors.

    python preference.py                                          small models and pairs, made on the spot
    python preference.py --init_from MODEL --data pairs.jsonl     pairs: data/pairs.py, or a public file
    python preference.py --score pairs.jsonl --scorer PREFERENCE_MODEL --out runs/tagged
    python sft.py --init_from MODEL --data runs/tagged/tagged.jsonl --quality_tags
    python chat.py --quality best
"""

import json
import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method

from core.checkpoint import fill, gather, load_weights, read_config, resolve_folder, save_pretrained
from core.config import UserError, parse, require, run_main
from core.estimate import print_estimate
from core.optimizer import make_adamw, take_step
from core.parallel import materialize, parallelize
from core.run import Run
from core.watch import Watch
from data.judges import is_chinese
from data.packing import Packer
from data.pair_batches import (
    SMALL,
    PairBatch,
    PairConfig,
    PairItem,
    fingerprint,
    micro_batches,
    render_answer,
)
from data.pair_batches import convert as convert_pair
from data.pairs import start_and_pairs, weights_hash
from data.prompts import Prompt, convert
from data.readers import Message, records
from data.tokenizer import Tokenizer, load_tokenizer
from model import Config as Shape
from model import Transformer

HEAD = "value_head.safetensors"  # beside the weights in a preference model's folder
SMALL_GROUP = 20  # responses of a language and category; fewer are ranked with all of their language


@dataclass(kw_only=True)
class Config(PairConfig):
    shuffle_labels: bool = False  # control: half of the training pairs the wrong way round; nothing to learn
    score: str = ""  # instead of training: a file whose responses are to be scored and tagged
    scorer: str = ""  # the preference model that does it
    levels: int = 5  # tags, from <quality_0> the worst to <quality_4> the best

    def __post_init__(self) -> None:
        super().__post_init__()
        require(2 <= self.levels <= 5, f"--levels must be between 2 and 5, got {self.levels}")
        require(bool(self.score) == bool(self.scorer), "--score FILE and --scorer MODEL go together")


# fmt: off
PRESETS: dict[str, dict[str, Any]] = {
    # Ours, for one thread of a laptop.
    "tiny": dict(
        warm_steps=75, seq_len=64, batch_size=32, micro_batch_size=64, epochs=3, lr=1e-3, schedule="linear",
        weight_decay=0.01, val_fraction=0.15, log_every=20, eval_every=100, save_every=100,
    ),
    # Ours, for one GPU: a larger model on the same task.
    "small": dict(SMALL, epochs=3, lr=2e-4, weight_decay=0.01, eval_every=100, save_every=100),
    # MOSS published neither preference model nor data nor settings. The learning rate, the warm-up and the
    # single pass are those of MOSS-RLHF's reward models; the batch (theirs varied from 4 to 128), length and
    # weight decay are ours. Pairs: data/pairs.py with the SFT model and a judge.
    "moss-16b": dict(
        init_from="fnlp/moss-moon-003-sft", data=("pairs.jsonl",), chat_format="moss", seq_len=2048,
        batch_size=64, micro_batch_size=1, lr=5e-6, weight_decay=0.0, checkpointing="full", compile=True,
        eval_every=200, save_every=200,
    ),
}
# fmt: on


class PreferenceModel(Transformer):
    """A decoder that gives a number to an answer, where it ends. The head starts at 0: no opinion."""

    def __init__(self, config: Shape) -> None:
        super().__init__(config)
        self.value = nn.Linear(config.dim, 1, bias=False)

    def scores(self, micro: PairBatch) -> Tensor:
        """[pairs, 2] float64, chosen first."""
        rows, bounds = micro.batch, micro.bounds(self.config.sliding_window)
        hidden = self.hidden_states(rows.tokens, bounds, rows.positions)  # [n, T, dim]
        return self.value(hidden.flatten(0, 1)[micro.ends.flatten()]).double().view(-1, 2)


def load_model(folder: Path, run: Run) -> PreferenceModel:
    """A fine-tuned model with a new head, or a preference model, shared among the processes."""
    with torch.device("meta"):
        model = PreferenceModel(read_config(folder))
    materialize(parallelize(model, run), run)
    register_fsdp_forward_method(model, "scores")
    load_weights(model, folder)
    if not model.config.tied:
        model.head.requires_grad_(False)  # of no use here, and kept as it is
    with torch.no_grad():
        model.value.weight.zero_()
        if (folder / HEAD).exists():
            fill(model.value.weight, load_file(folder / HEAD)["weight"])
    return model


def save_model(model: PreferenceModel, folder: Path, tokenizer: Tokenizer, run: Run) -> None:
    """A model folder with the head beside the weights. Collective."""
    save_pretrained(model, folder, tokenizer)
    head = gather(model.value.weight, run.main)
    if head is not None:
        save_file({"weight": head}, folder / HEAD)


def preference_loss(scores: Tensor) -> Tensor:
    """scores [pairs, 2] -> the loss of each pair. (log(sigmoid(x) + 1e-5), MOSS-RLHF's, saturates.)"""
    return -F.logsigmoid(scores[:, 0] - scores[:, 1])


def step_loss(model: PreferenceModel, pairs: list[PairItem], config: Config, run: Run) -> Tensor:
    """Add the gradient of the mean loss of these pairs, this process's share; pairs, loss, right, margin."""
    total = torch.zeros(4, dtype=torch.double)
    for micro in micro_batches(pairs, config, run):
        scores = model.scores(micro)
        losses = preference_loss(scores)
        (losses.sum() / len(pairs)).backward()
        margin = (scores[:, 0] - scores[:, 1]).detach()
        right = (margin.sign() + 1) / 2  # a tie is half right
        counted = (torch.ones_like(margin), losses.detach(), right, margin)
        total += torch.stack([value.sum() for value in counted]).cpu()
    return total


@torch.no_grad()
def evaluate(model: PreferenceModel, pairs: list[PairItem], config: Config, run: Run) -> dict[str, float]:
    """Held-out pairs: loss, share ranked rightly, and how far scores follow length.

    val_longer_better is how often the longer answer is the better one: what a ruler would get.
    """
    total = torch.zeros(4 + 6, dtype=torch.double)
    for micro in micro_batches(pairs, config, run):
        scores, lengths = model.scores(micro).cpu(), micro.lengths.double().cpu()
        right, longer = (((x[:, 0] - x[:, 1]).sign() + 1) / 2 for x in (scores, lengths))
        sums = [torch.ones_like(right), preference_loss(scores), right, longer]
        x, y = scores.flatten(), lengths.flatten()
        sums += [torch.ones_like(x), x, y, x * x, y * y, x * y]
        total += torch.stack([value.sum() for value in sums])
    count, loss, right, longer, n, x, y, xx, yy, xy = run.sum(*total)
    spread = (n * xx - x * x) * (n * yy - y * y)
    values = {"loss": loss / count, "accuracy": right / count, "longer_better": longer / count}
    values["length_correlation"] = (n * xy - x * y) / math.sqrt(spread) if spread > 1e-9 else 0.0
    return {f"val_{name}": value for name, value in values.items()}


# Scoring and tagging


@dataclass
class Response:
    """An answer to a prompt, what the model thinks of it, and the tag that this makes."""

    prompt: Prompt
    reply: Message
    score: float = 0.0
    quality: int = 0

    @property
    def group(self) -> tuple[str, str]:
        return "zh" if is_chinese(str(self.prompt.messages[-1]["content"])) else "en", self.prompt.category


def read_responses(path: str) -> tuple[list[Response], Counter]:
    """All `responses` of a file of data/pairs.py, both sides of other pairs, or the last answers of
    conversations. Those that were cut off have no end to be scored at: counted and left out."""
    found, counts = [], Counter()
    for place, line in records(path):
        try:
            record = json.loads(line) if isinstance(line, str) else line
            if "responses" in record:
                prompt = convert(record)
                replies = [{"role": "assistant", **reply} for reply in record["responses"]]
            elif "rejected" in record:
                pair = convert_pair(record)
                prompt, replies = pair.prompt, [pair.chosen, pair.rejected]
            else:
                prompt, replies = convert(record), record["messages"][-1:]
            kept = [reply for reply in replies if reply.get("finish_reason", "stop") == "stop"]
            for reply in kept:
                require(isinstance(reply["content"], str) and reply["role"] == "assistant", "not an answer")
                extra = ("finish_reason", "score", "quality")
                clean = {key: value for key, value in reply.items() if key not in extra}
                found.append(Response(prompt, clean))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, UserError) as error:
            raise UserError(f"{place}: no response to score ({error}); mend the record") from None
        counts.update({"responses": len(kept), "cut off": len(replies) - len(kept)})
    require(len(found) > 1, f"{path}: fewer than two responses that came to their end")
    return found, counts


@torch.no_grad()
def score(
    model: PreferenceModel, responses: list[Response], tokenizer: Tokenizer, config: Config, run: Run
) -> int:
    """Write the score of each response, on every process; how many were too long and lost their beginning."""
    whole = [render_answer([*r.prompt.messages, r.reply], tokenizer, config.chat_format) for r in responses]
    sides = [replace(one, ids=one.ids[-config.seq_len :], mask=one.mask[-config.seq_len :]) for one in whole]
    # Two by two through the batches of pairs; an odd one out goes with itself.
    couples = [PairItem(sides[i], sides[min(i + 1, len(sides) - 1)]) for i in range(0, len(sides), 2)]
    found = torch.zeros(len(couples), 2, dtype=torch.double)
    for micro in micro_batches(couples, config, run):
        found[micro.numbers] = model.scores(micro).cpu()
    for response, value in zip(responses, run.sum(*found.flatten()[: len(responses)]), strict=True):
        response.score = value
    return sum(len(one.ids) > config.seq_len for one in whole)


def tag(responses: list[Response], levels: int) -> None:
    """Write each response's quality: its quantile among those of its language and category, 0 to 4.

    Easy categories would fill the upper bins otherwise, and one language's scores are not another's. Equal
    scores get equal tags. Fewer levels than five leave tags out in the middle.
    """
    sizes = Counter(response.group for response in responses)
    groups: dict[tuple[str, str], list[Response]] = {}
    for response in responses:
        language, category = response.group
        large = sizes[response.group] >= SMALL_GROUP
        groups.setdefault((language, category if large else "small categories"), []).append(response)
    for members in groups.values():
        scores = np.array([member.score for member in members])
        below = np.searchsorted(np.sort(scores), scores)
        above = np.searchsorted(np.sort(scores), scores, side="right")
        bins = ((below + above) / 2 / len(members) * levels).astype(int).clip(0, levels - 1)
        for member, number in zip(members, bins.tolist(), strict=True):
            member.quality = round(4 * number / (levels - 1))


def write_tagged(config: Config) -> None:
    """--score: tagged.jsonl, conversations for sft.py --quality_tags, and what the tags are like."""
    run = Run(config, "tagged")
    folder = resolve_folder(config.scorer)
    require((folder / HEAD).exists(), f"{folder}: no preference model (no {HEAD}); preference.py makes one")
    tokenizer, model = load_tokenizer(folder), load_model(folder, run)
    responses, counts = read_responses(config.score)
    counts["too long, scored without the beginning"] = score(model, responses, tokenizer, config, run)
    tag(responses, config.levels)
    found: dict[int, list[Response]] = {}
    for response in responses:
        found.setdefault(response.quality, []).append(response)
    tags = {}
    for quality, members in sorted(found.items()):
        known = [right for r in members if (right := r.prompt.check(r.reply["content"])) is not None]
        tags[f"<quality_{quality}>"] = {
            "responses": len(members),
            "score": sum(r.score for r in members) / len(members),
            "length": sum(len(r.reply["content"]) for r in members) / len(members),
            **({"right": sum(known) / len(known)} if known else {}),
        }
        figures = ", ".join(f"{name} {value:.3g}" for name, value in tags[f"<quality_{quality}>"].items())
        run.say(f"<quality_{quality}>: {figures}")
    if run.main:
        unfinished = run.folder / ".tagged.jsonl.partial"
        with open(unfinished, "w", encoding="utf-8") as file:
            for r in responses:
                line = {"messages": [*r.prompt.messages, {**r.reply, "quality": r.quality}], "score": r.score}
                file.write(json.dumps(line | {"category": r.prompt.category}, ensure_ascii=False) + "\n")
        unfinished.replace(run.folder / "tagged.jsonl")
    run.finish({"counts": dict(counts), "tags": tags}, ())
    run.say(f"next: python sft.py --init_from MODEL --data {run.folder}/tagged.jsonl --quality_tags")


def main() -> None:
    config = parse(Config, PRESETS, about=__doc__)
    if config.dry_run:
        return print_estimate(config, config.shape)
    if config.score:
        return write_tagged(config)

    run = Run(config, "preference")
    start, data, config = start_and_pairs(config, run)
    if config.shuffle_labels:
        for number in np.random.default_rng(config.seed).permutation(len(data.train))[::2]:
            pair = data.train[number]
            data.train[number] = PairItem(pair.rejected, pair.chosen)
    model = load_model(start, run)
    optimizer = make_adamw(model, config.lr, config.weight_decay, betas=(0.9, 0.999))
    identity: dict[str, Any] = {"model": weights_hash(start), "pairs": fingerprint(data.train)}
    for name in ("seed", "lr", "schedule", "steps", "batch_size"):
        identity[name] = getattr(config, name)
    packer = Packer([(data.train, 1.0)], config.batch_size, config.seed)
    watch = Watch(run, config, model, optimizer, identity, partial(evaluate, model, data.val, config, run))
    for step in watch.steps():
        pairs = packer.step(step)
        count, loss, right, margin = run.sum(*step_loss(model, pairs, config, run))
        values = take_step(model, optimizer, watch.guard, config, step, loss / count)
        values |= {"accuracy": right / count, "margin": margin / count}
        watch.after_step(step, values, sum(len(pair.ids) for pair in pairs))

    panels = (("loss", "val_loss"), ("accuracy", "val_accuracy"), ("margin",), ("grad_norm",))
    save = partial(save_model, model, run.folder / "model", data.tokenizer, run)
    watch.conclude(save, {"pairs": data.counts, "held out": len(data.val)}, panels)
    pairs_file = config.data[0] if config.data else f"{run.folder}/pairs.jsonl"
    run.say(f"next: python preference.py --score {pairs_file} --scorer {run.folder}/model --out runs/tagged")


if __name__ == "__main__":
    run_main(main)
