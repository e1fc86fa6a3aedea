"""Rewards against answers known otherwise; what never ends is ended; what cannot be scored is None."""

import itertools
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from transformers_minicpm4.rl import rewards, worker
from transformers_minicpm4.rl.rewards import (
    THINK_FORMAT,
    CodeReward,
    MathReward,
    WorkerFailed,
    code_reward,
    completion_text,
    extract_program,
    format_gate,
    math_reward,
    parse_tests,
)
from transformers_minicpm4.rl.sandbox import SandboxLimits


SLACK = 30  # seconds for a busy machine to start a process
NEVER = r"\boxed{9^{9^{9^{9^9}}}}"

needs_math_verify = pytest.mark.skipif(
    rewards.find_spec("math_verify") is None, reason="math-verify is not installed: pip install .[rl]"
)
needs_posix = pytest.mark.skipif(os.name != "posix", reason="the sandbox needs a POSIX system")


def as_chat(text):
    return [{"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def math():
    reward = MathReward(timeout=20, workers=1)
    yield reward
    reward.close()


# Gold, answer, and whether a teacher would call it right. None: there is nothing to compare with.
ANSWERS = [
    ("42", "the answer is 42", 1),
    ("42", "The answer is 43.", 0),
    ("42", "I see no numbers", 0),
    (42, "42", 1),
    ("-3", r"\boxed{-3}", 1),
    ("3", r"\boxed{-3}", 0),
    ("1,234", "It costs 1234 yuan", 1),
    (r"\frac{1}{2}", r"\boxed{0.5}", 1),
    (r"\frac12", "so we get 1/2", 1),
    (r"$\frac{1}{2}$", r"\boxed{\frac{2}{4}}", 1),
    ("1/3", r"\boxed{0.3}", 0),
    (0.5, "1/2", 1),
    (r"1\frac{1}{2}", r"\boxed{1.5}", 1),
    ("50%", r"\boxed{50\%}", 1),
    (r"50\%", r"\boxed{\frac{1}{2}}", 1),
    (r"50\%", r"\boxed{5\%}", 0),
    (r"\{1, 2\}", r"\boxed{\{2, 1\}}", 1),
    (r"\{1, 2\}", r"\boxed{\{1, 3\}}", 0),
    (r"\{1, 2\}", r"\boxed{1}", 0),
    ("(1, 2)", r"\boxed{(1, 2)}", 1),
    ("(1, 2)", r"\boxed{[1, 2]}", 0),
    # A bare gold is read whole: its leading number alone would be 10, and 2.
    ("10^{5}", "100000", 1),
    ("10^{5}", "10", 0),
    (r"2\sqrt{3}", r"$\sqrt{12}$", 1),
    (r"2\sqrt{3}", "2", 0),
    ("1e5", "100000", 1),
    ("x^2 + 2x + 1", r"\boxed{(x+1)^2}", 1),
    ("x=3", r"\boxed{3}", 1),
    (r"\pi", r"\boxed{3.14}", 0),
    ("She has 3 + 39 of them.\n#### 42", "42", 1),
    (r"Long solution with 7, hence \boxed{42}.", "42", 1),
    ("C", r"\boxed{C}", 1),
    # Guesses side by side are a set, and what is boxed is what is answered.
    ("42", r"\boxed{41} or \boxed{42}", 0),
    ("42", r"42, that is \boxed{\text{unknown}}", 0),
    ("42", r"<think>it is \boxed{42}</think> I say \boxed{41}", 0),
    ("42", r"<think>is it \boxed{41}?</think> \boxed{42}", 1),
    ("42", r"\boxed{42", 0),
    ("no solution", "42", None),
    ("", "42", None),
    (None, "42", None),
]


@needs_math_verify
@pytest.mark.parametrize("form", [str, as_chat])
def test_answers_a_teacher_would_mark_the_same(math, form):
    given = math(completions=[form(answer) for _, answer, _ in ANSWERS], solution=[gold for gold, _, _ in ANSWERS])
    wrong = [(row, got) for row, got in zip(ANSWERS, given) if got != row[2]]
    assert not wrong
    assert all(value is None or isinstance(value, float) for value in given)


@needs_math_verify
def test_trl_marks_its_own_rows_the_same(math):
    """TRL's accuracy_reward, where its rules and ours agree: boxed answers, gold that its parser takes whole."""
    from trl.rewards import accuracy_reward

    golds = [r"\frac{1}{3}", "$x+1$", "7", "7", r"\boxed{\sqrt{2}}", "nothing"]
    answers = [r"\boxed{\frac{2}{6}}", r"\boxed{1+x}", r"\boxed{7}", r"\boxed{8}", r"\boxed{2^{0.5}}", r"\boxed{1}"]
    chats = [as_chat(answer) for answer in answers]
    assert math(completions=chats, solution=golds) == accuracy_reward(chats, golds)


@needs_math_verify
def test_what_never_ends_is_ended_and_the_worker_replaced():
    reward = MathReward(timeout=1.0, workers=1)
    logged = {}
    reward(completions=["1"], answer=["1"])
    (first,) = reward._pool.alive
    start = time.monotonic()
    given = reward(completions=[NEVER, "7"], answer=["1", "7"], log_extra=logged.__setitem__)
    assert given == [0.0, 1.0]
    assert time.monotonic() - start < 1 + SLACK
    assert logged["math_status"] == ["timeout", "correct"]
    assert logged["gold_parsed"] == ["1", "7"]
    (second,) = reward._pool.alive
    assert first.process.returncode == -signal.SIGKILL
    assert second.process.poll() is None
    reward.close()
    assert second.process.poll() is not None


@needs_math_verify
def test_threads_share_the_workers(math):
    """math-verify alone raises outside the main thread."""
    found = {}

    def ask(n):
        found[n] = math(completions=[str(n), str(n + 1)], solution=[str(n), str(n)])

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: [1.0, 0.0] for n in range(4)}
    assert len(math._pool.alive) == 1


@needs_math_verify
@needs_posix
def test_an_interrupt_leaves_at_once_and_no_worker_stays_busy():
    """Ctrl-C, or the trainer's own alarm, in the middle of an expression that never ends."""
    reward = MathReward(timeout=500, workers=1)
    reward(completions=["1"], solution=["1"])
    (busy,) = reward._pool.alive

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(KeyboardInterrupt):
            reward(completions=[NEVER] * 3, solution=["1"] * 3)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert busy.process.poll() is not None
    assert not reward._pool.alive
    reward.close()


@needs_math_verify
def test_an_interrupt_ends_a_worker_that_is_only_starting():
    """Else the row would be verified after the interrupt, and the interpreter wait for it."""
    pool = rewards._Pool(1, 2048, 120)
    found = []

    def ask():
        try:
            found.append(pool.ask({"gold": "1", "answer": NEVER, "seconds": 500}, 500))
        except WorkerFailed as error:
            found.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while not pool.alive:
        time.sleep(0.001)
    pool.interrupt()
    thread.join(SLACK)
    assert not thread.is_alive()
    assert isinstance(found[0], WorkerFailed)
    assert not pool.alive


@needs_math_verify
@needs_posix
def test_workers_end_with_a_trainer_that_is_killed():
    """An idle one at the end of its input; one inside an endless expression by a clock of its own."""

    def start():
        process = subprocess.Popen(
            [sys.executable, "-P", worker.__file__, "verify"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        process.stdin.write(json.dumps({"path": sys.path, "memory_mb": 2048}).encode() + b"\n")
        process.stdin.flush()
        return process

    with start() as idle, start() as busy:
        assert json.loads(idle.stdout.readline()) == json.loads(busy.stdout.readline()) == {"ready": True}
        for process in (idle, busy):
            process.send_signal(signal.SIGINT)  # Ctrl-C reaches them as well: it is the trainer's to act
        idle.stdin.close()
        assert idle.wait(SLACK) == 0
        busy.stdin.write(json.dumps({"gold": "1", "answer": NEVER, "seconds": 0.2}).encode() + b"\n")
        busy.stdin.close()
        assert busy.wait(SLACK) == -signal.SIGALRM


class _Answers:
    """Stands for a pool whose workers answer what a test says."""

    def __init__(self, *replies, late=False):
        self.replies, self.late = list(replies), late

    def ask(self, request, seconds):
        return self.replies, self.late

    def interrupt(self):
        pass


@pytest.mark.parametrize(
    "pool, expected, status, logged",
    [
        (_Answers({"gold": "1"}, {"error": "Traceback\nKeyError: 'x'"}), 0.0, "error: KeyError: 'x'", "KeyError: 'x'"),
        (_Answers({"error": "Traceback\nKeyError: 'x'"}), None, "error: KeyError: 'x'", "KeyError: 'x'"),
        (_Answers({"gold": "1"}), 0.0, "error: the worker ended", "the worker ended"),
        (_Answers(late=True), None, "gold_timeout", ""),
    ],
)
def test_what_goes_wrong_in_a_worker_is_reported(monkeypatch, caplog, pool, expected, status, logged):
    reward, table = MathReward(), {}
    monkeypatch.setattr(reward, "_ready", lambda: pool)
    assert reward(completions=["2"], solution=["1"], log_extra=table.__setitem__) == [expected]
    assert table["math_status"] == [status]
    assert logged in caplog.text
    assert bool(caplog.records) is bool(logged)


@needs_math_verify
def test_a_forked_process_starts_workers_of_its_own(math, monkeypatch):
    math(completions=["1"], solution=["1"])
    pool, pid = math._pool, os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: pid + 1)
    pool.close()  # the copy's exit leaves the parent's processes alone
    assert all(worker.process.poll() is None for worker in pool.alive)
    assert math._ready() is not pool
    monkeypatch.undo()
    pool.close()


def test_a_worker_that_does_not_start_is_an_error(monkeypatch):
    monkeypatch.setattr(rewards, "find_spec", lambda _: object())
    monkeypatch.setattr(rewards.sys, "executable", "/bin/false")
    with pytest.raises(WorkerFailed, match="did not start: it ended"):
        MathReward()(completions=["1"], solution=["1"])
    monkeypatch.setattr(rewards, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"pip install transformers_minicpm4\[rl\]"):
        MathReward()(completions=["1"], solution=["1"])


# -- code -------------------------------------------------------------------------------------------------------------

ADD = "def add(a, b):\n    return a + b\n"
SUM = "a, b = map(int, input().split())\nprint(a + b)"
PAIRS = [{"input": "1 2\n", "output": "3\n"}, {"input": "5 5", "output": "10"}]


def fenced(code, language="python"):
    return f"I think so:\n```{language}\n{code}\n```\nThat is all."


@needs_posix
@pytest.mark.parametrize(
    "code, tests, entry_point, expected",
    [
        (SUM, PAIRS, None, 1.0),
        (SUM, json.dumps(PAIRS), None, 1.0),
        (SUM, {"inputs": ["1 2", "2 2"], "outputs": ["3", "4"]}, None, 1.0),
        (SUM, {"input": ["1 2", "2 2"], "output": ["3", "5"]}, None, 0.5),
        ("print(3)", PAIRS, None, 0.5),  # the answer of one test, whatever is asked
        ("print('3  \\n\\n')", PAIRS[:1], None, 1.0),
        ("print(3)\nraise SystemExit(1)", PAIRS[:1], None, 0.0),
        ("print('0 3')", PAIRS[:1], None, 0.0),
        (ADD, ["assert add(1, 2) == 3", "assert 4 == add(2, 2), 'why'", "assert add('a', 'b') == 'ba'"], None, 2 / 3),
        (ADD, ["import math", "assert math.isclose(add(.1, .2), .3)", "assert add(1, 1) != 3"], None, 1.0),
        (ADD, ["assert add(1, 1) != 2", "assert not add(0, 0)"], None, 0.5),
        ("def f():\n  return (1, [2.0, {3: {4, 5}}])", ["assert f() == (1, [2, {3: {5, 4}}])"], None, 1.0),
        ("def f():\n  return (1, 2)", ["assert f() == [1, 2]"], None, 0.0),
        (ADD, {"fn_name": "add", "inputs": [[1, 2], [[1], [2]]], "outputs": [3, [1, 2]]}, None, 1.0),
        (ADD, [{"input": [1, 2], "output": 3}, {"input": [1, 1], "output": 3}], "add", 0.5),
        ("class Solution:\n  def f(self, a):\n    return a, 1", [{"input": [2], "output": [2, 1]}], "f", 1.0),
        ("class Solution:\n  def f(self, a):\n    return a", [{"input": [2], "output": 2}], "Solution().f", 1.0),
        # What would deceive a comparison or an exit code in the program's own process.
        ("class A:\n  def __eq__(s, o): return True\ndef add(a, b): return A()", ["assert add(1, 2) == 3"], None, 0.0),
        ("import os\nos._exit(0)", ["assert add(1, 2) == 3"], None, 0.0),
        ("import os\nos._exit(0)", PAIRS[:1], None, 0.0),
        ("def add(a, b): raise SystemExit(0)", ["assert add(1, 2) == 3"], None, 0.0),
        ("def add(a, b):", ["assert add(1, 2) == 3"], None, 0.0),
        ("def add(a, b):\n  print(3)\n  return 3", ["assert add(1, 2) == 3"], None, 1.0),
        (ADD, [], None, None),
        (ADD, None, None, None),
    ],
)
def test_the_share_of_tests_passed(code, tests, entry_point, expected):
    given = code_reward(completions=[as_chat(fenced(code))], tests=[tests], entry_point=[entry_point])
    assert given == [expected]


@needs_posix
def test_a_program_that_hangs_costs_its_tests_and_no_more():
    """A test that hangs fails alone, until the time of the answer is over."""
    hangs = "import time\nn = int(input())\nwhile n == 1: time.sleep(1)\nprint(n)"
    tests = [{"input": str(n), "output": str(n)} for n in (0, 1, 2)]
    table = {}
    reward = CodeReward(SandboxLimits(wall_seconds=3), workers=2)
    given = reward(
        completions=[fenced(hangs), "no code", fenced("print(0)")], tests=[tests] * 3, log_extra=table.__setitem__
    )
    assert given == [2 / 3, 0.0, 1 / 3]
    assert table == {"code_tests": ["2 of 3", "0 of 3", "1 of 3"], "code_status": ["timeout", "no_program", "wrong"]}
    short = CodeReward(SandboxLimits(wall_seconds=60), total_seconds=1.0)
    start = time.monotonic()
    assert short(completions=[fenced("while True: pass")], tests=[tests], log_extra=table.__setitem__) == [0.0]
    assert time.monotonic() - start < 1 + SLACK
    assert table["code_status"] == ["timeout"]


@needs_posix
@pytest.mark.parametrize("shape", ["output", "assert", "call"])
def test_expected_outputs_are_out_of_reach(monkeypatch, shape):
    """A program that prints its arguments, environment, files, folders above and all objects in memory."""
    secret = "expected_" + "".join(random.Random(7).choices("abcdefgh", k=20))
    prying = """
import gc, os, sys
seen = [str(sys.argv), str(dict(os.environ)), str(globals())]
for place in (".", "..", "../given", "/proc/self", f"/proc/{os.getppid()}", "/tmp"):
    try:
        for name in os.listdir(place):
            try: seen.append(name + open(os.path.join(place, name), errors="replace").read(100000))
            except OSError: pass
    except OSError: pass
frame = sys._getframe()
while frame: seen.append(str(frame.f_locals)); frame = frame.f_back
seen += [str(o)[:2000] for o in gc.get_objects() if isinstance(o, (str, list, dict, tuple))]
def f(): return "".join(seen)
if __name__ == "__main__": print(f())
"""
    tests, point = {
        "output": ([{"input": "", "output": secret}], None),
        "assert": ([f"assert f() == {secret!r}"], None),
        "call": ([{"input": [], "output": secret}], "f"),
    }[shape]
    results = []
    monkeypatch.setattr(
        rewards,
        "run_python",
        lambda *args, real=rewards.run_python, **how: results.append(real(*args, **how)) or results[-1],
    )
    assert code_reward(completions=[fenced(prying)], tests=[tests], entry_point=[point]) == [0.0]
    assert len(results[0].stdout) > 1000, results
    assert secret not in results[0].stdout
    assert secret[5:] not in results[0].stdout


def test_which_block_is_the_program():
    both = (
        fenced("first") + "\n" + fenced("second", "Python3") + "\n" + fenced("ls", "bash") + "\n" + fenced("plain", "")
    )
    assert extract_program(both) == "second"
    assert extract_program(fenced("ls", "bash") + "\n" + fenced("plain", "")) == "plain"
    assert extract_program(fenced("ls", "bash")) is None
    assert extract_program(fenced("done") + "\n```python\ncut of") == "done"
    assert extract_program(f"<think>{fenced('draft')}</think>\nI do not know.") is None
    assert extract_program(f"<think>\n{fenced('draft')}\n</think>\n{fenced('final')}") == "final"
    assert extract_program("print(1)") is None
    assert extract_program("~~~py\nx = '''\n```\n'''\n~~~") == "x = '''\n```\n'''"


def test_values_are_equal_as_text_where_python_calls_them_equal():
    values = [
        None, True, 1, 1.0, 0, False, -1, 2**70, float(2**70), 0.1, 0.1 + 0.2, 0.3, float("inf"), "", "1", "é", "'",
        b"1", [], [1], [1.0], [[1]], [1, 1], (), (1,), ((1,),), {1}, {1, 2}, {2, 1.0}, frozenset({1}), set(), {},
        {1: 2}, {1: 2.0}, {1: 2, 3: 4}, {3: 4, 1: 2}, [","], ["", ""], {"a:b": 1}, {"a": "b"}, ["1, 2"], [1, 2],
        "[1,2]", "None", 10**5000,
    ]  # fmt: skip
    for a, b in itertools.product(values, values):
        assert (rewards._canonical(a, False) == rewards._canonical(b, False)) is (a == b), (a, b)
    assert rewards._canonical([(1,), [2]], True) == rewards._canonical([[1], (2,)], True)
    with pytest.raises(TypeError, match="a object cannot"):
        rewards._canonical(object(), False)


@pytest.mark.parametrize(
    "tests, point, sentence",
    [
        ("x", None, "text that is not JSON"),
        ({"a": 1}, None, r"an object with the keys \['a'\]"),
        ({"inputs": ["1"], "outputs": []}, None, "not two lists of one length"),
        ([1], None, "a list that holds '1'"),
        ([{"input": "1"}], None, "a list that holds"),
        ([{"input": 1, "output": 2}], None, "without the entry_point"),
        ([{"input": 1, "output": 2}], "f", "whose input is no list of arguments"),
        ([{"input": [1], "output": 2}], "f(", "a call that cannot be made"),
        (["def ("], None, "text that is not Python"),
        (["import math"], None, "statements without an assertion"),
        (3, None, "the tests of a problem are int"),
    ],
)
def test_tests_of_another_shape_are_refused(tests, point, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        parse_tests(tests, point)
    assert "give a list of {'input': ..., 'output': ...}" in str(caught.value)


def test_a_machine_that_protects_less_is_told(monkeypatch, caplog):
    monkeypatch.setattr(
        rewards, "active_protections", lambda *_: tuple(p for p in rewards.PROTECTIONS if p != "no_network")
    )
    monkeypatch.setattr(rewards, "choose_backend", lambda _: "subprocess")
    reward = CodeReward()
    for _ in range(2):
        assert reward(completions=[""], tests=[PAIRS]) == [0.0]
    assert caplog.text.count("without no_network") == 1
    with pytest.raises(RuntimeError, match="lacks no_network, which require=... asks for"):
        CodeReward(require=("no_network", "no_writes"))(completions=[""], tests=[PAIRS])
    with pytest.raises(ValueError, match=r"require=\['no_nothing'\] are no protections"):
        CodeReward(require=["no_nothing"])


# -- format -----------------------------------------------------------------------------------------------------------


def ones(completions, **columns):
    return [1.0] * len(completions)


FORMATS = [
    ("<think>a\nb</think>\nc", 1),
    ("<think></think>c", 1),
    ("\n<think>a</think>\n\nc\nd", 1),
    ("c", 0),
    ("", 0),
    ("<think>a", 0),
    ("a</think>c", 0),
    ("<think>a</think>", 0),
    ("<think>a</think> \n", 0),
    ("x<think>a</think>c", 0),
    ("<think>a</think>c</think>d", 0),
    ("<think>a<think>b</think>c", 0),
    ("<think>a</think><think>b</think>c", 0),
    ("<think>a</think> <think>b", 0),
]


def test_the_gate_is_zero_where_the_format_is_wrong():
    gate = format_gate(ones)
    for form in (str, as_chat):
        assert gate(completions=[form(text) for text, _ in FORMATS]) == [float(right) for _, right in FORMATS]
    opened = format_gate(ones, THINK_FORMAT.replace(r"\s*<think>", "", 1))
    assert opened(completions=["a</think>c", "<think>a</think>c", "a"]) == [1.0, 0.0, 0.0]
    boxed = format_gate(ones, r".*\\boxed\{.+\}.*")
    assert boxed(completions=["so\n\\boxed{1}\n.", "so 1"]) == [1.0, 0.0]
    # In one pass: a text of a million characters that just fails.
    assert gate(completions=["<think>" + "<" * 500_000 + "</think>" + " " * 500_000]) == [0.0]


def test_the_gate_passes_on_what_it_wraps():
    seen = {}

    def graded(completions, prompts, grade, **columns):
        seen.update(columns, prompts=prompts)
        return grade

    gate = format_gate(graded)
    right, wrong = "<think>a</think>b", "b"
    metrics = {}
    given = gate(
        completions=[right, wrong, right, wrong],
        prompts=list("pqrs"),
        grade=[0.25, 0.75, None, None],
        trainer_state=3,
        log_metric=metrics.__setitem__,
    )
    assert given == [0.25, 0.0, None, None]
    assert seen["trainer_state"] == 3
    assert seen["prompts"] == list("pqrs")
    assert metrics == {"format_right": 0.5}
    assert gate.__name__ == "format_gated_graded"
    assert format_gate(math_reward).__name__ == "format_gated_math_reward"
    assert format_gate(ones, name="mine").__name__ == "mine"
    with pytest.raises(ValueError, match="graded gave 1 rewards for 2 rows"):
        gate(completions=[right, right], prompts=None, grade=[1.0])


def test_what_no_gate_can_wrap_is_refused():
    async def later(completions, **columns):
        return []

    for reward in (3, later):
        with pytest.raises(TypeError, match="format_gate wraps a reward function"):
            format_gate(reward)
    with pytest.raises(ValueError, match="no regular expression"):
        format_gate(ones, "(")


# -- all of them ------------------------------------------------------------------------------------------------------


def test_names_copies_and_empty_batches():
    for reward in (math_reward, code_reward, format_gate(code_reward)):
        copy = pickle.loads(pickle.dumps(reward))
        assert copy.__name__ == reward.__name__
        assert repr(copy) == repr(reward)
    assert (math_reward.__name__, code_reward.__name__) == ("math_reward", "code_reward")
    assert math_reward(completions=[], solution=[]) == code_reward(completions=[], tests=[]) == []


def test_columns_that_are_missing_or_wrong_are_named():
    with pytest.raises(ValueError, match=r"needs the dataset column 'solution' or 'answer'; .* \['gold'\]"):
        math_reward(completions=["1"], gold=["1"])
    with pytest.raises(ValueError, match=r"needs the dataset column 'tests'; the columns given are \[\]"):
        code_reward(completions=["1"])
    with pytest.raises(ValueError, match="'solution' must be a list with one value for each of the 2 completions"):
        math_reward(completions=["1", "2"], solution=["1"])
    with pytest.raises(TypeError, match="a gold answer is \\['1'\\]"):
        math_reward(completions=["1"], solution=[["1"]])
    with pytest.raises(TypeError, match="math_reward: a completion is '3'; give a string, or a list of messages"):
        math_reward(completions=[3], solution=["1"])
    with pytest.raises(ValueError, match="timeout=0"):
        MathReward(timeout=0)
    with pytest.raises(ValueError, match="workers=0"):
        MathReward(workers=0)
    with pytest.raises(ValueError, match="workers=0"):
        CodeReward(workers=0)


def test_the_text_of_a_completion():
    assert completion_text("a") == completion_text(as_chat("a")) == "a"
    assert completion_text([{"role": "tool", "content": "x"}, {"role": "assistant", "content": "a"}]) == "a"
    assert completion_text([{"role": "assistant", "content": [{"type": "text", "text": "a"}]}]) == "a"
    assert completion_text([{"role": "assistant", "content": None, "tool_calls": []}]) == ""


@needs_math_verify
@needs_posix
def test_trl_trains_with_them(tmp_path, math, monkeypatch):
    """The trainer's own call: names of metrics, columns, None beside numbers."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    words = Tokenizer(models.WordLevel({c: i for i, c in enumerate("_.0123456789")}, unk_token="_"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="_", eos_token=".")
    config = LlamaConfig(
        vocab_size=12, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    trainer = GRPOTrainer(
        LlamaForCausalLM(config),
        [math, format_gate(math, r"\d.*", name="gated"), code_reward],
        GRPOConfig(
            str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_completion_length=4, max_steps=1,
            report_to=[], use_cpu=True, bf16=False, logging_steps=1, disable_tqdm=True,
        ),
        Dataset.from_list([{"prompt": "1", "solution": "7", "tests": PAIRS}] * 4),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    log = trainer.state.log_history[0]
    assert 0 <= log["rewards/math_reward/mean"] <= 1
    assert log["rewards/gated/mean"] <= log["rewards/math_reward/mean"]
    assert log["rewards/code_reward/mean"] == 0


def test_no_process_of_this_module_is_left(math):
    """Last in this file: of all workers only those of the shared reward are alive."""
    if not Path("/proc").is_dir():
        pytest.skip("no /proc to look into")
    math.close()
    mine = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line, state = (process / "cmdline").read_bytes(), (process / "stat").read_text().rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            continue
        if worker.__file__.encode() in line and int(state[1]) == os.getpid() and state[0] != "Z":
            mine.append(line)
    assert not mine
