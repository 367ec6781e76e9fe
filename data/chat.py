"""Conversation -> token ids, loss mask, and which part each token belongs to.

The one renderer for every stage that sees conversations: fine-tuning, preferences, reinforcement, chat. A
conversation is a list of messages `{"role": "system" | "user" | "assistant", "content": text}`, system first
if at all, then user and assistant in turn. A user's content may also be a list of parts, {"type": "text",
"text": ...} and {"type": "image"}; the latter alone, rendered as `model.PATCH`, stands for a picture. An
assistant message may also carry `thoughts`, `commands` and `results` (MOSS's other fields; absent = None) and
`quality` (a level, rendered as the reserved token `<quality_k>`).

Two formats, ⏎ = newline:

tulu, as Moxin Instruct was trained (open-instruct's template; markers are plain text, no BOS, `</s>` is
control):

    <|system|>⏎{system}⏎<|user|>⏎{user}⏎<|assistant|>⏎{assistant}</s>⏎<|user|>⏎...

moss, as moss-moon-003 was trained (headers are plain text, `<eo?>` are control):

    {meta-instruction, ending in a newline}<|Human|>: {user}<eoh>⏎<|Inner Thoughts|>: {thoughts}<eot>⏎
    <|Commands|>: {commands}<eoc>⏎<|Results|>:⏎{results}⏎<eor>⏎<|MOSS|>: {assistant}<eom>⏎

Text between two control tokens is tokenised in one piece, as `transformers.apply_chat_template` does, and
`chat_template` writes the same format down as a Jinja template. Content can hold no control token and no
header: where it spells one, a space is put after its first character ("<|user|>" becomes "< |user|>").

    python data/chat.py FILE [--chat_format moss]          shows conversations, trained parts coloured
"""

import argparse
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":  # run as a file: import from the repository, not from data/
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from core import tools
from core.config import UserError, run_main
from data.readers import Message, read_conversations
from data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from model import PATCH

ChatFormat = Literal["tulu", "moss"]
TrainOn = Literal["assistant", "moss-official"]

HEADERS = {
    "tulu": ("<|system|>", "<|user|>", "<|assistant|>"),
    "moss": ("<|Human|>", "<|Inner Thoughts|>", "<|Commands|>", "<|Results|>", "<|MOSS|>"),
}
IMAGE_DONE = "Image generated successfully."  # the one result that MOSS's data keeps on the header's line
TOOLS_ON = "enabled. API:"  # appears in a meta-instruction exactly when some tool is switched on


@dataclass
class Piece:
    """A run of text, or the name of one control token."""

    text: str
    label: str  # system, user, thoughts, commands, results, answer, quality, header (scaffolding), end
    turn: int  # 0-based; -1 = before the first turn
    trained: bool = False
    control: bool = False


@dataclass
class Rendered:
    """One conversation as the model sees it; the four lists have one entry a token."""

    ids: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)  # True = the loss counts the prediction of this token
    labels: list[str] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)

    def add(self, ids: list[int], piece: Piece) -> None:
        self.ids += ids
        self.mask += [piece.trained] * len(ids)
        self.labels += [piece.label] * len(ids)
        self.turns += [piece.turn] * len(ids)


def render(
    messages: list[Message],
    tokenizer: Tokenizer,
    chat_format: ChatFormat = "tulu",
    train_on: TrainOn = "assistant",
    add_generation_prompt: bool = False,
) -> Rendered:
    """Ids, mask and labels of a conversation.

    train_on: `assistant` trains what the model itself writes when it answers (its thoughts, commands and
    answer, each with its end token), never what it is given; `moss-official` trains everything but the
    meta-instruction and the inside of Results, the user's words included, as the published MOSS code does.

    To be continued by a model, a conversation ends in a user message with `add_generation_prompt`, or in an
    assistant message without `content`, which is rendered up to its answer's header: that is how known tool
    results or a wanted `quality` are given.
    """
    if chat_format == "tulu":
        pieces = tulu_pieces(messages, end_token(tokenizer), add_generation_prompt)
    else:
        pieces = moss_pieces(messages, train_on == "moss-official", add_generation_prompt)
    return tokenize(pieces, tokenizer, chat_format)


def after_commands(turn: Message, meta: str, tokenizer: Tokenizer) -> list[int]:
    """What stands between the <eoc> that the model wrote and its answer: the turn's results, and its header.

    Appended to the tokens sampled so far, it continues a turn without tokenising the model's own words again.
    """
    return tokenize(results_pieces(turn, meta, 0, False), tokenizer, "moss").ids


