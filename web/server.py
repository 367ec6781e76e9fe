"""A page to talk to the models in runs/, and behind it an API that OpenAI's clients speak (chat.py --web).

    GET  /                      the page: page.html, page.css, page.js
    GET  /v1/models             the models at hand; one is loaded when it is first asked for
    POST /v1/chat/completions   an answer, whole or, with "stream": true, as server-sent events

The page is a client of the API like any other. One asyncio loop holds the connections; the models belong to
the thread in web/worker.py.

It is made for one machine, not for a network: it listens on 127.0.0.1, answers to no other name (another
site's page could otherwise reach it under a name that points here), takes only JSON, and bounds size, number
and rate of requests. What people and models write stays text: the page shows it by textContent, and its
policy allows no script but page.js.
"""

import asyncio
import base64
import contextlib
import functools
import io
import json
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.config import UserError
from core.generate import Completion, Sampling
from core.tools import TOOLS
from data.sessions import Assistant, Event
from web.asks import Ask, Refused, read_ask
from web.worker import Job, Models, Worker, events_of

MAX_BODY = 8_000_000  # bytes of a request; pictures travel inside
BODY_SECONDS = 30  # to send it in
MAX_OPEN = 64  # answers at a time
BURST, PER_SECOND = 128, 4.0  # requests that may come at once, and how fast this refills
FAILURES = {"refused": 400, "failed": 500, "stopping": 503}  # the worker's last events -> status
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


class Bucket:
    """`burst` requests at once, then `per_second`."""

    def __init__(self, burst: int, per_second: float) -> None:
        self.burst, self.per_second = burst, per_second
        self.left, self.seen = float(burst), time.monotonic()

    def take(self) -> bool:
        """Whether one more may come now."""
        now = time.monotonic()
        self.left = min(self.burst, self.left + (now - self.seen) * self.per_second)
        self.seen = now
        if self.left < 1:
            return False
        self.left -= 1
        return True


async def read_body(request: Request) -> bytes:
    """The body, refused as soon as it is too long."""
    raw = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                raw += chunk
                if len(raw) > MAX_BODY:
                    raise Refused(413, f"a request may have {MAX_BODY:,} bytes")
    except TimeoutError:
        raise Refused(408, f"the request took more than {BODY_SECONDS} s to come") from None
    return bytes(raw)


