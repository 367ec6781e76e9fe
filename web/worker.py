"""The thread that owns the models of the page's server: it gives every open answer one token in turn, so that
all move and none waits for another's end.
"""

import asyncio
import contextlib
import functools
import queue
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from core.config import UserError
from core.generate import Sampling
from data.sessions import Assistant, Event, respond
from web.asks import Ask


class Models:
    """The models at hand, by name; two are kept loaded."""

    def __init__(self, first: Path, load: Callable[[Path], Assistant]) -> None:
        self.first = first
        self.load = functools.lru_cache(maxsize=2)(lambda folder, changed: load(folder))

    def folders(self) -> dict[str, Path]:
        found = sorted(path.parent for path in Path("runs").glob("*/model/config.json"))
        others = [path for path in found if path.resolve() != self.first.resolve()]
        return {
            path.parent.name if path.name == "model" else path.name: path for path in [self.first, *others]
        }

    def get(self, name: str) -> Assistant:
        folder = self.folders()[name] if name else self.first
        return self.load(folder, (folder / "config.json").stat().st_mtime)


class Job:
    """An answer in the making: the worker tells events, a request hears them. None is the last."""

    def __init__(self, events: Iterator[Event]) -> None:
        self.events, self.loop = events, asyncio.get_running_loop()
        self.told: asyncio.Queue[Event | None] = asyncio.Queue()
        self.wanted = True  # False once nobody listens any more

    def tell(self, event: Event | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody is left to hear it
            self.loop.call_soon_threadsafe(self.told.put_nowait, event)

    def end(self, why: str, reason: str) -> None:
        self.tell((why, reason))
        self.tell(None)


class Worker(threading.Thread):
    """Gives every open answer an event in turn."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.new: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.jobs: deque[Job] = deque()
        self.stopping = False

    def run(self) -> None:
        while not self.stopping:
            while not (self.jobs and self.new.empty()):
                job = self.new.get()  # waits where there is nothing to do
                if job is None:
                    break
                self.jobs.append(job)
            if self.jobs:
                self.advance(self.jobs.popleft())
        while not self.new.empty():
            self.jobs.append(self.new.get())
        for job in filter(None, self.jobs):
            job.end("stopping", "the server is stopping")
            job.events.close()

    def advance(self, job: Job) -> None:
        """Tell a job's next event; the job then stands last in the row."""
        if not job.wanted:
            return
        try:
            job.tell(next(job.events))
            self.jobs.append(job)
        except StopIteration:
            job.tell(None)
        except UserError as error:
            job.end("refused", str(error))
        except Exception:  # one answer's fault must not end the thread that all of them need
            traceback.print_exc()
            job.end("failed", "the server failed; its terminal says how")

    def stop(self) -> None:
        self.stopping = True
        self.new.put(None)


def events_of(ask: Ask, models: Models, sampling: Sampling, documents: str) -> Iterator[Event]:
    """What the worker does for one request. The first event says how long the prompt is, and comes once the
    model has begun: what is wrong with a request is known before."""
    assistant = models.get(ask.model)
    sampling = replace(sampling, stop_ids=assistant.stop_ids, **ask.sampling)
    conversation = assistant.converse(ask.system, ask.enabled, documents)
    for turn in ask.turns:
        if turn.role == "assistant":
            conversation.quote(turn.text)
            continue
        for picture in turn.pictures:
            conversation.look(picture)
        conversation.add_user(turn.text)
    length = len(conversation.ids)
    events = respond(assistant.model, conversation, sampling, ask.max_new_tokens, ask.seed)
    first = next(events)
    yield "prompt", length
    yield first
    yield from events