def tokenize(pieces: list[Piece], tokenizer: Tokenizer, chat_format: ChatFormat) -> Rendered:
    """Pieces -> tokens, with what is not ours to trust made plain."""
    rendered, stretch = Rendered(), []
    markers = all_markers(tokenizer, chat_format)
    for piece in pieces:
        if piece.label in ("system", "user", "thoughts", "commands", "results", "answer"):
            piece.text = plain(piece.text, markers)
        if not piece.control:
            stretch.append(piece)
            continue
        add_stretch(rendered, stretch, tokenizer)
        stretch = []
        if piece.label == "image":
            rendered.add([PATCH], piece)
            continue
        if piece.text not in tokenizer.special_tokens:
            raise UserError(
                f"this tokenizer has no {piece.text} token, which the {chat_format} format needs here"
            )
        rendered.add([tokenizer.special_tokens[piece.text]], piece)
    add_stretch(rendered, stretch, tokenizer)
    return rendered


def tulu_pieces(messages: list[Message], end: str, add_generation_prompt: bool) -> list[Piece]:
    pieces: list[Piece] = []
    turn = -1
    for message in messages:
        role, header = message["role"], f"<|{message['role']}|>\n"
        if any(message.get(name) for name in ("thoughts", "commands", "results")):
            raise UserError("the tulu format has no place for thoughts or tool calls; use --chat_format moss")
        turn += role == "user"
        if pieces and pieces[-1].control:
            header = "\n" + header
        if role != "assistant":
            pieces += [
                Piece(header, "header", turn),
                *said_pieces(message["content"], role, turn),
                Piece("\n", "header", turn),
            ]
            continue
        pieces += quality_pieces(message, turn) + [Piece(header, "header", turn)]
        if "content" in message:
            pieces += [Piece(message["content"], "answer", turn, True), Piece(end, "end", turn, True, True)]
    if add_generation_prompt:
        pieces.append(Piece("<|assistant|>\n", "header", turn))
    return pieces


def moss_pieces(messages: list[Message], official: bool, add_generation_prompt: bool) -> list[Piece]:
    has_system = bool(messages) and messages[0]["role"] == "system"
    meta = messages[0]["content"] if has_system else tools.meta_instruction(())
    pieces = [Piece(meta if meta.endswith("\n") else meta + "\n", "system", -1)]
    turn = -1
    for message in messages[has_system:]:
        if message["role"] == "user":
            turn += 1
            pieces += [
                Piece("<|Human|>:", "header", turn, official),
                *said_pieces(message["content"], "user", turn, official, before=" "),
                Piece("<eoh>", "end", turn, official, True),
                Piece("\n<|Inner Thoughts|>:", "header", turn, official),
            ]
            continue
        pieces += [
            Piece(" " + (message.get("thoughts") or "None"), "thoughts", turn, True),
            Piece("<eot>", "end", turn, True, True),
            # The model writes on from its thoughts to its commands, so this header is its own.
            Piece("\n<|Commands|>:", "header", turn, True),
            Piece(" " + (message.get("commands") or "None"), "commands", turn, True),
            Piece("<eoc>", "end", turn, True, True),
            *results_pieces(message, meta, turn, official),
        ]
        if "content" in message:
            pieces += [
                Piece(" " + message["content"], "answer", turn, True),
                Piece("<eom>", "end", turn, True, True),
                Piece("\n", "header", turn, official),
            ]
    ends_in_user = messages[-1:] and messages[-1]["role"] == "user"
    if ends_in_user and not add_generation_prompt:
        pieces[-1].text = "\n"  # nobody is to answer: no header for the thoughts
    return pieces


def results_pieces(message: Message, meta: str, turn: int, official: bool) -> list[Piece]:
    """From behind the commands to the answer's header: given to the model by the program."""
    return [
        Piece("\n<|Results|>:", "header", turn, official),
        Piece(results_block(message.get("results") or "None", meta), "results", turn),
        Piece("<eor>", "end", turn, official, True),
        Piece("\n", "header", turn, official),
        *quality_pieces(message, turn),
        Piece("<|MOSS|>:", "header", turn, official),
    ]


def said_pieces(
    content: str | list[dict[str, str]], label: str, turn: int, trained: bool = False, before: str = ""
) -> list[Piece]:
    """Text, or parts: {"type": "image"} stands for a picture, {"type": "text", "text": ...} for words."""
    if isinstance(content, str):
        return [Piece(before + content, label, turn, trained)]
    pieces = [Piece(before, "header", turn, trained)]
    for part in content:
        if part["type"] == "image":
            pieces.append(Piece("<image>", "image", turn, control=True))
        else:
            pieces.append(Piece(part["text"], label, turn, trained))
    return pieces


def quality_pieces(message: Message, turn: int) -> list[Piece]:
    """The quality tag: given to the model, never learnt by it."""
    tagged = message.get("quality") is not None
    return [Piece(f"<quality_{message['quality']}>", "quality", turn, control=True)] if tagged else []


