"""What the API is asked: the JSON body of a request, checked field by field.

Fields that would change an answer and that are not offered are refused by name, never passed over.
"""

import base64
import binascii
import json
import math
import secrets
from dataclasses import dataclass, field
from typing import Any

MAX_MESSAGES = 200  # of a conversation
MAX_PICTURES = 8  # in a conversation
# Parameters of OpenAI's API that are not offered, each with the value that changes nothing.
NEUTRAL = {
    "n": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logprobs": False,
    "tools": [],
    "logit_bias": {},
}
IGNORED = {"user", "store", "metadata"}  # about the request, not the answer


class Refused(Exception):
    """A request that is answered by a status and one line."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def check(condition: bool, reason: str) -> None:
    if not condition:
        raise Refused(400, reason)


@dataclass
class Turn:
    """A message by the user or the assistant."""

    role: str
    text: str = ""
    pictures: list[bytes] = field(default_factory=list)


@dataclass
class Ask:
    """A request for an answer."""

    model: str  # empty = the server's first
    system: str
    turns: list[Turn]
    enabled: list[str]  # tools, by the names of chat.py --tools
    stream: bool
    usage: bool  # a last event that counts tokens
    sampling: dict[str, Any]  # fields of Sampling that differ from the server's
    max_new_tokens: int
    seed: int


def read_ask(raw: bytes, longest: int) -> Ask:
    """The body of a request, answers being at most `longest` tokens. Refused (400) names what is wrong."""

    def refuse_constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        body = json.loads(raw, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {error}") from None
    check(isinstance(body, dict), "the body must be a JSON object")

    def take(name: str, kinds: tuple[type, ...], default: Any) -> Any:
        value = body.pop(name, None)
        if value is None:
            return default
        check(type(value) in kinds, f"{name} must be {' or '.join(kind.__name__ for kind in kinds)}")
        check(type(value) is not float or math.isfinite(value), f"{name} must be finite")
        return value

    sampling = {name: take(name, (int, float), None) for name in ("temperature", "top_p")}
    sampling = {name: value for name, value in sampling.items() if value is not None}
    stop = take("stop", (str, list), [])
    stop = [stop] if isinstance(stop, str) else stop
    short = all(isinstance(text, str) and 0 < len(text) <= 100 for text in stop)
    check(short and len(stop) <= 4, "stop: up to 4 strings of 1 to 100 characters")
    limit = take("max_tokens", (int,), longest)
    limit = take("max_completion_tokens", (int,), limit)
    check(limit >= 1, "max_tokens must be at least 1")
    seed = take("seed", (int,), secrets.randbelow(2**31))
    enabled = take("enabled_tools", (list,), [])
    check(all(isinstance(name, str) for name in enabled), "enabled_tools: a list of names")
    usage = take("stream_options", (dict,), {}).get("include_usage") is True
    model, streamed = take("model", (str,), ""), take("stream", (bool,), False)
    system, turns = read_turns(take("messages", (list,), []))
    for name, neutral in NEUTRAL.items():
        check(body.pop(name, None) in (None, neutral), f"{name}: only {neutral!r} is offered")
    for name in body.keys() - IGNORED:
        raise Refused(400, f"{name[:100]!r} is not offered")
    sampling["stop_strings"] = tuple(stop)
    return Ask(model, system, turns, enabled, streamed, usage, sampling, min(limit, longest), seed)


def read_turns(messages: list[Any]) -> tuple[str, list[Turn]]:
    """The system message's text, and the turns: user and assistant alternate, the user has the last."""
    check(0 < len(messages) <= MAX_MESSAGES, f"messages: 1 to {MAX_MESSAGES} are taken")
    turns = [read_turn(message, f"messages[{number}]") for number, message in enumerate(messages)]
    system = turns.pop(0).text if turns[0].role == "system" else ""
    alternate = ["user", "assistant"] * (len(turns) // 2) + ["user"]
    order = "messages: an optional system message, then user and assistant in turn, the user last"
    check([turn.role for turn in turns] == alternate, order)
    check(sum(len(turn.pictures) for turn in turns) <= MAX_PICTURES, f"at most {MAX_PICTURES} pictures")
    return system, turns


def read_turn(message: Any, where: str) -> Turn:
    """One message: its content is text, or a list of parts, of which a user's may be pictures."""
    check(isinstance(message, dict), f"{where} must be an object")
    turn, content = Turn(message.get("role")), message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    check(isinstance(parts, list) and all(isinstance(part, dict) for part in parts), f"{where}: no content")
    for part in parts:
        if part.get("type") == "image_url" and turn.role == "user":
            turn.pictures.append(read_picture(part.get("image_url"), where))
        else:
            text = part.get("text")
            check(part.get("type") == "text" and isinstance(text, str), f"{where}: text or image_url only")
            check(not any("\ud800" <= char <= "\udfff" for char in text), f"{where}: half a character")
            turn.text += text
    return turn


def read_picture(source: Any, where: str) -> bytes:
    """The file inside a data: URL. Nothing is fetched from anywhere."""
    url = source.get("url") if isinstance(source, dict) else None
    head, _, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    check(
        head.startswith("data:image/") and head.endswith(";base64"), f"{where}: pictures come as data: URLs"
    )
    try:
        return base64.b64decode(data, validate=True)
    except binascii.Error:
        raise Refused(400, f"{where}: the picture is not base64") from None
