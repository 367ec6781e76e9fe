"""Who says which of two answers is better. A judge is called with a prompt and two replies:

    judge(prompt, first, second) -> 1 the first | -1 the second | 0 neither | None it said nothing usable

    rule             what a program can verify: the known answer, the language, no repetition
    model:FOLDER     a chat model of ours, asked for a letter
    http://HOST/v1   an OpenAI-compatible endpoint, asked the same; its key is in NANOMOXIN_JUDGE_KEY

Judges favour the answer they read first (Zheng et al. 2023, arXiv 2306.05685, section 3.3), so each is asked
in both orders and only verdicts that agree count.
"""

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable

from core.checkpoint import load_pretrained
from core.config import UsageError, UserError
from data.prompts import Prompt
from data.readers import Message
from data.replies import replies
from data.tokenizer import load_tokenizer

Verdict = int | None
Judge = Callable[[Prompt, str, str], Verdict]

QUESTION = """Compare two answers to the last message of a conversation.

{conversation}

Answer A:
{first}

Answer B:
{second}

Which answer is more helpful, correct and harmless? Reply with one letter: A, B, or C if they are alike."""
KEY = "NANOMOXIN_JUDGE_KEY"
PASSING = (408, 409, 429, 500, 502, 503, 504)  # HTTP statuses that may be different in a while


def make_judge(name: str, model: str = "") -> Judge:
    """A judge by its name on the command line. `model` is what an endpoint is asked for."""
    if name == "rule":
        return RuleJudge()
    if name.startswith("model:"):
        return ModelJudge(name.removeprefix("model:"))
    if name.startswith(("http://", "https://")):
        return HttpJudge(name, model)
    raise UsageError(f"--judge {name!r}: expected rule, model:FOLDER or an http(s) address")


def in_both_orders(judge: Judge, prompt: Prompt, a: str, b: str) -> tuple[Verdict, list[Verdict]]:
    """The verdict about (a, b), 0 unless both orders agree, None where one was not usable; and what was said
    in each order."""
    said = [judge(prompt, a, b), judge(prompt, b, a)]
    if None in said:
        return None, said
    return (said[0] if said[0] == -said[1] else 0), said


class RuleJudge:
    """Compares scores: a right answer counts most, then the prompt's language and not repeating oneself.

    Where no right answer is known only the latter two are left, which tells little: use another judge.
    """

    def __call__(self, prompt: Prompt, first: str, second: str) -> Verdict:
        better = self.score(prompt, first) - self.score(prompt, second)
        return (better > 0) - (better < 0)

    def score(self, prompt: Prompt, reply: str) -> float:
        right = prompt.check(reply) or 0.0
        same_language = is_chinese(reply) == is_chinese(prompt.messages[-1]["content"])
        return 4 * right + same_language - (repetition(reply) > 0.5) + bool(reply.strip())


def is_chinese(text: str) -> bool:
    """Whether over a fifth of the letters are Chinese characters; Chinese says more with fewer letters."""
    letters = [c for c in text if c.isalpha()]
    return 5 * sum("\u4e00" <= c <= "\u9fff" for c in letters) > len(letters)


def repetition(text: str) -> float:
    """Share of runs of eight characters that stand in the text more than once; 0 for short texts."""
    runs = Counter(text[i : i + 8] for i in range(len(text) - 7))
    return sum(count for count in runs.values() if count > 1) / max(40, sum(runs.values()))


def read_verdict(said: str) -> Verdict:
    """'B', 'Answer A is better', '**C**.' ... as a verdict; None for anything that does not begin so."""
    match = re.match(r"\W*(?:answer\W+)?([ABC])(?:\W*$|[^\w\s]|\s+is\b)", said, re.I)
    return {"A": 1, "B": -1, "C": 0}[match[1].upper()] if match else None


def question(prompt: Prompt, first: str, second: str) -> list[Message]:
    talk = "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt.messages)
    return [{"role": "user", "content": QUESTION.format(conversation=talk, first=first, second=second)}]


class ModelJudge:
    """A model in a folder, asked greedily in its own chat format."""

    def __init__(self, folder: str) -> None:
        self.model, self.tokenizer = load_pretrained(folder), load_tokenizer(folder)
        self.format = chat_format_of(self.tokenizer.chat_template)

    def __call__(self, prompt: Prompt, first: str, second: str) -> Verdict:
        asked = question(prompt, first, second)
        options = dict(max_new_tokens=8, temperature=0.0)
        (reply,) = replies(self.model, self.tokenizer, [asked], self.format, **options)
        return read_verdict(reply["content"])


def chat_format_of(template: str | None) -> str:
    """The format that a model was trained in, by the chat template saved with it."""
    return "moss" if "<|MOSS|>" in (template or "") else "tulu"


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another place."""

    def redirect_request(self, *arguments: object) -> None:
        return None


class HttpJudge:
    """An OpenAI-compatible endpoint. What may pass is tried again; what will not ends the run in one line."""

    def __init__(
        self, url: str, model: str, timeout: float = 60.0, tries: int = 5, pause: float = 1.0
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.model, self.timeout, self.tries, self.pause = model, timeout, tries, pause
        self.opener = urllib.request.build_opener(NoRedirect)

    def __call__(self, prompt: Prompt, first: str, second: str) -> Verdict:
        asked = question(prompt, first, second)
        body = {"model": self.model, "messages": asked, "temperature": 0, "max_tokens": 8}
        try:
            said = json.loads(self.post(json.dumps(body).encode()))["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            return None
        return read_verdict(said) if isinstance(said, str) else None

    def post(self, body: bytes) -> bytes:
        """The endpoint's answer. Raises UserError, which never holds the key."""
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        for attempt in range(self.tries):
            try:
                request = urllib.request.Request(self.url, body, headers)
                with self.opener.open(request, timeout=self.timeout) as answer:
                    return answer.read(1 << 20)
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code}"
                if error.code not in PASSING:
                    remedy = f"; is {KEY} right?" if error.code in (401, 403) else "; is the address right?"
                    raise UserError(f"judge {self.url}: {reason}{remedy}") from None
            except (OSError, ValueError) as error:  # no connection, time out, not HTTP
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            if attempt + 1 < self.tries:
                time.sleep(self.pause * 2**attempt)
        raise UserError(
            f"judge {self.url}: {reason}, {self.tries} times; what is judged is kept, run again to go on"
        )