@dataclass
class Answer:
    """Writes a job's events as the API does. What tools do comes in fields of our own: thoughts, commands,
    results, picture (a data: URL)."""

    model: str
    prompt_tokens: int
    job: Job

    def __post_init__(self) -> None:
        self.id, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())

    def envelope(self, kind: str, **content: Any) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, **content}

    def end(self, completion: Completion) -> tuple[str, dict[str, int]]:
        """Why it ended, and how many tokens it took."""
        made = len(completion.tokens)
        usage = {"prompt_tokens": self.prompt_tokens, "completion_tokens": made}
        reason = "stop" if completion.finish_reason == "stop" else "length"
        return reason, usage | {"total_tokens": self.prompt_tokens + made}

    async def events(self) -> AsyncIterator[Event]:
        while (event := await self.job.told.get()) is not None:
            yield event

    async def stream(self, usage: bool) -> AsyncIterator[str]:
        """Server-sent events."""

        def chunk(delta: dict[str, str], reason: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": reason}
            return sent(self.envelope("chat.completion.chunk", choices=[choice]))

        yield chunk({"role": "assistant", "content": ""})
        async for kind, value in self.events():
            if kind == "end":
                reason, counted = self.end(value)
                yield chunk({}, reason)
                if usage:
                    yield sent(self.envelope("chat.completion.chunk", choices=[], usage=counted))
            elif kind in FAILURES:
                yield sent(error_json(value))
            elif value:
                yield chunk({"content" if kind == "text" else kind: shown(kind, value)})
        yield "data: [DONE]\n\n"

    async def whole(self, request: Request) -> Response:
        """One JSON object."""
        message = {"role": "assistant", "content": ""}
        async for kind, value in self.events():
            if kind in FAILURES:
                return JSONResponse(error_json(value), FAILURES[kind])
            if kind == "end":
                reason, counted = self.end(value)
                choice = {"index": 0, "message": message, "finish_reason": reason}
                return JSONResponse(self.envelope("chat.completion", choices=[choice], usage=counted))
            name = "content" if kind == "text" else kind
            message[name] = message.get(name, "") + shown(kind, value)
            if await request.is_disconnected():
                break
        raise ClientDisconnect


def shown(kind: str, value: Any) -> str:
    """Text as it is, a picture as a data: URL."""
    if kind != "picture":
        return value
    file = io.BytesIO()
    value.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def sent(value: dict[str, Any]) -> str:
    """A server-sent event: JSON has no line breaks of its own."""
    return f"data: {json.dumps(value)}\n\n"


def error_json(reason: str) -> dict[str, Any]:
    return {"error": {"message": reason, "type": "invalid_request_error", "param": None, "code": None}}


class EventStream(StreamingResponse):
    """Calls `done` at its end, however it comes: the client may be gone before the first event."""

    def __init__(self, events: AsyncIterator[str], done: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.done = done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.done()


class Api:
    """The routes of the API, and what they share."""

    def __init__(self, models: Models, sampling: Sampling, max_new_tokens: int, documents: str = "") -> None:
        self.models, self.sampling, self.documents = models, sampling, documents
        self.max_new_tokens = max_new_tokens
        self.bucket, self.open, self.worker = Bucket(BURST, PER_SECOND), set[Job](), Worker()
        self.worker.start()

    async def list_models(self, request: Request) -> Response:
        """Beside what OpenAI says of models: whether one sees, and which tools it can be given."""
        data = []
        for name, folder in self.models.folders().items():
            settings = folder / "tokenizer_config.json"
            moss = settings.is_file() and "<|MOSS|>" in settings.read_text(encoding="utf-8")
            tools = [tool.flag for tool in TOOLS.values()] if moss else []
            more = {"sees": (folder / "vision").is_dir(), "tools": tools}
            data.append({"id": name, "object": "model", "created": 0, "owned_by": "nanoMoxin", **more})
        return JSONResponse({"object": "list", "data": data})

    async def complete(self, request: Request) -> Response:
        try:
            ask = await self.admit(request)
        except Refused as refused:
            more = {"retry-after": "1"} if refused.status == 429 else None
            return JSONResponse(error_json(str(refused)), refused.status, more)
        job = Job(events_of(ask, self.models, self.sampling, self.documents))
        self.open.add(job)
        self.worker.new.put(job)
        streams = False
        try:
            kind, value = await job.told.get()
            if kind in FAILURES:
                return JSONResponse(error_json(value), FAILURES[kind])
            answer = Answer(ask.model or next(iter(self.models.folders())), value, job)
            if not ask.stream:
                return await answer.whole(request)
            streams = True
            return EventStream(answer.stream(ask.usage), lambda: self.close(job))
        finally:
            if not streams:
                self.close(job)

    async def admit(self, request: Request) -> Ask:
        """The request, if it may come now and is well formed. Raises Refused."""
        if not self.bucket.take():
            raise Refused(429, "too many requests; wait a second")
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "send application/json")
        ask = read_ask(await read_body(request), self.max_new_tokens)
        if ask.model and ask.model not in self.models.folders():
            raise Refused(404, f"no model {ask.model[:100]!r}; GET /v1/models lists them")
        if len(self.open) >= MAX_OPEN:
            raise Refused(429, f"{MAX_OPEN} answers are being written; wait for one to end")
        if self.worker.stopping:
            raise Refused(503, "the server is stopping")
        return ask

    def close(self, job: Job) -> None:
        job.wanted = False
        self.open.discard(job)


class Guard:
    """Turns away requests under another name and from other sites; adds HEADERS to every answer."""

    def __init__(self, app: ASGIApp, port: int) -> None:
        self.app, self.hosts = app, {f"127.0.0.1:{port}", f"localhost:{port}"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        given = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = given.get("host"), given.get("origin")
        app = self.app
        if host not in self.hosts:
            app = JSONResponse(error_json("this server answers to 127.0.0.1 and localhost only"), 421)
        elif origin is not None and origin.removeprefix("http://") not in self.hosts:
            app = JSONResponse(error_json("requests from other sites are refused"), 403)
        with contextlib.suppress(ClientDisconnect):
            await app(scope, receive, send_guarded)


def make_app(api: Api, port: int) -> ASGIApp:
    """The whole application."""
    routes = [
        Route("/v1/models", api.list_models),
        Route("/v1/chat/completions", api.complete, methods=["POST"]),
    ]
    for path, file in {"/": "page.html", "/page.css": "page.css", "/page.js": "page.js"}.items():
        page = FileResponse(Path(__file__).parent / file)
        routes.append(Route(path, functools.partial(give, page)))
    return Guard(Starlette(routes=routes), port)


async def give(page: Response, request: Request) -> Response:
    return page


class Server(uvicorn.Server):
    """Ctrl-C and SIGTERM end the answers in the making, then the server."""

    def __init__(self, config: uvicorn.Config, worker: Worker) -> None:
        super().__init__(config)
        self.worker = worker

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle_exit)
        yield

    def handle_exit(self, number: int, frame: Any) -> None:
        self.worker.stop()
        super().handle_exit(number, frame)


def serve(
    first: Path,
    load: Callable[[Path], Assistant],
    sampling: Sampling,
    max_new_tokens: int = 512,
    documents: str = "",
    port: int = 8000,
) -> None:
    """Serve the model in `first` and those in runs/ until Ctrl-C. UserError if the port is taken."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        raise UserError(f"--port {port}: {error.strerror}; choose another") from None
    port = listener.getsockname()[1]
    api = Api(Models(first, load), sampling, max_new_tokens, documents)
    config = uvicorn.Config(
        make_app(api, port), http="h11", ws="none", lifespan="off", log_level="warning", server_header=False,
        timeout_graceful_shutdown=5,
    )  # fmt: skip
    print(f"http://127.0.0.1:{port}  (Ctrl-C ends it)", flush=True)
    Server(config, api.worker).run(sockets=[listener])
    api.worker.join(timeout=5)
