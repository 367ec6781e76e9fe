"""Talk to a model: answers stream into the terminal, the conversation is kept as token ids.

    python chat.py                                        the model of the newest run, as a conversation
    python chat.py --model FOLDER_OR_HUB_ID --prompt "What is a prime?"     one answer
    python chat.py --model FOLDER_OR_HUB_ID --raw --prompt "Once upon a"    text continued, no chat format
    python chat.py --model FOLDER --quality best --contrast 0.5             with a model of quality tags

    python chat.py --model FOLDER --image cat.png --prompt "What is it?"    about pictures, with a model that
    sees python chat.py --model FOLDER --tools calculator,search                 with tools, for the moss
    format

A model of the moss format (sft.py) shows its thoughts in grey, its commands in yellow and what the tools gave
in magenta before it answers; pictures that it had drawn are saved. In a conversation: /reset forgets it,
/system TEXT starts another under this system message, /save FILE writes it down, /quit leaves. Ctrl-C stops
an answer.

What the model wrote is never tokenised again: its next prompt is the tokens it drew, followed by those of the
new message (MOSS's released demos decode and encode their history, which changes it).
"""

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jinja2
import jinja2.sandbox
import torch
from torch import Tensor

from core import tools
from core.checkpoint import load_pretrained, read_json, resolve_folder
from core.config import UsageError, UserError, parse, require, run_main
from core.decode import join_weights
from core.generate import Completion, Sampling, stream
from core.quantize import quantize
from core.vlm_checkpoint import load_vlm, load_vlm_tower
from data.chat import Rendered, after_commands, end_token, plain, render
from data.picture_batches import texts_in
from data.pictures import BadPicture, load_picture, prepare
from data.readers import Message
from data.replies import end_ids, read_commands, tools_on
from data.tokenizer import Tokenizer, load_tokenizer
from model import PATCH, Transformer, VisionTower


@dataclass(kw_only=True)
class Config:
    preset: str = "default"
    model: str = ""  # model folder or hub id; empty = that of the newest run in runs/
    prompt: str = ""  # answer this and exit; empty = a conversation
    raw: bool = False  # continue the prompt's text instead of answering it
    system: str = ""  # system message
    tools: tuple[str, ...] = ()  # calculator solver search picture, or all: switched on in the moss format
    documents: str = ""  # file or folder that the search tool looks in; empty = its own small collection
    image: tuple[str, ...] = ()  # pictures that the first message speaks of; /image FILE adds one later
    pictures: str = "pictures"  # folder for the pictures that the model has drawn
    max_new_tokens: int = 512  # longest answer
    temperature: float = 0.7  # 0 = always the most probable token
    top_p: float = 0.9  # sample from the most probable tokens that hold this much; 1 = all
    top_k: int = 0  # sample from this many most probable tokens; 0 = all
    min_p: float = 0.0  # sample from tokens at least this fraction as probable as the best; 0 = all
    repetition_penalty: float = 1.0  # lowers the logits of tokens seen before; 1 = none
    quality: Literal["", "best", "worst", "0", "1", "2", "3", "4"] = ""  # ask for answers of this level
    contrast: float = 0.0  # with --quality best: lead away from the worst, logits + this x (best - worst)
    seed: int = 0  # seeds the sampling
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto = cuda where there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto = bfloat16 on cuda, float32 on cpu
    quantize: Literal["none", "int8", "int4"] = "none"  # hold the weights in fewer bits


class Conversation:
    """Messages, and the same as token ids in the model's chat format."""

    def __init__(
        self, tokenizer: Tokenizer, system: str = "", eyes: "Eyes | None" = None, quality: str = ""
    ) -> None:
        self.tokenizer, self.eyes = tokenizer, eyes
        # What stands for an answer that is still to come, with the level of quality asked for (MOSS's tags).
        level = {"": None, "best": 4, "worst": 0}.get(quality, quality)
        self.asked: Message = {"role": "assistant"} | ({} if level is None else {"quality": level})
        self.features: Tensor | None = None  # [pictures, patches, dim] of all pictures so far
        self.new_pictures = 0  # of those that the next message will speak of
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self.ids: list[int] = []

    def look(self, path: str) -> None:
        """Open a picture for the next message. The encoders see it once, however long the conversation."""
        if self.eyes is None:
            raise UserError("this model does not see; vlm.py makes one that does")
        seen = self.eyes(path)
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


