"""A model one can talk to, and the conversation with it, kept as token ids: what chat.py shows in a terminal
and web/server.py in a browser.

What the model wrote is never tokenised again: its next prompt is the tokens it drew, followed by those of the
new message (MOSS's released demos decode and encode their history, which changes it).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jinja2
import jinja2.sandbox
import torch
from torch import Tensor

from core import tools
from core.checkpoint import load_pretrained, read_json
from core.config import UserError, require
from core.decode import Memory, join_weights
from core.generate import Completion, Sampling, stream
from core.quantize import quantize as round_weights
from core.vlm_checkpoint import load_vlm, load_vlm_tower
from data.chat import Rendered, after_commands, end_token, plain, render
from data.picture_batches import texts_in
from data.pictures import BadPicture, Source, load_picture, prepare
from data.readers import Message
from data.replies import end_ids, read_commands, tools_on
from data.tokenizer import Tokenizer, load_tokenizer
from model import PATCH, Transformer, VisionTower

Device = Literal["auto", "cpu", "cuda"]
DType = Literal["auto", "float32", "bfloat16"]
Quantize = Literal["none", "int8", "int4"]
# ("thoughts" | "commands" | "results" | "text", what was written), ("picture", image), ("end", Completion)
Event = tuple[str, Any]


class Eyes:
    """Picture -> what the vision tower says of it."""

    def __init__(self, tower: VisionTower, settings: dict[str, str]) -> None:
        self.tower, self.settings = tower, settings

    @torch.no_grad()
    def __call__(self, picture: Source) -> Tensor:
        """[1, patches, dim]. Raises UserError for what is no picture."""
        try:
            means = tuple(config.mean for config in self.tower.configs)
            pixels = prepare(load_picture(picture), self.tower.image_size, self.settings["resize"], means)
        except BadPicture as error:
            raise UserError(str(error)) from None
        return self.tower(pixels[None].to(next(self.tower.parameters()).device))


@dataclass(frozen=True)
class Assistant:
    """What answers: a model, its tokenizer, its eyes where it sees, and the tokens that end an answer."""

    model: Transformer
    tokenizer: Tokenizer
    eyes: Eyes | None
    stop_ids: tuple[int, ...]

    def converse(
        self, system: str = "", enabled: Sequence[str] = (), documents: str = "", quality: str = ""
    ) -> "Conversation":
        """A conversation in the format that the model's template names. `enabled`: tools, as on chat.py's
        command line."""
        if self.tokenizer.chat_template and "<|MOSS|>" in self.tokenizer.chat_template:
            return MossConversation(self.tokenizer, system, self.eyes, quality, enabled, documents)
        require(not enabled, "--tools: this model was not trained in the moss format, the one with tools")
        is_pure = self.eyes is not None and self.eyes.settings["chat_format"] == "pure"
        return (PureConversation if is_pure else Conversation)(self.tokenizer, system, self.eyes, quality)


def load_assistant(
    folder: Path, device: Device = "auto", dtype: DType = "auto", quantize: Quantize = "none"
) -> Assistant:
    """Open a model folder. Answers end at the tokens that its files say end one."""
    require(device != "cuda" or torch.cuda.is_available(), "--device cuda: no CUDA device here; use cpu")
    on_gpu = torch.cuda.is_available() and device != "cpu"
    wide = torch.bfloat16 if dtype == "bfloat16" or on_gpu and dtype == "auto" else torch.float32
    tokenizer = load_tokenizer(folder)
    sees = (folder / "vision").is_dir()
    model = (load_vlm if sees else load_pretrained)(folder, wide, "cuda" if on_gpu else "cpu")
    model = join_weights(model) if quantize == "none" else round_weights(model, int(quantize[3:]))
    eyes = None
    if sees:
        tower, settings = load_vlm_tower(folder)
        example = next(model.projector.parameters())
        eyes = Eyes(tower.to(example.device, example.dtype), settings)
    file = folder / "generation_config.json"
    ends = (read_json(file) if file.is_file() else {}).get("eos_token_id") or []
    stop_ids = {tokenizer.eos_id, *(ends if isinstance(ends, list) else [ends])}
    if "<eom>" in tokenizer.special_tokens:  # ends an answer in the moss format, and appears in no other
        stop_ids.add(tokenizer.special_tokens["<eom>"])
    return Assistant(model, tokenizer, eyes, tuple(stop_ids))


class Conversation:
    """Messages, and the same as token ids in the model's chat format."""

    def __init__(
        self, tokenizer: Tokenizer, system: str = "", eyes: Eyes | None = None, quality: str = ""
    ) -> None:
        self.tokenizer, self.eyes = tokenizer, eyes
        # What stands for an answer that is still to come, with the level of quality asked for (MOSS's tags).
        level = {"": None, "best": 4, "worst": 0}.get(quality, quality)
        self.asked: Message = {"role": "assistant"} | ({} if level is None else {"quality": level})
        self.features: Tensor | None = None  # [pictures, patches, dim] of all pictures so far
        self.new_pictures = 0  # of those that the next message will speak of
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self.ids: list[int] = []
        self.memory = Memory()  # what the model has read of them

    def look(self, picture: Source) -> None:
        """Open a picture for the next message. The encoders see it once, however long the conversation."""
        if self.eyes is None:
            raise UserError("this model does not see; vlm.py makes one that does")
        seen = self.eyes(picture)
        self.features = seen if self.features is None else torch.cat((self.features, seen))
        self.new_pictures += 1

    def add_user(self, text: str) -> None:
        """Append a message, and what the format puts after it for the model to go on from."""
        pictures = [{"type": "image"}] * self.new_pictures
        content = [*pictures, {"type": "text", "text": text}] if pictures else text
        self.messages.append({"role": "user", "content": content})
        self.new_pictures = 0
        for token in self.new_ids():
            self.ids += [PATCH] * self.eyes.tower.tokens if token == PATCH else [token]

    def new_ids(self) -> list[int]:
        """Tokens of what the last message adds to the conversation."""
        template = self.tokenizer.chat_template
        if template is None or "<|user|>" in template:
            whole = render([*self.messages, self.asked], self.tokenizer, "tulu")
            last = max(whole.turns)
            pairs = zip(whole.ids, whole.turns, strict=True)
            return [token for token, turn in pairs if turn == last or not self.ids]
        require("quality" not in self.asked, "--quality: this model was not trained with tags of quality")
        return foreign_ids(self.messages, self.tokenizer, continued=bool(self.ids))

    def avoided(self) -> list[int]:
        """The conversation so far with the worst answers asked for where it asks for the best."""
        best, worst = (self.tokenizer.special_tokens.get(f"<quality_{level}>") for level in (4, 0))
        return [worst if token == best else token for token in self.ids]

    def add_answer(self, text: str, completion: Completion) -> None:
        """Append the model's answer; one that was cut off is ended as the format ends answers."""
        self.messages.append({"role": "assistant", "content": text})
        self.ids += completion.tokens
        if self.ids[-1] != self.tokenizer.eos_id:
            self.ids.append(self.tokenizer.eos_id)

    def quote(self, text: str) -> None:
        """Append an earlier answer of which only the text is left."""
        self.add_answer(text, Completion(self.tokenizer.encode(text)))


