"""What a model says next in a batch of conversations, with tools run between its commands and its answer.

The loop of a MOSS turn: the model writes thoughts and commands up to `<eoc>`; the program runs the commands
and appends their results; the model writes its answer up to `<eom>`. The tokens it sampled are kept as they
are, never decoded and tokenised again. Training, preferences and evaluation ask many conversations at once
through here; chat.py does the same one token at a time.
"""

from typing import Any

from core import tools
from core.generate import generate
from data.chat import ChatFormat, after_commands, render
from data.readers import Message
from data.tokenizer import Tokenizer
from model import Transformer


def replies(
    model: Transformer,
    tokenizer: Tokenizer,
    conversations: list[list[Message]],
    chat_format: ChatFormat,
    index: tools.SearchIndex | None = None,
    quality: int | None = None,
    max_new_tokens: int = 128,
    **sampling: Any,
) -> list[Message]:
    """The next message of each conversation, which ends in a user message.

    index: what the search tool looks in, where not in its own documents. quality: ask for this level.
    sampling: temperature and so on, as in core.generate. max_new_tokens bounds each of a turn's two parts.
    """
    turns: list[Message] = [{"role": "assistant"} for _ in conversations]
    if quality is not None:
        turns = [turn | {"quality": quality} for turn in turns]
    prompts = [
        render([*talk, turn], tokenizer, chat_format).ids
        for talk, turn in zip(conversations, turns, strict=True)
    ]
    options = {"max_new_tokens": max_new_tokens, "tokenizer": tokenizer, **sampling}
    if chat_format == "moss":
        on = [number for number, talk in enumerate(conversations) if tools_on(talk)]
        thinking = [render(conversations[n], tokenizer, "moss", add_generation_prompt=True).ids for n in on]
        made = generate(model, thinking, stop_ids=end_ids(tokenizer, "<eoc>", "<eom>"), **options)
        for number, prompt, (completion,) in zip(on, thinking, made, strict=True):
            written = read_commands(completion.tokens, tokenizer)
            if written is None:  # not the two fields: answer without tools
                continue
            turn, talk = turns[number], conversations[number]
            turn["thoughts"], turn["commands"] = written
            turn["results"] = tools.run_commands(turn["commands"], tools_on(talk), index=index).text
            after = after_commands(turn, talk[0]["content"], tokenizer)
            prompts[number] = prompt + completion.tokens + after
    stop = (tokenizer.eos_id,) if chat_format == "tulu" else end_ids(tokenizer, "<eom>")
    for turn, (completion,) in zip(turns, generate(model, prompts, stop_ids=stop, **options), strict=True):
        ended = completion.finish_reason == "stop"
        text = tokenizer.decode(completion.tokens[:-1] if ended else completion.tokens)
        turn["content"] = text.removeprefix(" ") if chat_format == "moss" else text
        turn["finish_reason"] = completion.finish_reason
    return turns


def tools_on(conversation: list[Message]) -> list[str]:
    """The tools that a conversation's meta-instruction switches on."""
    first = conversation[0]
    return [name for name in tools.TOOLS if first["role"] == "system" and f"API: {name}(" in first["content"]]


def read_commands(tokens: list[int], tokenizer: Tokenizer) -> tuple[str, str] | None:
    """(thoughts, commands) of what a model wrote behind the thoughts' header; None without that shape."""
    (thought_end, command_end) = end_ids(tokenizer, "<eot>", "<eoc>")
    if tokens.count(thought_end) != 1 or tokens[-1] != command_end:
        return None
    middle = tokens.index(thought_end)
    header, found, commands = tokenizer.decode(tokens[middle + 1 : -1]).partition("<|Commands|>:")
    if header != "\n" or not found:
        return None
    return tokenizer.decode(tokens[:middle]).strip(), commands.strip()


def end_ids(tokenizer: Tokenizer, *names: str) -> tuple[int, ...]:
    return tuple(tokenizer.special_tokens[name] for name in names)
