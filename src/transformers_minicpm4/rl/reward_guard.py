"""Reward functions that raise or hang: an error with a sentence on every process, not a run that stands still."""

from __future__ import annotations

import asyncio
import functools
import signal
import threading
from collections.abc import Callable
from contextlib import contextmanager

from torch import nn
from transformers.utils import logging
from trl.trainer.utils import is_async_callable


logger = logging.get_logger(__name__)


class RewardError(RuntimeError):
    """Rewards that training cannot go on with."""


class RewardTimeout(Exception):
    """A reward function took longer than `reward_timeout`."""


@contextmanager
def deadline(seconds: float | None):
    """
    Raise `RewardTimeout` in the main thread after `seconds`, also out of a blocking call such as a socket's.

    A watcher sends SIGALRM, and again each second, for the code inside may have put a handler of its own in place for
    a while (math-verify does). Outside the main thread, and where threads cannot be sent signals, there is no limit.
    """
    main = threading.main_thread()
    if seconds is None or threading.current_thread() is not main or not hasattr(signal, "pthread_kill"):
        yield
        return

    def late(number, frame):
        if not over.is_set():
            raise RewardTimeout

    def watch():
        wait = seconds
        while not over.wait(wait):
            signal.pthread_kill(main.ident, signal.SIGALRM)
            wait = 1.0

    over = threading.Event()
    before = signal.signal(signal.SIGALRM, late)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        signal.signal(signal.SIGALRM, before)


def guarded(function: Callable, name: str, seconds: float | None, errors: list[str]) -> Callable:
    """
    `function`, but what it raises is logged with its traceback and noted in `errors`, and its rows get 0: all
    processes then reach the same collective call, and all can stop. Models are returned as they are.
    """
    if isinstance(function, nn.Module):
        return function

    def failed(error: Exception, rows: int) -> list[float]:
        logger.error(f"reward function {name!r}", exc_info=error)
        if isinstance(error, RewardTimeout | asyncio.TimeoutError):
            errors.append(
                f"the reward function {name!r} did not return within reward_timeout={seconds} s for {rows} completions"
            )
        else:
            errors.append(f"the reward function {name!r} raised {type(error).__name__}: {error}")
        return [0.0] * rows

    def checked(rewards, rows: int) -> list[float | None]:
        values = [None if value is None else float(value) for value in rewards]
        if len(values) != rows:
            raise ValueError(f"{len(values)} rewards for {rows} completions; one for each is needed")
        return values

    if is_async_callable(function):

        @functools.wraps(function)
        async def run(prompts, completions, **kwargs):
            try:
                rewards = await asyncio.wait_for(function(prompts=prompts, completions=completions, **kwargs), seconds)
                return checked(rewards, len(prompts))
            except Exception as error:
                return failed(error, len(prompts))

        return run

    def run(prompts, completions, **kwargs):
        try:
            with deadline(seconds):
                rewards = function(prompts=prompts, completions=completions, **kwargs)
            return checked(rewards, len(prompts))
        except Exception as error:
            return failed(error, len(prompts))

    return run
