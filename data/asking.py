"""Putting questions to a model: one function for each way of asking.

Options are scored by log-likelihood, continuations written, conversations answered with tools, pictures
looked at. Each function gives, item by item, what the task's grade wants and what the record shows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from core import code_execution, tools
from core.checkpoint import load_pretrained
from core.config import UserError, require
from core.decode import pack_weights
from core.generate import generate
from core.likelihood import Request, make_request, rolling_requests, score
from data.conversations import documents
from data.pictures import BadPicture
from data.readers import Message
from data.replies import replies
from data.seeing import Seer
from data.task_rows import Item, Task, begins_with_bos
from data.tokenizer import Tokenizer, load_tokenizer
from model import Transformer


@dataclass(kw_only=True)
class Asking:
    """How questions are put, whatever they are: a part of eval.py's command line."""

    chat: bool = False  # put what is to be answered in writing as a user's message, in the model's format
    temperature: float = 0.0  # 0 = the most probable token
    bos: Literal["auto", "yes", "no"] = "auto"  # start token before texts; auto = as transformers would
    batch_tokens: int = 8192  # tokens in one forward
    seed: int = 0  # seeds made questions and sampling


@dataclass
class Pupil:
    """The model that is asked, and how its texts begin."""

    model: Transformer
    tokenizer: Tokenizer
    seer: Seer | None
    begin: list[int]  # the start token, where texts have one
    seen: dict[int, Tensor] = field(default_factory=dict)  # pictures by identity, as the encoders saw them

    @property
    def first(self) -> int:
        """What the first token of a text without a start is predicted from."""
        start = self.tokenizer.bos_id
        return self.tokenizer.eos_id if start is None else start

    @property
    def chat_format(self) -> str:
        template = self.tokenizer.chat_template
        moss = "<|MOSS|>" in template if template else "<eom>" in self.tokenizer.special_tokens
        return "moss" if moss else "tulu"

    @property
    def longest(self) -> int:
        return self.model.config.max_seq_len


def open_model(folder: Path, config: Asking, dtype: torch.dtype, device: torch.device) -> Pupil:
    """The model of a folder; one that sees comes with its eyes."""
    seer = Seer(folder, dtype, device) if (folder / "vision").is_dir() else None
    tokenizer = seer.tokenizer if seer else load_tokenizer(folder)
    model = seer.model if seer else load_pretrained(folder, dtype, device)
    begins = begins_with_bos(folder, tokenizer) if config.bos == "auto" else config.bos == "yes"
    require(not begins or tokenizer.bos_id is not None, "--bos yes: this tokenizer has no start token")
    return Pupil(pack_weights(model.eval()), tokenizer, seer, [tokenizer.bos_id] if begins else [])


Answers = list[tuple[Any, Any]]  # what `grade` is given, what the record shows


def ask_options(pupil: Pupil, items: list[Item], heads: list[str], task: Task, config: Asking) -> Answers:
    """log p of each option behind its prompt."""
    encode, known = pupil.tokenizer.encode, {}

    def request(context: str, option: str) -> Request:
        # Spaces at the end belong to the next word's token. The border is where the context's tokens end.
        context, option = context.rstrip(), context[len(context.rstrip()) :] + option
        if not context:
            return make_request(pupil.begin or [pupil.first], encode(option), pupil.longest)
        if context not in known:
            known[context] = len(encode(context))
        whole = encode(context + option)
        size = known[context]
        return make_request(pupil.begin + whole[:size], whole[size:], pupil.longest)

    asked = []
    for item, head in zip(items, heads, strict=True):
        known.clear()
        prompts = item.prompts or [item.prompt] * len(item.options)
        pairs = zip(prompts, item.options, strict=True)
        asked.append([request(head + prompt, f" {option}") for prompt, option in pairs])
    return [(found, found) for found in score(pupil.model, asked, config.batch_tokens)]


def ask_text(pupil: Pupil, items: list[Item], heads: list[str], task: Task, config: Asking) -> Answers:
    """log p of whole texts, and their number of tokens. A start token counts as one, as in lm-eval."""
    texts = [pupil.begin + ids for ids in pupil.tokenizer.encode_many([item.prompt for item in items])]
    windows = [rolling_requests(tokens, pupil.first, pupil.longest) for tokens in texts]
    found = iter(score(pupil.model, [[one] for each in windows for one in each], config.batch_tokens))
    sums = [sum(next(found)[0] for _ in each) for each in windows]
    return [((nats, len(tokens)), nats) for nats, tokens in zip(sums, texts, strict=True)]


