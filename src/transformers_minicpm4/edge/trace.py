"""
What was called when, as a timeline that a browser draws (`chrome://tracing`, ui.perfetto.dev): Trace Event Format, one
complete event ("X") a span, times in microseconds from the start of the trace.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..quantization.export.checkpoint_files import new_file


class Trace:
    """Spans of one run. `lane` names a row of the picture; each thread has its own rows, so that spans nest."""

    def __init__(self):
        self._begin = time.perf_counter_ns()
        self._lanes: dict[tuple[str, int], int] = {}
        self._lock = threading.Lock()
        self.events: list[dict[str, Any]] = []

    @contextmanager
    def span(self, name: str, lane: str = "main", **arguments: Any) -> Iterator[dict[str, Any]]:
        """
        Time what happens inside. Yields the arguments that the viewer shows; more may be put in.

        A span that raises is kept, with the error's name among its arguments.
        """
        with self._lock:
            # From 1: a viewer takes thread 0 for the operating system's and renames it.
            number = self._lanes.setdefault((lane, threading.get_ident()), len(self._lanes) + 1)
        begin = time.perf_counter_ns()
        try:
            yield arguments
        except BaseException as error:
            arguments["error"] = type(error).__name__
            raise
        finally:
            end = time.perf_counter_ns()
            self.events.append(
                {
                    "name": name,
                    "cat": lane,
                    "ph": "X",
                    "ts": (begin - self._begin) / 1000,
                    "dur": (end - begin) / 1000,
                    "pid": os.getpid(),
                    "tid": number,
                    "args": arguments,
                }
            )

    def save(self, path: str | os.PathLike) -> None:
        """Write the timeline, in the order in which spans began: all of it, or nothing."""
        named = [
            {"name": "thread_name", "ph": "M", "pid": os.getpid(), "tid": number, "args": {"name": lane}}
            for (lane, _), number in self._lanes.items()
        ]
        events = sorted(self.events, key=lambda event: (event["ts"], -event["dur"]))
        text = json.dumps({"traceEvents": named + events, "displayTimeUnit": "ms"}, default=str, allow_nan=False)
        with new_file(path) as work:
            work.write_text(text + "\n", encoding="utf-8")


@contextmanager
def trace(path: str | os.PathLike) -> Iterator[Trace]:
    """A trace that is written when the block ends, also where it ends in an error."""
    running = Trace()
    try:
        yield running
    finally:
        running.save(path)


__all__ = ["Trace", "trace"]