def results_block(results: str, meta: str) -> str:
    """Results on lines of their own with tools on; on the header's line without, and for a picture."""
    return f" {results}" if results == IMAGE_DONE or TOOLS_ON not in meta else f"\n{results}\n"


def plain(text: str, markers: tuple[str, ...]) -> str:
    """The text with every marker in it broken by a space, so that it reads the same and means nothing."""
    for marker in markers:
        text = text.replace(marker, marker[0] + " " + marker[1:])
    return text


def all_markers(tokenizer: Tokenizer, chat_format: ChatFormat) -> tuple[str, ...]:
    return HEADERS[chat_format] + tuple(tokenizer.special_tokens)


def end_token(tokenizer: Tokenizer) -> str:
    return next(name for name, number in tokenizer.special_tokens.items() if number == tokenizer.eos_id)


def add_stretch(rendered: Rendered, stretch: list[Piece], tokenizer: Tokenizer) -> None:
    """Tokenise adjoining texts in one go and share the tokens out; one across two texts goes to the earlier.

    Where a text ends is found by tokenising up to there: the tokens that agree with those of the whole.
    """
    if not stretch:
        return
    texts = [piece.text for piece in stretch]
    whole = tokenizer.encode("".join(texts))
    start = 0
    for number, piece in enumerate(stretch, 1):
        stop = len(whole)
        if number < len(stretch):
            prefix = tokenizer.encode("".join(texts[:number]))
            agree = next(
                (i for i, pair in enumerate(zip(prefix, whole, strict=False)) if pair[0] != pair[1]),
                len(prefix),
            )
            stop = max(start, agree + (agree < len(prefix)))
        rendered.add(whole[start:stop], piece)
        start = stop


TEMPLATE_START = r"""
{%- macro plain(text) -%}
  {%- set box = namespace(text=text) -%}
  {%- for marker in markers -%}
    {%- set box.text = box.text | replace(marker, marker[:1] ~ ' ' ~ marker[1:]) -%}
  {%- endfor -%}
  {{- box.text -}}
{%- endmacro -%}
{%- macro said(content) -%}
  {%- if content is string -%}
    {{- plain(content) -}}
  {%- else -%}
    {%- for part in content -%}
      {{- '<image>' if part.type == 'image' else plain(part.text) -}}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- macro tag(message) -%}
  {%- if message.quality is defined and message.quality is not none -%}
    {{- '<quality_' ~ message.quality ~ '>' -}}
  {%- endif -%}
{%- endmacro -%}
"""
TULU_TEMPLATE = r"""
{%- for message in messages -%}
  {%- if message.role == 'assistant' -%}
    {{- tag(message) ~ '<|assistant|>\n' -}}
    {%- if message.content is defined -%}
      {{- plain(message.content) ~ end -}}
      {%- if not loop.last -%}{{- '\n' -}}{%- endif -%}
    {%- endif -%}
  {%- else -%}
    {{- '<|' ~ message.role ~ '|>\n' ~ said(message.content) ~ '\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}
"""
MOSS_TEMPLATE = r"""
{%- set turns = messages -%}
{%- if messages and messages[0].role == 'system' -%}
  {%- set meta = messages[0].content -%}
  {%- set turns = messages[1:] -%}
{%- endif -%}
{{- plain(meta) -}}
{%- if meta[-1:] != '\n' -%}{{- '\n' -}}{%- endif -%}
{%- for message in turns -%}
  {%- if message.role == 'user' -%}
    {{- '<|Human|>: ' ~ said(message.content) ~ '<eoh>\n' -}}
    {%- if not loop.last or add_generation_prompt -%}{{- '<|Inner Thoughts|>:' -}}{%- endif -%}
  {%- else -%}
    {%- set results = message.results or 'None' -%}
    {{- ' ' ~ plain(message.thoughts or 'None') ~ '<eot>\n' -}}
    {{- '<|Commands|>: ' ~ plain(message.commands or 'None') ~ '<eoc>\n<|Results|>:' -}}
    {%- if results == image_done or tools_on not in meta -%}
      {{- ' ' ~ plain(results) -}}
    {%- else -%}
      {{- '\n' ~ plain(results) ~ '\n' -}}
    {%- endif -%}
    {{- '<eor>\n' ~ tag(message) ~ '<|MOSS|>:' -}}
    {%- if message.content is defined -%}{{- ' ' ~ plain(message.content) ~ '<eom>\n' -}}{%- endif -%}
  {%- endif -%}
{%- endfor -%}
"""


