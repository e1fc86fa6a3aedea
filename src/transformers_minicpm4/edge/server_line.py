"""
The requests of the server: one thread answers them in the order in which they are ready, and a bounded number waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import StoppingCriteria

from .engine import EdgeEngine
from .server_schema import ApiError
from .server_text import AnswerReader


MAX_RETRY_SECONDS = 60


@dataclass(eq=False)
class Job:
    """A request that holds a slot, from its arrival until its answer is complete or its client has left."""

    loop: asyncio.AbstractEventLoop
    # Lists of deltas, then `Done`, an `ApiError`, or `None` once the client has left.
    events: asyncio.Queue = field(default_factory=asyncio.Queue)
    left: bool = False
    token_ids: list[int] = field(default_factory=list)
    options: dict = field(default_factory=dict)
    reader: AnswerReader | None = None

    def post(self, event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)


@dataclass
class Done:
    finish_reason: str
    usage: dict


class _Left(Exception):
    """The client is gone, or the server stops."""


class _StopWhenLeft(StoppingCriteria):
    def __init__(self, left: Callable[[], bool]):
        self.left = left

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), self.left(), dtype=torch.bool, device=input_ids.device)


class Line:
    """
    One thread that answers, and the requests that wait for it.

    Args:
        engine: nobody else may use it meanwhile.
        places: requests that may wait while one is answered.
    """

    def __init__(self, engine: EdgeEngine, places: int):
        self.engine, self.places = engine, places
        self._changed = threading.Condition()
        self._held: set[Job] = set()  # slots: being prepared, waiting or running
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._closed = False
        self._seconds = 1.0  # an answer takes, lately
        self._compiling = engine.compiles
        self._thread = threading.Thread(target=self._work, name="minicpm4-serve", daemon=True)
        engine.on_chunk = self._give_up_if_left

    def counts(self) -> dict[str, int]:
        with self._changed:
            running = int(self._running is not None)
            return {"running": running, "waiting": len(self._held) - running, "queue": self.places}

    def enter(self, loop: asyncio.AbstractEventLoop) -> Job:
        """
        Raises:
            ApiError: no place is free (429), or the server stops (503).
        """
        with self._changed:
            if self._closed:
                raise ApiError("the server is stopping.", status=503)
            if len(self._held) > self.places:
                seconds = max(1, min(MAX_RETRY_SECONDS, math.ceil(self._seconds)))
                raise ApiError(
                    f"{len(self._held)} requests are being answered or wait, which is this server's limit; try again.",
                    status=429,
                    code="queue_full",
                    headers={"Retry-After": str(seconds)},
                )
            job = Job(loop)
            self._held.add(job)
            return job

    def start(self, job: Job) -> None:
        with self._changed:
            if not job.left:
                self._waiting.append(job)
                self._changed.notify()

    def leave(self, job: Job) -> None:
        """Give the slot back; a running answer ends with the pass, or the chunk of its prompt, that is going on."""
        with self._changed:
            job.left = True
            if job is not self._running:
                self._held.discard(job)
                if job in self._waiting:
                    self._waiting.remove(job)

    def open(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """All requests end with an error."""
        with self._changed:
            self._closed = True
            for job in self._held:
                job.post(ApiError("the server is stopping.", status=503))
            self._waiting.clear()
            self._changed.notify()

    def join(self, seconds: float = 10) -> None:
        """Let the pass that is going on come to its end. A compiler can take minutes, so it is not waited for."""
        if self._thread.is_alive():
            self._thread.join(0 if self._compiling else seconds)

    @property
    def ended(self) -> bool:
        """Whether the thread computes no more. While it does, an exit of Python may abort."""
        return not self._thread.is_alive()

    def _gone(self) -> bool:
        return self._closed or (self._running is not None and self._running.left)

    def _give_up_if_left(self) -> None:
        if self._gone():
            raise _Left

    def _work(self) -> None:
        if self.engine.compiles:  # here and not in the first answer
            try:
                self.engine.generate([0], max_new_tokens=2)
            except _Left:
                return
            except Exception:
                traceback.print_exc()  # each request will say so, too
            self._compiling = False
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                job = self._running = self._waiting.popleft()
            begun = time.monotonic()
            try:
                last = self._answer(job)
                self._seconds = 0.7 * self._seconds + 0.3 * (time.monotonic() - begun)
            except _Left:
                last = None
            except ValueError as error:
                last = ApiError(" ".join(str(error).split()))
            except Exception as error:
                traceback.print_exc()
                last = ApiError(f"the answer failed: {type(error).__name__}.", status=500)
            with self._changed:  # before the client hears of the end, and asks again
                self._running = None
                self._held.discard(job)
            job.post(last)

    def _answer(self, job: Job) -> Done:
        reader, engine = job.reader, self.engine
        pieces = engine.stream(job.token_ids, stopping_criteria=[_StopWhenLeft(self._gone)], **job.options)
        report, read = engine.last, 0
        with contextlib.closing(pieces):
            for _ in pieces:
                new, read = report.token_ids[read:], len(report.token_ids)
                if deltas := reader.put(new):
                    job.post(deltas)
                if reader.stopped:
                    break
        if self._gone():
            raise _Left
        deltas = reader.put(report.token_ids[read:])
        if deltas := deltas + reader.end():
            job.post(deltas)
        reason = "stop" if reader.stopped else report.finish_reason
        usage = {
            "prompt_tokens": report.prompt_tokens,
            "completion_tokens": reader.tokens,
            "total_tokens": report.prompt_tokens + reader.tokens,
            "prompt_tokens_details": {"cached_tokens": report.reused_tokens},
        }
        return Done("tool_calls" if reader.calls and reason == "stop" else reason, usage)