class Eyes:
    """Picture file -> what the vision tower says of it."""

    def __init__(self, tower: VisionTower, settings: dict[str, str]) -> None:
        self.tower, self.settings = tower, settings

    def __call__(self, path: str) -> Tensor:
        """[1, patches, dim]. Raises UserError for what is no picture."""
        try:
            means = tuple(config.mean for config in self.tower.configs)
            pixels = prepare(load_picture(Path(path)), self.tower.image_size, self.settings["resize"], means)
        except BadPicture as error:
            raise UserError(str(error)) from None
        return self.tower(pixels[None].to(next(self.tower.parameters()).device))


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

    def __init__(self, tokenizer: Tokenizer, system: str, config: Config, eyes: Eyes | None) -> None:
        enabled = tools.tool_names(config.tools)
        super().__init__(tokenizer, system or tools.meta_instruction(enabled), eyes, config.quality)
        self.config = config
        self.index = tools.load_index(config.documents) if "Search" in enabled else None

    def new_ids(self) -> list[int]:
        """The last message's tokens, up to where the model thinks or, with no tool on, answers."""
        self.turn = dict(self.asked)
        thinks = bool(tools_on(self.messages))
        whole = self.last_turn(thinks)
        pairs = zip(whole.ids, whole.turns, strict=True)
        return [token for token, turn in pairs if turn == 0 or not self.ids]

    def last_turn(self, thinks: bool) -> Rendered:
        """The meta-instruction and the last message, ready for the model's thoughts or for its answer."""
        talk = [self.messages[0], self.messages[-1]]
        if thinks:
            return render(talk, self.tokenizer, "moss", add_generation_prompt=True)
        return render([*talk, self.turn], self.tokenizer, "moss")

    def use_tools(self, model: Transformer, sampling: Sampling) -> None:
        """With tools on: have the model think and give commands, run them, show and append all of it."""
        enabled = tools_on(self.messages)
        if not enabled:
            return
        stop = replace(sampling, stop_ids=end_ids(self.tokenizer, "<eoc>", "<eom>"), contrast=0.0)
        config = self.config
        *_, (_, made) = stream(
            model, self.ids, self.tokenizer, stop, config.max_new_tokens, config.seed, self.features
        )
        written = read_commands(made.tokens, self.tokenizer)
        if written is None:  # not thoughts and commands: go on as if it had written None twice
            self.ids += self.last_turn(False).ids[len(self.last_turn(True).ids) :]
            return
        self.turn["thoughts"], self.turn["commands"] = written
        outcome = tools.run_commands(written[1], enabled, index=self.index)
        self.turn["results"] = outcome.text
        self.ids += made.tokens + after_commands(self.turn, self.messages[0]["content"], self.tokenizer)
        for colour, text in (("90", written[0]), ("33", written[1]), ("35", outcome.text)):
            if text != "None":
                print(f"\033[{colour}m{text}\033[0m" if "NO_COLOR" not in os.environ else text, flush=True)
        for picture in outcome.pictures:
            folder = Path(config.pictures)
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{len(list(folder.glob('*.png'))) + 1:03d}.png"
            picture.save(path)
            print(f"[picture saved: {path}]", flush=True)

    def add_answer(self, text: str, completion: Completion) -> None:
        """Append the answer and the newline that the format puts after it."""
        self.messages.append({**self.turn, "content": text.strip()})
        self.ids += completion.tokens
        (end,) = end_ids(self.tokenizer, "<eom>")
        self.ids += ([] if completion.tokens[-1:] == [end] else [end]) + self.tokenizer.encode("\n")


def open_conversation(
    tokenizer: Tokenizer, system: str, config: Config, eyes: Eyes | None = None
) -> Conversation:
    """In the format that the model's template names."""
    if tokenizer.chat_template and "<|MOSS|>" in tokenizer.chat_template:
        return MossConversation(tokenizer, system, config, eyes)
    require(not config.tools, "--tools: this model was not trained in the moss format, the one with tools")
    is_pure = eyes is not None and eyes.settings["chat_format"] == "pure"
    return (PureConversation if is_pure else Conversation)(tokenizer, system, eyes, config.quality)


def reply(
    conversation: Conversation, text: str, model: Transformer, sampling: Sampling, config: Config
) -> None:
    """One turn: the user's message, what tools give, the answer."""
    conversation.add_user(text)
    if isinstance(conversation, MossConversation):
        conversation.use_tools(model, sampling)
    tokenizer, avoided = conversation.tokenizer, conversation.avoided() if sampling.contrast else []
    written = answer(model, conversation.ids, tokenizer, sampling, config, conversation.features, avoided)
    conversation.add_answer(*written)


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


def newest_model() -> Path:
    """The model folder that the latest run left."""
    folders = sorted(Path("runs").glob("*/model/config.json"), key=lambda path: path.stat().st_mtime)
    if not folders:
        raise UsageError(
            "--model: no run has left a model in runs/; train one (python pretrain.py) or name a folder"
        )
    return folders[-1].parent


def folder_of(config: Config) -> Path:
    return resolve_folder(config.model) if config.model else newest_model()


def load_eyes(folder: Path, model: Transformer) -> Eyes | None:
    """What a model that sees looks with, on its device and in its type."""
    if not (folder / "vision").is_dir():
        return None
    tower, settings = load_vlm_tower(folder)
    example = next(model.projector.parameters())
    return Eyes(tower.to(example.device, example.dtype), settings)