def chat_template(tokenizer: Tokenizer, chat_format: ChatFormat) -> str:
    """The format as a Jinja template for transformers, vLLM and others: same text, same neutralising."""
    names: dict[str, Any] = {"markers": all_markers(tokenizer, chat_format)}
    if chat_format == "tulu":
        names["end"] = end_token(tokenizer)
    else:
        names |= {"meta": tools.meta_instruction(()), "image_done": IMAGE_DONE, "tools_on": TOOLS_ON}
    settings = [
        f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} -%}}" for name, value in names.items()
    ]
    return "".join(settings) + TEMPLATE_START + {"tulu": TULU_TEMPLATE, "moss": MOSS_TEMPLATE}[chat_format]


# Fitting conversations into sequences


def fit(
    messages: list[Message],
    tokenizer: Tokenizer,
    max_len: int,
    too_long: Literal["drop", "truncate", "split"],
    chat_format: ChatFormat = "tulu",
    train_on: TrainOn = "assistant",
) -> tuple[list[Rendered], Counter]:
    """A conversation as sequences of at most max_len tokens, and counts of what was done to make it so.

    drop: a longer one is left out. truncate: whole turns are kept from the start while they fit, as MOSS's
    code does. split: it becomes several, each with the system message; a single turn that does not fit is
    left out.
    """
    whole = render(messages, tokenizer, chat_format, train_on)
    if len(whole.ids) <= max_len:
        return [whole], Counter(kept=1)
    if too_long == "drop":
        return [], Counter(dropped=1)
    lengths = Counter(whole.turns)
    groups: list[list[int]] = []
    room = 0
    for turn in range(max(lengths) + 1):
        if lengths[-1] + lengths[turn] > max_len:
            if too_long == "truncate":
                break
            room = 0  # the next turn starts a new sequence
            continue
        if lengths[turn] > room:
            if groups and too_long == "truncate":
                break
            groups.append([])
            room = max_len - lengths[-1]
        groups[-1].append(turn)
        room -= lengths[turn]
    counts = Counter(turns_dropped=max(lengths) + 1 - sum(len(group) for group in groups))
    counts["truncated" if too_long == "truncate" else "split"] += bool(groups)
    counts["dropped"] += not groups
    return [
        render(select_turns(messages, group), tokenizer, chat_format, train_on) for group in groups
    ], counts


def select_turns(messages: list[Message], wanted: list[int]) -> list[Message]:
    """The system message and the messages of the wanted turns."""
    chosen, turn = [], -1
    for message in messages:
        turn += message["role"] == "user"
        if turn == -1 or turn in wanted:
            chosen.append(message)
    return chosen


# Looking at what is trained

COLOURS = {"header": "90", "end": "90", "system": "37", "user": "36", "results": "35", "quality": "33"}
COLOURS |= {"thoughts": "0", "commands": "0", "answer": "0"}  # never untrained, whatever --train_on
TRAINED = "30;42"  # black on green, whatever the part


def show(rendered: Rendered, tokenizer: Tokenizer, colour: bool = True) -> str:
    """The conversation as text: trained parts on green, or between [[ and ]] where there is no colour."""
    pairs = zip(rendered.labels, rendered.mask, strict=True)
    codes = [TRAINED if trained else COLOURS[label] for label, trained in pairs]
    shown = []
    for code, run in groupby(range(len(codes)), key=codes.__getitem__):
        text = tokenizer.decode([rendered.ids[i] for i in run])
        if colour:
            # Line by line: a terminal fills the rest of a line that ends inside a coloured stretch.
            text = "\n".join(f"\033[{code}m{line}\033[0m" if line else "" for line in text.split("\n"))
        elif code == TRAINED:
            text = f"[[{text}]]"
        shown.append(text)
    return "".join(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description="Show conversations as a model is trained on them.")
    parser.add_argument("file", help="conversations: .jsonl, .json, or a folder of them")
    parser.add_argument("--chat_format", choices=["tulu", "moss"], default="tulu")
    parser.add_argument("--train_on", choices=["assistant", "moss-official"], default="assistant")
    parser.add_argument(
        "--tokenizer", default="", help="folder or file; empty = a small one trained on FILE itself"
    )
    parser.add_argument("--count", type=int, default=1, help="conversations to show")
    arguments = parser.parse_args()
    reading = read_conversations(arguments.file, skip_bad=True, keep_noisy=True)
    print("\n".join(reading.summary()))
    chosen = reading.conversations[: arguments.count]
    if arguments.tokenizer:
        tokenizer = load_tokenizer(arguments.tokenizer)
    else:
        tokenizer = train_tokenizer([message["content"] for talk in chosen for message in talk], 1000)
    for number, conversation in enumerate(chosen, 1):
        rendered = render(conversation, tokenizer, arguments.chat_format, arguments.train_on)
        print(f"\n--- {number}: {len(rendered.ids)} tokens, {sum(rendered.mask)} trained ---")
        print(show(rendered, tokenizer, colour="NO_COLOR" not in os.environ))


if __name__ == "__main__":
    run_main(main)
