"""Files of conversations, in the schemas people publish -> lists of messages (described in data/chat.py).

    schema       a record has                                              for example
    messages     messages: role and content, text or typed parts           tulu-3-sft-mixture
    ShareGPT     conversations: from and value, function_call too          OpenThoughts-114k (default)
    Alpaca       instruction, output, perhaps input, system, history       alpaca
    MOSS         meta_instruction, chat: turn_N with five fields           moss-003-sft-data
    reasoning    problem, deepseek_reasoning, deepseek_solution            OpenThoughts-114k (metadata)
    generations  problem, generations, correctness_math_verify ...         OpenR1-Math-220k

Reasoning becomes one text, `<think>⏎{thoughts}⏎</think>⏎⏎{answer}`, whichever way its source marked it: the
reward of the reinforcement stage asks for exactly these two tags, and Moxin's own conversion was never
published.

A record that cannot be read is bad: it stops the reading with `file:line: what`, or with skip_bad it is
counted. A record that can be read but teaches something wrong is noisy: a command that does not parse, an
answer that cites a result it never got, a marker in the middle of a text. Noisy ones are reported and left
out unless keep_noisy.
"""

import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from core import tools
from core.config import UserError
from data.sources import hub_filesystem, optional

Message = dict[str, Any]

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "call",
    "tool": "result",
    "observation": "result",
}
SUFFIXES = (".jsonl", ".json", ".parquet", ".zip")
MOSS_FIELDS = {  # field: (header, terminator, name in our messages)
    "Human": ("<|Human|>:", "<eoh>", "content"),
    "Inner Thoughts": ("<|Inner Thoughts|>:", "<eot>", "thoughts"),
    "Commands": ("<|Commands|>:", "<eoc>", "commands"),
    "Tool Responses": ("<|Results|>:", "<eor>", "results"),
    "MOSS": ("<|MOSS|>:", "<eom>", "content"),
}
OPEN_THOUGHTS = re.compile(
    r"\s*<\|begin_of_thought\|>(.*?)<\|end_of_thought\|>\s*<\|begin_of_solution\|>(.*?)<\|end_of_solution\|>\s*",
    re.DOTALL,
)


@dataclass
class Reading:
    """What came out of a file, and what was remarked on the way."""

    conversations: list[list[Message]] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)  # read, bad, and one entry a kind of noise
    remarks: list[str] = field(default_factory=list)  # "file:line: what", one a bad or noisy record

    def summary(self, examples: int = 3) -> list[str]:
        """The counts on one line, then the first few remarks."""
        counted = ", ".join(f"{count} {what}" for what, count in self.counts.items())
        more = len(self.remarks) - examples
        return [counted, *self.remarks[:examples], *([f"... and {more} remarks more"] if more > 0 else [])]


def read_conversations(source: str | Path, skip_bad: bool = False, keep_noisy: bool = False) -> Reading:
    """All conversations of a file, a folder or a hub data set (`records` lists the kinds)."""
    reading = Reading()
    for place, record in records(str(source)):
        try:
            conversation = convert(json.loads(record) if isinstance(record, str) else record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"no field {error}" if isinstance(error, KeyError) else str(error)
            if not skip_bad:
                raise UserError(f"{place}: {what}; mend the record or pass --skip_bad") from None
            reading.counts["bad"] += 1
            reading.remarks.append(f"{place}: {what}")
            continue
        found = noise(conversation)
        reading.remarks += [f"{place}: {what}: {where}" for what, where in found]
        reading.counts.update(f"noisy ({what})" for what in sorted({what for what, where in found}))
        if keep_noisy or not found:
            reading.conversations.append(conversation)
            reading.counts["read"] += 1
    if not reading.conversations:
        raise UserError(f"{source}: no usable conversation in it ({reading.summary(1)})")
    return reading


def records(source: str) -> Iterator[tuple[str, Any]]:
    """(place, record) of a file, of a folder, or of hub/OWNER/NAME[/folder or glob], file after file by name.

    A record of a .jsonl file is still text, so that a bad line is one bad record.
    """
    try:
        if source.startswith("hub/"):
            _, owner, name, *rest = source.split("/")
            files: Any = hub_filesystem(f"{owner}/{name}")
            place = "/".join(("datasets", owner, name, *rest))
            found = files.glob(place) if "*" in place else files.find(place)
        else:
            files, path = LocalFiles(), Path(source)
            found = [str(p) for p in path.rglob("*") if p.is_file()] if path.is_dir() else [source]
        known = sorted(name for name in found if name.endswith(SUFFIXES))
        if not known:
            raise UserError(f"{source}: no {', '.join(SUFFIXES)} file there")
        for name in known:
            with files.open(name, "rb") as stream:
                yield from read_stream(stream, name)
    except FileNotFoundError:
        raise UserError(f"{source}: no such file or folder") from None
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error}") from None