class PureConversation(Conversation):
    """Prismatic's plain format, in which Moxin-VLM was trained."""

    def new_ids(self) -> list[int]:
        begin = self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id
        message = self.messages[-1]
        pictures = [PATCH] * sum(
            part["type"] == "image" for part in message["content"] if isinstance(part, dict)
        )
        asked = self.tokenizer.encode(f"In: {' '.join(texts_in(message))}\nOut:")
        return ([] if self.ids else [begin]) + pictures + asked


class MossConversation(Conversation):
    """A conversation in the moss format, opened by a meta-instruction that says which tools are on."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        system: str,
        eyes: Eyes | None,
        quality: str,
        enabled: Sequence[str],
        documents: str,
    ) -> None:
        names = tools.tool_names(tuple(enabled))
        super().__init__(tokenizer, system or tools.meta_instruction(names), eyes, quality)
        self.index = tools.load_index(documents) if "Search" in names else None

    def new_ids(self) -> list[int]:
        """The last message's tokens, up to where the model thinks or, with no tool on, answers."""
        self.turn = dict(self.asked)
        self.thinking = bool(tools_on(self.messages))
        whole = self.last_turn(self.thinking)
        pairs = zip(whole.ids, whole.turns, strict=True)
        return [token for token, turn in pairs if turn == 0 or not self.ids]

    def last_turn(self, thinks: bool) -> Rendered:
        """The meta-instruction and the last message, ready for the model's thoughts or for its answer."""
        talk = [self.messages[0], self.messages[-1]]
        if thinks:
            return render(talk, self.tokenizer, "moss", add_generation_prompt=True)
        return render([*talk, self.turn], self.tokenizer, "moss")

    def use_tools(self, model: Transformer, sampling: Sampling, limit: int, seed: int) -> Iterator[Event]:
        """With tools on: have the model think and give commands, run them, tell and append all of it."""
        if not self.thinking:
            return
        stop = replace(sampling, stop_ids=end_ids(self.tokenizer, "<eoc>", "<eom>"), contrast=0.0)
        made = Completion()
        asked = self.ids, self.tokenizer, stop, limit, seed, self.features
        for _, made in stream(model, *asked, (), self.memory):  # noqa: B007
            yield "text", ""  # whoever shares the model with others may turn to them
        written = read_commands(made.tokens, self.tokenizer)
        if written is None:
            self.skip_thoughts()
            return
        self.turn["thoughts"], self.turn["commands"] = written
        outcome = tools.run_commands(written[1], tools_on(self.messages), index=self.index)
        self.turn["results"] = outcome.text
        self.ids += made.tokens + after_commands(self.turn, self.messages[0]["content"], self.tokenizer)
        self.thinking = False
        told = [(name, self.turn[name]) for name in ("thoughts", "commands", "results")]
        yield from [event for event in told if event[1] != "None"]
        yield from [("picture", picture) for picture in outcome.pictures]

    def skip_thoughts(self) -> None:
        """Go on to the answer as if the model had written None for its thoughts and its commands."""
        self.ids += self.last_turn(False).ids[len(self.last_turn(True).ids) :]
        self.thinking = False

    def add_answer(self, text: str, completion: Completion) -> None:
        """Append the answer and the newline that the format puts after it."""
        if self.thinking:
            self.skip_thoughts()
        self.messages.append({**self.turn, "content": text.strip()})
        self.ids += completion.tokens
        (end,) = end_ids(self.tokenizer, "<eom>")
        self.ids += ([] if completion.tokens[-1:] == [end] else [end]) + self.tokenizer.encode("\n")

    def quote(self, text: str) -> None:
        self.add_answer(text, Completion(self.tokenizer.encode(f" {text}")))


