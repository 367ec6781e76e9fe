"""A small model made on the spot and taught by demonstrations, for stages that were given none.

    loss = - sum_{t in M} log p(x_t | x_<t) / N,      M = tokens the assistant writes, its end token included

as in sft.py. What comes after fine-tuning improves a model that can already do a little; this makes one in
seconds from an endless stream of solved problems, each seen once, so that such a stage runs on a laptop by
itself. Teach too long and nothing is left to improve.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.checkpoint import save_pretrained
from core.config import RunConfig
from core.optimizer import make_adamw, set_learning_rate
from core.parallel import clip_grad_norm, new_model
from core.run import Run, due
from data.chat import ChatFormat, chat_template, render
from data.packing import Item, make_batch
from data.readers import Message
from data.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer
from model import Config as Shape

Talk = Callable[[int], list[Message]]  # number -> a conversation that ends in the assistant's answer


@dataclass(kw_only=True)
class Pupil(RunConfig):
    """Options of a stage that makes its own model where there is no --init_from."""

    chat_format: ChatFormat = "tulu"  # moss has a place for tool calls
    warm_steps: int = 0  # optimizer steps on demonstrations; 0 = --init_from must be given
    warm_batch: int = 64  # demonstrations in a step
    warm_lr: float = 3e-3  # falls linearly to 0
    layers: int = 3  # shape of the model made
    dim: int = 96
    heads: int = 4
    vocab_size: int = 330  # 256 bytes, the special tokens, some merges


def teach(folder: Path, talk: Talk, config: Pupil, run: Run) -> None:
    """Train a new model on talk(0), talk(1), ... and save it with its tokenizer. Every process must call."""
    tokenizer = make_tokenizer(talk, config)
    model = new_model(small_shape(config, tokenizer.vocab_size), run)
    model.init_weights(config.seed)
    optimizer = make_adamw(model, config.warm_lr, 0.0)
    rows = run.rows(config.warm_batch)
    for step in range(config.warm_steps):
        first = step * config.warm_batch
        rendered = [
            render(talk(first + row), tokenizer, config.chat_format) for row in range(rows.start, rows.stop)
        ]
        items = [Item(np.array(one.ids, np.int32), np.array(one.mask)) for one in rendered]
        width = max(len(item.ids) for item in items)
        batch = make_batch([[item] for item in items], width).to(run.device)
        loss, count = model.loss(batch.tokens, batch.targets)
        nats, counted = run.sum(loss.detach(), count)
        (loss / counted).backward()
        clip_grad_norm(model, config.grad_clip)
        set_learning_rate(optimizer, config.warm_lr * min((step + 1) / 20, 1 - step / config.warm_steps))
        optimizer.step()
        optimizer.zero_grad()
        if due(100, step + 1) or step + 1 == config.warm_steps:
            run.say(f"demonstrations: step {step + 1}/{config.warm_steps}, loss {nats / counted:.3f}")
    save_pretrained(model, folder, tokenizer)


def make_tokenizer(talk: Talk, config: Pupil) -> Tokenizer:
    """A small vocabulary, trained on what the first conversations look like with all their headers."""
    letters = train_tokenizer(["."], 256 + len(SPECIAL_TOKENS))
    texts = [letters.decode(render(talk(n), letters, config.chat_format).ids) for n in range(500)]
    tokenizer = train_tokenizer(texts, config.vocab_size)
    tokenizer.chat_template = chat_template(tokenizer, config.chat_format)
    return tokenizer


def small_shape(config: Pupil, vocab_size: int) -> Shape:
    return Shape(
        vocab_size=vocab_size,
        layers=config.layers,
        dim=config.dim,
        heads=config.heads,
        kv_heads=config.heads,
        head_dim=config.dim // config.heads,
        ffn_dim=8 * config.dim // 3,
        max_seq_len=max(256, config.seq_len),
        tied=True,
        init_std=config.dim**-0.5,  # at this width the usual 0.02 would learn nothing for long
    )