class LocalFiles:
    """The one method of a file system that `records` needs, on this machine's disk."""

    open = staticmethod(open)


def read_stream(stream: IO[bytes], name: str) -> Iterator[tuple[str, Any]]:
    """(place, record) of one open file."""
    try:
        if name.endswith(".jsonl"):
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield f"{name}:{number}", line.decode("utf-8-sig")
        elif name.endswith(".json"):
            whole = json.loads(stream.read().decode("utf-8-sig"))
            each = whole if isinstance(whole, list) else [whole]
            yield from ((f"{name}:record {number}", record) for number, record in enumerate(each, 1))
        elif name.endswith(".zip"):
            with zipfile.ZipFile(stream) as archive:
                for member in sorted(m for m in archive.namelist() if m.endswith(SUFFIXES)):
                    with archive.open(member) as inside:
                        yield from read_stream(inside, f"{name}/{member}")
        else:
            table = optional("pyarrow.parquet", name).ParquetFile(stream)
            rows = (row for batch in table.iter_batches(1000) for row in batch.to_pylist())
            yield from ((f"{name}:row {number}", row) for number, row in enumerate(rows, 1))
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 ({error.reason}); convert it to UTF-8") from None
    except json.JSONDecodeError as error:
        what = "a record a line belongs in a .jsonl file"
        raise UserError(f"{name}:{error.lineno}: not JSON: {error.msg}; {what}") from None
    except zipfile.BadZipFile as error:
        raise UserError(f"{name}: {error}; fetch it again") from None


def convert(record: dict[str, Any]) -> list[Message]:
    """One record of any known schema -> messages. Raises ValueError or KeyError saying what is wrong."""
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, found {type(record).__name__}")
    if "chat" in record:
        messages = from_moss(record)
    elif "generations" in record:
        messages = from_generations(record)
    elif "deepseek_reasoning" in record:
        answer = think(record["deepseek_reasoning"], record["deepseek_solution"])
        messages = [{"role": "user", "content": record["problem"]}, {"role": "assistant", "content": answer}]
    elif "messages" in record or "conversations" in record:
        messages = from_messages(record)
    elif "instruction" in record:
        messages = from_alpaca(record)
    else:
        raise ValueError(f"no known schema of conversations has the fields {', '.join(record) or '(none)'}")
    check(messages)
    return messages


def check(messages: list[Message]) -> None:
    """System first if at all, then user and assistant in turn, all of them texts. Raises ValueError."""
    roles = [message["role"] for message in messages]
    roles = roles[roles[:1] == ["system"] :]
    if "assistant" not in roles:
        raise ValueError("no assistant message")
    for number, role in enumerate(roles):
        wanted = ("user", "assistant")[number % 2]
        if role != wanted:
            raise ValueError(f"message {number + 1} is the {role}'s, expected the {wanted}'s")
    for message in messages:
        if not isinstance(message["content"], str):
            raise ValueError(
                f"the {message['role']}'s content is {type(message['content']).__name__}, not text"
            )


# One function a schema


def from_messages(record: dict[str, Any]) -> list[Message]:
    """`messages` and ShareGPT. Tool calls and results are folded into the assistant message that answers."""
    events = [
        event for message in record.get("messages") or record["conversations"] for event in parts(message)
    ]
    system = [text for kind, text in events if kind == "system"] or [record.get("system") or ""]
    if any("begin_of_thought" in text for kind, text in events if kind == "assistant"):
        # OpenThoughts' system message asks for the markers that the conversion to <think> removes.
        system = [text for text in system if "begin_of_thought" not in text]
    if record.get("tools") and any(kind == "call" for kind, text in events):
        given = record["tools"]
        system.append(given if isinstance(given, str) else json.dumps(given, ensure_ascii=False))
    system_text = "\n".join(text for text in system if text)
    messages: list[Message] = [{"role": "system", "content": system_text}] if system_text else []
    pending: dict[str, Any] = {}
    for kind, text in events:
        if kind == "call":
            if "results" in pending:
                raise ValueError("more than one round of tool calls before an answer")
            pending["commands"] = ", ".join(filter(None, (pending.get("commands"), text)))
        elif kind == "result":
            pending["results"] = "\n".join(filter(None, (pending.get("results"), text)))
        elif kind in ("thoughts", "quality"):
            pending[kind] = text
        elif kind == "assistant":
            if "commands" not in pending and "thoughts" in pending:
                text = think(pending.pop("thoughts"), text)
            messages.append({"role": "assistant", **pending, "content": convert_thoughts(text)})
            pending = {}
        elif kind == "user":
            messages.append({"role": "user", "content": text})
    if pending:
        raise ValueError("ends in a tool call without an answer")
    return messages