def respond(
    model: Transformer, conversation: Conversation, sampling: Sampling, max_new_tokens: int, seed: int
) -> Iterator[Event]:
    """The model's turn as it comes: what it does with tools, its answer piece by piece, the end.

    KeyboardInterrupt, here or thrown in, ends the answer where it is; the conversation can go on.
    """
    text, completion, tokenizer = "", Completion(), conversation.tokenizer
    try:
        if isinstance(conversation, MossConversation):
            yield from conversation.use_tools(model, sampling, max_new_tokens, seed)
        avoided = conversation.avoided() if sampling.contrast else []
        prompt, features = conversation.ids, conversation.features
        asked = prompt, tokenizer, sampling, max_new_tokens, seed, features, avoided
        made = stream(model, *asked, conversation.memory)
        for piece, so_far in made:
            text, completion = text + piece, so_far
            yield "text", piece
    except KeyboardInterrupt:
        completion.finish_reason = "stopped"
    conversation.add_answer(text, completion)
    yield "end", completion


def foreign_ids(messages: list[Message], tokenizer: Tokenizer, continued: bool) -> list[int]:
    """What the last message adds, by a Jinja template that is not ours (run in Jinja's sandbox, as
    transformers does): the text that the template makes of everything, less what it makes of everything
    before."""
    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    names = {token_id: name for name, token_id in tokenizer.special_tokens.items()}
    end, markers = end_token(tokenizer), tuple(tokenizer.special_tokens)
    clean = [{**message, "content": plain(message["content"], markers)} for message in messages]

    def written(part: list[Message], go_on: bool) -> str:
        def refuse(reason: str) -> None:
            raise jinja2.TemplateError(reason)

        try:
            return sandbox.from_string(tokenizer.chat_template).render(
                messages=part,
                add_generation_prompt=go_on,
                bos_token=names.get(tokenizer.bos_id, ""),
                eos_token=end,
                raise_exception=refuse,
            )
        except jinja2.TemplateError as error:
            raise UserError(f"the model's chat template cannot write this conversation: {error}") from None

    text, before = written(clean, True), ""
    if continued:
        before = written(clean[:-1], False)
        before = before[: before.rfind(end) + len(end)]  # the model stopped here; what follows is ours to add
    if not text.startswith(before):
        raise UserError(
            "the model's chat template rewrites earlier turns, which a token history cannot follow"
        )
    ids: list[int] = []
    for part in re.split("(" + "|".join(map(re.escape, markers)) + ")", text[len(before) :]):
        ids += (
            [tokenizer.special_tokens[part]] if part in tokenizer.special_tokens else tokenizer.encode(part)
        )
    return ids
