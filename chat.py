"""Talk to a model: answers stream into the terminal, the conversation is kept as token ids.

    python chat.py                                        the model of the newest run, as a conversation
    python chat.py --model FOLDER_OR_HUB_ID --prompt "What is a prime?"     one answer
    python chat.py --model FOLDER_OR_HUB_ID --raw --prompt "Once upon a"    text continued, no chat format
    python chat.py --model FOLDER --quality best --contrast 0.5             with a model of quality tags

    python chat.py --model FOLDER --image cat.png --prompt "What is it?"    with a model that sees
    python chat.py --model FOLDER --tools calculator,search                 with tools, for the moss format
    python chat.py --web                                  in a browser, all models in runs/ (web/server.py)

A model of the moss format (sft.py) shows its thoughts in grey, its commands in yellow and what the tools gave
in magenta before it answers; pictures that it had drawn are saved. In a conversation: /reset forgets it,
/system TEXT starts another under this system message, /save FILE writes it down, /quit leaves. Ctrl-C stops
an answer.
"""

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from core.checkpoint import resolve_folder
from core.config import UsageError, UserError, parse, require, run_main
from core.generate import Sampling, stream
from data.readers import Message
from data.sessions import Assistant, Conversation, Device, DType, Event, Quantize, load_assistant, respond

COLOURS = {"thoughts": 90, "commands": 33, "results": 35}  # ANSI: grey, yellow, magenta


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
    web: bool = False  # a page in the browser instead of the terminal, and the API behind it
    port: int = 8000  # of the page, on this machine only
    device: Device = "auto"  # auto = cuda where there is one
    dtype: DType = "auto"  # auto = bfloat16 on cuda, float32 on cpu
    quantize: Quantize = "none"  # hold the weights in fewer bits


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


def sampling_of(config: Config, stop_ids: tuple[int, ...] = ()) -> Sampling:
    return Sampling(
        config.temperature,
        config.top_p,
        config.top_k,
        config.min_p,
        config.repetition_penalty,
        stop_ids,
        contrast=config.contrast,
    )


def open_conversation(config: Config, assistant: Assistant) -> Conversation:
    return assistant.converse(config.system, config.tools, config.documents, config.quality)


def reply(conversation: Conversation, text: str, assistant: Assistant, config: Config) -> None:
    """One turn: the user's message, and what the model does then, as it comes. Ctrl-C ends it where it is."""
    conversation.add_user(text)
    sampling = sampling_of(config, assistant.stop_ids)
    events = respond(assistant.model, conversation, sampling, config.max_new_tokens, config.seed)
    try:
        show(events, config)
    except KeyboardInterrupt:  # caught between two events; in the midst of one, `respond` does
        show([events.throw(KeyboardInterrupt)], config)


def show(events: Iterable[Event], config: Config) -> None:
    """Print what a model does."""
    for kind, value in events:
        if kind == "text":
            print(value, end="", flush=True)
        elif kind == "picture":
            folder = Path(config.pictures)
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{len(list(folder.glob('*.png'))) + 1:03d}.png"
            value.save(path)
            print(f"[picture saved: {path}]", flush=True)
        elif kind in COLOURS:
            print(
                f"\033[{COLOURS[kind]}m{value}\033[0m" if "NO_COLOR" not in os.environ else value, flush=True
            )
        else:
            print(flush=True)
            reason = {"context": "the model's context is full; /reset", "stopped": "stopped"}
            if value.finish_reason in reason:
                print(f"[{reason[value.finish_reason]}]", file=sys.stderr)


def go_on(text: str, assistant: Assistant, config: Config) -> None:
    """--raw: the text, continued."""
    tokenizer = assistant.tokenizer
    ids = ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(text)
    print(text, end="", flush=True)
    try:
        sampling, limit = sampling_of(config, assistant.stop_ids), config.max_new_tokens
        for piece, _ in stream(assistant.model, ids, tokenizer, sampling, limit, config.seed):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print("\n[stopped]", end="", file=sys.stderr)
    print(flush=True)


def converse(conversation: Conversation, assistant: Assistant, config: Config) -> None:
    """The conversation in the terminal."""
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
            conversation = open_conversation(config, assistant)
        elif command == "/system":
            config.system = argument
            conversation = open_conversation(config, assistant)
        elif command == "/save":
            save(conversation.messages, argument)
        elif command == "/image":
            try:
                conversation.look(Path(argument))
            except UserError as error:
                print(f"/image {error}", file=sys.stderr)
        elif command.startswith("/"):
            known = "/reset, /system TEXT, /image FILE, /save FILE or /quit"
            print(f"{command}: unknown; {known}", file=sys.stderr)
        elif words:
            try:
                reply(conversation, words, assistant, config)
            except UserError as error:
                conversation = open_conversation(config, assistant)
                print(f"{error} (the conversation starts anew)", file=sys.stderr)


def save(messages: list[Message], path: str) -> None:
    """Append the conversation to a JSONL file, which sft.py reads."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
        print(f"added to {path}", file=sys.stderr)
    except OSError as error:
        print(f"/save {path!r}: {error.strerror}; give a file that can be written", file=sys.stderr)


def serve_page(config: Config) -> None:
    """--web."""
    try:
        from web.server import serve
    except ModuleNotFoundError as error:
        raise UserError(f"--web needs {error.name}: pip install -r requirements-web.txt") from None

    def load(folder: Path) -> Assistant:
        return load_assistant(folder, config.device, config.dtype, config.quantize)

    sampling = sampling_of(config)
    serve(folder_of(config), load, sampling, config.max_new_tokens, config.documents, config.port)


def main() -> None:
    config = parse(Config, {"default": {}}, about=__doc__)
    require(not config.raw or bool(config.prompt), "--raw needs --prompt, the text to continue")
    require(config.quality == "best" or not config.contrast, "--contrast needs --quality best")
    if config.web:
        require(not config.prompt, "--web: the prompt is written in the browser; leave out --prompt")
        serve_page(config)
        return
    assistant = load_assistant(folder_of(config), config.device, config.dtype, config.quantize)
    if config.raw:
        go_on(config.prompt, assistant, config)
        return
    conversation = open_conversation(config, assistant)
    for path in config.image:
        conversation.look(Path(path))
    if config.prompt:
        reply(conversation, config.prompt, assistant, config)
    else:
        converse(conversation, assistant, config)


if __name__ == "__main__":
    run_main(main)