def ask_writing(pupil: Pupil, items: list[Item], heads: list[str], task: Task, config: Asking) -> Answers:
    """What the model writes behind each prompt, up to a stop string."""
    if config.chat:
        asked = [
            [{"role": "user", "content": head + item.prompt}] for item, head in zip(items, heads, strict=True)
        ]
        return ask_messages(pupil, asked, task, config)
    made = [[cut(text, task.stop) for text in texts] for texts in write(pupil, items, heads, task, config)]
    return [(texts[0], texts[0]) for texts in made]


def ask_code(pupil: Pupil, items: list[Item], heads: list[str], task: Task, config: Asking) -> Answers:
    """Which of the programs that the model completes pass their tests."""
    require(code_execution.isolation() != "none", "programs cannot be confined on this machine: none is run")
    answers = []
    for item, texts in zip(items, write(pupil, items, heads, task, config), strict=True):
        texts = [cut(text, task.stop) for text in texts]
        answers.append(
            ([code_execution.passes(f"{item.prompt}{text}\n{item.answer}") for text in texts], texts)
        )
    return answers


def write(pupil: Pupil, items: list[Item], heads: list[str], task: Task, config: Asking) -> list[list[str]]:
    """Completions of the prompts as text. Of a prompt that is too long the end is kept."""
    tokenizer, room = pupil.tokenizer, pupil.longest - task.max_new_tokens
    require(
        room > 0, f"--max_new_tokens: {task.max_new_tokens} leave no room in a context of {pupil.longest}"
    )
    texts = [head + item.prompt for item, head in zip(items, heads, strict=True)]
    prompts = [(pupil.begin + ids)[-room:] for ids in tokenizer.encode_many(texts)]
    made = generate(
        pupil.model,
        prompts,
        task.max_new_tokens,
        task.samples,
        config.temperature,
        stop_ids=(tokenizer.eos_id,),
        seed=config.seed,
        stop_strings=task.stop,
        tokenizer=tokenizer,
    )
    special = set(tokenizer.special_tokens.values())
    return [[tokenizer.decode([t for t in one.tokens if t not in special]) for one in each] for each in made]


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def ask_talk(pupil: Pupil, items: list[Item], heads: list[str], task: Task, config: Asking) -> Answers:
    return ask_messages(pupil, [list(item.messages) for item in items], task, config)


def ask_messages(pupil: Pupil, asked: list[list[Message]], task: Task, config: Asking) -> Answers:
    """The next message of each conversation, its tools run for real."""
    index = tools.SearchIndex(documents())
    made = replies(
        pupil.model,
        pupil.tokenizer,
        asked,
        pupil.chat_format,
        index,
        max_new_tokens=task.max_new_tokens,
        temperature=config.temperature,
        seed=config.seed,
    )
    shown = [" | ".join(m[key] for key in ("commands", "results", "content") if key in m) for m in made]
    return [(message["content"], text) for message, text in zip(made, shown, strict=True)]


def look(pupil: Pupil, items: list[Item]) -> list[Tensor | None]:
    """What the encoders say of each item's pictures, [pictures, patches, dim]. Each is looked at once."""
    require(pupil.seer is not None, "this model does not see; vlm.py makes one that does")
    try:
        new = {id(one): one for item in items for one in item.pictures if id(one) not in pupil.seen}
        if new:
            pupil.seen.update(zip(new, pupil.seer.look(list(new.values())).split(1), strict=True))
    except BadPicture as error:
        raise UserError(str(error)) from None
    return [
        torch.cat([pupil.seen[id(p)] for p in item.pictures]) if item.pictures else None for item in items
    ]


def ask_look(pupil: Pupil, items: list[Item], heads: list[str], task: Task, config: Asking) -> Answers:
    """Answers to questions about pictures."""
    features = look(pupil, items)
    texts = pupil.seer.answer([item.prompt for item in items], features, task.max_new_tokens)
    return [(text, text) for text in texts]


def ask_look_options(
    pupil: Pupil, items: list[Item], heads: list[str], task: Task, config: Asking
) -> Answers:
    """log p of each option as an answer about the pictures."""
    features, asked = look(pupil, items), []
    for item in items:
        prompt = pupil.seer.prompt(item.prompt, len(item.pictures))
        ids = pupil.tokenizer.encode_many(list(item.options))
        asked.append([make_request(prompt, option, pupil.longest) for option in ids])
    return [(found, found) for found in score(pupil.model, asked, config.batch_tokens, features)]


ASK: dict[str, Callable[..., Answers]] = {
    "options": ask_options,
    "text": ask_text,
    "write": ask_writing,
    "code": ask_code,
    "talk": ask_talk,
    "look": ask_look,
    "look_options": ask_look_options,
}
