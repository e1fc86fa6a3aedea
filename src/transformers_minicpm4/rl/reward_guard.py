"""Reward functions that raise or hang: an error with a sentence on every process, not a run that stands still."""

from __future__ import annotations

import asyncio
import functools
import math
import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import nn
from transformers.utils import logging
from trl.trainer.utils import is_async_callable


logger = logging.get_logger(__name__)

LARGEST = torch.finfo(torch.float32).max


class RewardError(RuntimeError):
    """Rewards that training cannot go on with."""


class RewardTimeout(BaseException):
    """
    A reward function took longer than `reward_timeout`. Not an `Exception`: reward functions catch those, row by row,
    and would score on.
    """


@contextmanager
def deadline(seconds: float | None):
    """
    Raise `RewardTimeout` in the main thread after `seconds`, also out of a blocking call such as a socket's, and in
    any case at the end of what took longer.

    Two clocks send SIGALRM, again each second. The kernel's timer also reaches code that never lets another Python
    thread run (a regular expression that backtracks). A watching thread takes its place where the code inside has set
    that timer for itself and has a handler of its own for a while (math-verify does). Outside the main thread, and on
    systems without such signals, there is no limit.
    """
    main = threading.main_thread()
    unlimited = seconds is None or math.isinf(seconds)
    if unlimited or threading.current_thread() is not main or not hasattr(signal, "pthread_kill"):
        yield
        return
    seconds = min(seconds, 1e8)  # what clocks take; three years

    def late(number, frame):
        nonlocal raised
        now = time.monotonic()
        # Once a second, not once a clock: what cleans up after the first is not to be cut off by the second.
        if not over.is_set() and (raised is None or now - raised > 0.9):
            raised = now
            raise RewardTimeout

    def watch():
        wait = seconds
        while not over.wait(wait):
            signal.pthread_kill(main.ident, signal.SIGALRM)
            wait = 1.0

    over, raised = threading.Event(), None
    began = time.monotonic()
    before = signal.signal(signal.SIGALRM, late)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        try:
            yield
        finally:
            over.set()
        # Whoever caught the interruption has gone on with something made up.
        if raised or time.monotonic() - began > seconds:
            raise RewardTimeout
    except Exception:
        if raised:
            raise RewardTimeout from None
        raise
    finally:
        over.set()
        watcher.join()
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
        if timer[0]:
            # Somebody else's, around all this.
            signal.setitimer(signal.ITIMER_REAL, max(timer[0] - (time.monotonic() - began), 1e-3), timer[1])


class _Loop:
    """
    An event loop in a thread of its own for the rewards that are `async`. TRL's loop waits for it with a time limit,
    and goes on when a reward function blocks it.
    """

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, name="async rewards", daemon=True).start()

    async def run(self, coroutine, seconds: float | None):
        task = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self.loop))
        await asyncio.wait({task}, timeout=seconds)
        if not task.done():
            task.cancel()
            raise RewardTimeout
        if task.cancelled():
            raise RuntimeError("it was cancelled")  # by its own code: nobody here did
        return task.result()


_own_loop = functools.cache(_Loop)


def guarded(function: Callable, name: str, seconds: float | None, errors: list[str]) -> Callable:
    """
    `function`, but what it raises is logged with its traceback and noted in `errors`, and its rows get 0: all
    processes then reach the same collective call, and all can stop. Models are returned as they are.
    """
    if isinstance(function, nn.Module):
        return function

    def failed(error: BaseException, rows: int) -> list[float]:
        logger.error(f"reward function {name!r}", exc_info=error)
        if isinstance(error, RewardTimeout):
            other = ", or another async one kept their event loop busy" if is_async_callable(function) else ""
            errors.append(
                f"the reward function {name!r} did not return within reward_timeout={seconds} s for {rows} "
                f"completions{other}"
            )
        else:
            errors.append(f"the reward function {name!r} raised {type(error).__name__}: {error}")
        return [0.0] * rows

    def checked(rewards, rows: int) -> list[float | None]:
        values = [None if value is None else float(value) for value in rewards]
        if len(values) != rows:
            raise ValueError(f"{len(values)} rewards for {rows} completions; one for each is needed")
        if any(value is not None and abs(value) > LARGEST for value in values):
            raise ValueError("a reward that is infinite in float32; give a smaller one, or None for no reward")
        return values

    if is_async_callable(function):

        @functools.wraps(function)
        async def run(prompts, completions, **kwargs):
            try:
                coroutine = function(prompts=prompts, completions=completions, **kwargs)
                return checked(await _own_loop().run(coroutine, seconds), len(prompts))
            except (Exception, RewardTimeout) as error:
                if isinstance(error, RewardTimeout):
                    _own_loop.cache_clear()  # it may be blocked, and there may be another run in this process
                return failed(error, len(prompts))

        return run

    def run(prompts, completions, **kwargs):
        try:
            with deadline(seconds):
                rewards = function(prompts=prompts, completions=completions, **kwargs)
            return checked(rewards, len(prompts))
        except (Exception, RewardTimeout, asyncio.CancelledError) as error:
            return failed(error, len(prompts))

    return run
