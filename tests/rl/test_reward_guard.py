"""Reward functions that hang, raise or answer with nonsense: real training runs must stop with a sentence."""

import asyncio
import contextlib
import math
import re
import signal
import time

import pytest

from arithmetic import make_trainer, share_of_digits
from transformers_minicpm4.rl.reward_guard import RewardError, RewardTimeout, deadline


def sleeps(completions, **kwargs):
    time.sleep(60)


def loops(completions, **kwargs):
    while True:
        pass


def backtracks(completions, **kwargs):
    """No other Python thread runs meanwhile: `re` keeps the interpreter's lock."""
    re.match(r"(a+)+$", "a" * 45 + "b")


def catches(completions, **kwargs):
    while True:
        with contextlib.suppress(Exception):
            time.sleep(0.05)


def falls_back(prompts, completions, **kwargs):
    """Every row has its own safety net, with which it would go on."""
    try:
        time.sleep(60)
    except BaseException:
        return share_of_digits(prompts, completions)


def has_an_alarm(completions, **kwargs):
    """As math-verify: the process's one alarm clock, and its handler, are taken over for a while."""
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.alarm(60)
    time.sleep(0.1)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    time.sleep(60)


async def waits(completions, **kwargs):
    await asyncio.sleep(60)


async def blocks(completions, **kwargs):
    time.sleep(20)


@pytest.mark.parametrize(
    "reward", [sleeps, loops, backtracks, catches, falls_back, has_an_alarm, waits, blocks], ids=lambda f: f.__name__
)
def test_a_reward_function_that_hangs_stops_the_run(reward, tmp_path):
    trainer = make_trainer(tmp_path, reward=reward, reward_timeout=0.3)
    before = signal.getsignal(signal.SIGALRM)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"did not return within reward_timeout=0.3 s"):
        trainer.train()
    assert time.monotonic() - began < 15
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert trainer.state.global_step == 0


def test_what_cleans_up_after_the_limit_is_not_cut_off():
    """Both clocks tell of the same second."""
    cleaned = []

    def sleep():
        try:
            time.sleep(60)
        finally:
            time.sleep(0.05)
            cleaned.append(True)

    for _ in range(5):
        with pytest.raises(RewardTimeout), deadline(0.1):
            sleep()
    assert len(cleaned) == 5


def test_a_limit_beyond_all_clocks_is_none():
    for seconds in (math.inf, 1e300):
        with deadline(seconds):
            pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def refused(completions, **kwargs):
    raise TimeoutError("connect timed out")


async def refused_later(completions, **kwargs):
    raise TimeoutError("connect timed out")


async def cancelled(completions, **kwargs):
    task = asyncio.ensure_future(asyncio.sleep(60))
    task.cancel()
    await task


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (refused, "'refused' raised TimeoutError: connect timed out"),
        (refused_later, "'refused_later' raised TimeoutError: connect timed out"),
        (cancelled, "'cancelled' raised RuntimeError: it was cancelled"),
    ],
    ids=["sync", "async", "cancelled"],
)
def test_what_a_reward_raises_is_not_taken_for_our_limit(reward, message, tmp_path):
    with pytest.raises(RewardError, match=message):
        make_trainer(tmp_path, reward=reward, reward_timeout=20).train()


def test_async_rewards_run_side_by_side_and_share_a_loop(tmp_path):
    """Two that wait for each other, for instance on one client: each alone would never return."""
    meeting = {}

    async def meet(mine, other):
        meeting[mine] = asyncio.get_running_loop().create_future()
        while other not in meeting:
            await asyncio.sleep(0.01)
        meeting[other].done() or meeting[other].set_result(None)
        await meeting[mine]

    async def first(prompts, completions, **kwargs):
        await meet("first", "second")
        return share_of_digits(prompts, completions)

    async def second(prompts, completions, **kwargs):
        await meet("second", "first")
        return share_of_digits(prompts, completions)

    trainer = make_trainer(tmp_path, reward=[first, second], reward_timeout=20, max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


def test_someone_elses_timer_goes_on_after_a_reward():
    calls = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: calls.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with deadline(5.0):
            time.sleep(0.1)
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] < 0.25
        time.sleep(0.4)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert calls == [signal.SIGALRM]


def test_a_reward_function_that_raises_stops_the_run_with_its_name(tmp_path):
    def broken(completions, **kwargs):
        raise ZeroDivisionError("no")

    with pytest.raises(RuntimeError, match="'broken' raised ZeroDivisionError: no"):
        make_trainer(tmp_path, reward=broken).train()


def test_an_infinite_reward_stops_the_run(tmp_path):
    for value in (math.inf, -1.7e308):  # the second in float32, in which TRL keeps rewards
        with pytest.raises(RuntimeError, match="infinite in float32"):
            make_trainer(tmp_path, reward=lambda prompts, **_: [value] + [0.0] * (len(prompts) - 1)).train()  # noqa: B023


def test_a_wrong_number_of_rewards_stops_the_run(tmp_path):
    with pytest.raises(RuntimeError, match="1 rewards for"):
        make_trainer(tmp_path, reward=lambda completions, **kwargs: [1.0]).train()