def load(config: Config) -> tuple[Transformer, Tokenizer, Sampling]:
    """Model, tokenizer, and how to sample: until the tokens that the folder says end an answer."""
    require(
        config.device != "cuda" or torch.cuda.is_available(), "--device cuda: no CUDA device here; use cpu"
    )
    folder = folder_of(config)
    on_gpu = torch.cuda.is_available() and config.device != "cpu"
    dtype = (
        torch.bfloat16 if config.dtype == "bfloat16" or on_gpu and config.dtype == "auto" else torch.float32
    )
    tokenizer = load_tokenizer(folder)
    read = load_vlm if (folder / "vision").is_dir() else load_pretrained
    model = read(folder, dtype, "cuda" if on_gpu else "cpu")
    model = join_weights(model) if config.quantize == "none" else quantize(model, int(config.quantize[3:]))
    settings = (
        read_json(folder / "generation_config.json") if (folder / "generation_config.json").is_file() else {}
    )
    ends = settings.get("eos_token_id") or []
    stop_ids = {tokenizer.eos_id, *(ends if isinstance(ends, list) else [ends])}
    if "<eom>" in tokenizer.special_tokens:  # ends an answer in the moss format, and appears in no other
        stop_ids.add(tokenizer.special_tokens["<eom>"])
    sampling = Sampling(
        config.temperature,
        config.top_p,
        config.top_k,
        config.min_p,
        config.repetition_penalty,
        tuple(stop_ids),
        contrast=config.contrast,
    )
    return model, tokenizer, sampling


def answer(
    model: Transformer,
    ids: list[int],
    tokenizer: Tokenizer,
    sampling: Sampling,
    config: Config,
    features: Tensor | None = None,
    avoided: Sequence[int] = (),
) -> tuple[str, Completion]:
    """Print an answer as it comes. Ctrl-C ends it where it is."""
    text, completion = "", Completion()
    try:
        made = stream(model, ids, tokenizer, sampling, config.max_new_tokens, config.seed, features, avoided)
        for piece, so_far in made:
            text, completion = text + piece, so_far
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        completion.finish_reason = "stopped"
    print(flush=True)
    if completion.finish_reason in ("context", "stopped"):
        reason = {"context": "the model's context is full; /reset", "stopped": "stopped"}
        print(f"[{reason[completion.finish_reason]}]", file=sys.stderr)
    return text, completion


def converse(conversation: Conversation, model: Transformer, sampling: Sampling, config: Config) -> None:
    """The conversation in the terminal."""
    tokenizer, eyes = conversation.tokenizer, conversation.eyes
    print("/reset  /system TEXT  /image FILE  /save FILE  /quit; Ctrl-C stops an answer", file=sys.stderr)
    while True:
        try:
            words = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n(/quit leaves)", file=sys.stderr)
            continue
        command, _, argument = words.partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            conversation = open_conversation(tokenizer, config.system, config, eyes)
        elif command == "/system":
            config.system = argument
            conversation = open_conversation(tokenizer, argument, config, eyes)
        elif command == "/save":
            save(conversation.messages, argument)
        elif command == "/image":
            try:
                conversation.look(argument)
            except UserError as error:
                print(f"/image {error}", file=sys.stderr)
        elif command.startswith("/"):
            known = "/reset, /system TEXT, /image FILE, /save FILE or /quit"
            print(f"{command}: unknown; {known}", file=sys.stderr)
        elif words:
            try:
                reply(conversation, words, model, sampling, config)
            except UserError as error:
                conversation = open_conversation(tokenizer, config.system, config, eyes)
                print(f"{error} (the conversation starts anew)", file=sys.stderr)


def save(messages: list[Message], path: str) -> None:
    """Append the conversation to a JSONL file, which sft.py reads."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        print(f"added to {path}", file=sys.stderr)
    except OSError as error:
        print(f"/save {path!r}: {error.strerror}; give a file that can be written", file=sys.stderr)


def main() -> None:
    config = parse(Config, {"default": {}}, about=__doc__)
    require(not config.raw or bool(config.prompt), "--raw needs --prompt, the text to continue")
    require(config.quality == "best" or not config.contrast, "--contrast needs --quality best")
    model, tokenizer, sampling = load(config)
    if config.raw:
        print(config.prompt, end="")
        ids = ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(config.prompt)
        answer(model, ids, tokenizer, sampling, config)
        return
    eyes = load_eyes(folder_of(config), model)
    conversation = open_conversation(tokenizer, config.system, config, eyes)
    for path in config.image:
        conversation.look(path)
    if config.prompt:
        reply(conversation, config.prompt, model, sampling, config)
    else:
        converse(conversation, model, sampling, config)


if __name__ == "__main__":
    run_main(main)