def parts(message: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(kind, value) events of one message: system, user, assistant, call, result, thoughts, quality."""
    name = message.get("role") or message["from"]
    if name not in ROLES:
        raise ValueError(f"unknown role {name!r}")
    kind, content = ROLES[name], message["content"] if "content" in message else message["value"]
    for name, event in (
        ("thoughts", "thoughts"),
        ("commands", "call"),
        ("results", "result"),
        ("quality", "quality"),
    ):
        if message.get(name) is not None:
            yield event, message[name]
    for call in message.get("tool_calls") or []:
        yield "call", json.dumps(call["function"], ensure_ascii=False)
    if isinstance(content, list):
        for part in content:
            text = part.get("text") or part["value"]
            yield {"reasoning": "thoughts", "tool_call": "call", "text": kind}[part["type"]], text
    elif content is not None:
        yield kind, content


def from_alpaca(record: dict[str, Any]) -> list[Message]:
    pairs = [*(record.get("history") or []), (record["instruction"], record["output"])]
    messages: list[Message] = (
        [{"role": "system", "content": record["system"]}] if record.get("system") else []
    )
    for question, answer in pairs:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if record.get("input"):
        messages[-2]["content"] += "\n" + record["input"]
    return messages


def from_generations(record: dict[str, Any]) -> list[Message]:
    """OpenR1: the first generation that is finished and was verified."""
    flags = zip(
        record["generations"], record["is_reasoning_complete"], record["correctness_math_verify"], strict=True
    )
    good = [text for text, complete, correct in flags if complete and correct]
    if not good:
        raise ValueError("no generation is both finished and verified")
    thoughts, closed, answer = good[0].partition("</think>")
    if not closed:
        raise ValueError("the generation has no </think>")
    answer = think(thoughts.replace("<think>", "", 1), answer)
    return [{"role": "user", "content": record["problem"]}, {"role": "assistant", "content": answer}]


def convert_thoughts(text: str) -> str:
    """OpenThoughts' four markers -> the two tags; other texts unchanged. ValueError where one is unclosed."""
    if "<|begin_of_thought|>" not in text:
        return text
    match = OPEN_THOUGHTS.fullmatch(text)
    if not match:
        raise ValueError("a thought or solution is not closed: the trace was cut")
    return think(*match.groups())


def think(thoughts: str, answer: str) -> str:
    if "</think>" in thoughts or "</think>" in answer:
        raise ValueError("</think> in the middle of a thought or answer")
    return f"<think>\n{thoughts.strip()}\n</think>\n\n{answer.strip()}"


def from_moss(record: dict[str, Any]) -> list[Message]:
    """MOSS: every field is kept as it stands between its header and its terminator, `None` as absent."""
    chat = record["chat"]
    names = [f"turn_{number}" for number in range(1, len(chat) + 1)]
    if sorted(names) != sorted(chat) or record.get("num_turns", len(chat)) != len(chat):
        raise ValueError(f"num_turns is {record.get('num_turns')}, chat has {', '.join(chat)}")
    messages: list[Message] = [{"role": "system", "content": record["meta_instruction"]}]
    for name in names:
        reply: Message = {"role": "assistant"}
        for field_name, (header, end, ours) in MOSS_FIELDS.items():
            text = chat[name][field_name].rstrip("\n")
            if not text.startswith(header) or not text.endswith(end):
                raise ValueError(f"{name}: {field_name} is not between {header} and {end}")
            text = text[len(header) : -len(end)]
            text = text[1:-1] if text[:1] == "\n" == text[-1:] else text.removeprefix(" ")
            if field_name == "Human":
                messages.append({"role": "user", "content": text})
            elif ours == "content" or text != "None":
                reply[ours] = text
        messages.append(reply)
    return messages


def noise(messages: list[Message]) -> list[tuple[str, str]]:
    """(kind, where) of everything in a conversation that should not be learnt."""
    found = []
    for message in messages:
        commands = message.get("commands")
        if commands and tools.parse_commands(commands) is None:
            found.append(("malformed command", commands))
        text = message["content"]
        numbered = set(re.findall(r"<\|(\d+)\|>:", message.get("results") or ""))
        cited = set(re.findall(r"<\|(\d+)\|>", text)) if message["role"] == "assistant" else set()
        if cited - numbered:
            found.append(("citation of a missing result", ", ".join(sorted(cited - numbered))))
        if re.search(r"<eo[htcrm]>|<\|(Human|Inner Thoughts|Commands|Results|MOSS)\|>", text):
            found.append(("marker inside a text", text[:60]))
    return found
