"""
Rewards of MiniCPM4's reinforcement learning (arXiv 2506.07900, section 3.2): mathematics by verification of the
answer, code by the share of tests passed, and zero where the format is wrong.

Each is a reward function as TRL's `GRPOTrainer` calls it: `reward(prompts=..., completions=..., **columns)`, where
`completions` holds n completions, each a string or a list of messages (`[{"role": ..., "content": ...}]`, the last one
is read), and each column of the dataset arrives as a list of n values. It returns n numbers from 0 to 1, or None for a
row that cannot be scored, which the trainer leaves out.
"""

import ast
import contextlib
import functools
import inspect
import json
import logging
import os
import queue
import re
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from ..data.ultrachat.text_counts import read_markdown
from .sandbox import PROTECTIONS, SandboxLimits, active_protections, choose_backend, run_python


logger = logging.getLogger(__name__)

_PYTHON = ("python", "python3", "py")


def completion_text(completion, reward: str = "reward") -> str:
    """
    The text of one completion: a string, or the content of the last of its messages.

    Raises:
        TypeError: anything else.
    """
    if isinstance(completion, str):
        return completion
    if isinstance(completion, list | tuple) and completion and isinstance(completion[-1], dict):
        content = completion[-1].get("content")
        if content is None:
            return ""  # a message that only calls a tool
        if isinstance(content, str):
            return content
        if isinstance(content, list):
            return "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    raise TypeError(
        f"{reward}: a completion is {str(completion)[:60]!r}; give a string, or a list of messages with role and "
        "content"
    )


def final_answer(text: str) -> str:
    """What follows the last `</think>`; the whole text where there is none."""
    return text.rsplit("</think>", 1)[-1]


def _column(columns: dict, names: Sequence[str], count: int, reward: str) -> list:
    """The first of the named columns, a value for each completion."""
    for name in names:
        if name in columns:
            values = columns[name]
            if isinstance(values, str) or not hasattr(values, "__len__") or len(values) != count:
                raise ValueError(
                    f"{reward}: column {name!r} must be a list with one value for each of the {count} completions"
                )
            return list(values)
    given = sorted(name for name, value in columns.items() if isinstance(value, list))
    raise ValueError(
        f"{reward} needs the dataset column {' or '.join(map(repr, names))}; the columns given are {given}: rename "
        "the column, or build the reward with column=..."
    )


# -- processes that answer requests -----------------------------------------------------------------------------------


class WorkerFailed(RuntimeError):
    """A worker process could not be started."""


class _Worker:
    """One process that verifies, used by one thread at a time."""

    def __init__(self):
        script = str(Path(__file__).resolve().with_name("worker.py"))
        self.process = subprocess.Popen(
            # -P: the folder of the script is no place to import from.
            [sys.executable, "-P", script, "verify"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def begin(self, memory_mb: int, seconds: float) -> None:
        """Waits until it has imported what it needs."""
        replies, late, _ = self.ask({"path": sys.path, "memory_mb": memory_mb}, seconds)
        if late or not replies or "ready" not in replies[0]:
            why = f"it was not ready after {seconds:g} s" if late else (replies or [{}])[0].get("error", "it ended")
            raise WorkerFailed(f"math_reward: the process that verifies answers did not start: {why}")

    def ask(self, request: dict, seconds: float) -> tuple[list[dict], bool, bool]:
        """Sends a request; returns the replies, whether time ran out, and whether the last reply came."""
        late = threading.Event()

        def end():
            late.set()
            self.process.kill()  # its pipe closes, and the reader below wakes up

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        replies, complete = [], False
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            while not complete and (line := self.process.stdout.readline()).endswith(b"\n"):
                replies.append(json.loads(line))
                complete = replies[-1].get("gold") is None  # a gold answer that was read: the verdict follows
        except (BrokenPipeError, ConnectionError):
            pass
        finally:
            timer.cancel()
        return replies, late.is_set(), complete

    def close(self) -> None:
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # a request that was not sent whole
                pipe.close()
        self.process.wait()


class _Pool:
    """Up to `size` workers, started when they are needed. Belongs to the process that built it."""

    def __init__(self, size: int, memory_mb: int, start_seconds: float):
        self.pid = os.getpid()
        self.memory_mb = memory_mb
        self.start_seconds = start_seconds
        self.free = queue.LifoQueue()
        self.alive: set[_Worker] = set()
        self.interrupts = 0
        self.lock = threading.Lock()
        for _ in range(size):
            self.free.put(None)

    def ask(self, request: dict, seconds: float) -> tuple[list[dict], bool]:
        """The replies, and whether time ran out; time for a worker to be free and to start is not counted."""
        interrupts = self.interrupts
        worker = self.free.get()
        healthy = False
        try:
            if worker is None:
                with self.lock:
                    worker = _Worker()
                    self.alive.add(worker)
                worker.begin(self.memory_mb, self.start_seconds)
            if interrupts != self.interrupts:
                return [], False
            replies, late, complete = worker.ask(request, seconds)
            healthy = complete and not late
            return replies, late
        finally:
            if not healthy and worker is not None:
                with self.lock:
                    self.alive.discard(worker)
                worker.close()
                worker = None
            self.free.put(worker)

    def interrupt(self) -> None:
        """Kills all workers: threads that wait for an answer get none and end; later requests start new ones."""
        with self.lock:
            self.interrupts += 1
            for worker in self.alive:
                worker.process.kill()

    def close(self) -> None:
        if self.pid != os.getpid():
            return  # a fork's copy: the processes are its parent's
        with self.lock:
            workers, self.alive = self.alive, set()
        for worker in workers:
            worker.close()


def _map_rows(function: Callable, rows: Sequence, threads: int, interrupt: Callable[[], None]) -> list:
    """`function` of each row, in some threads. An exception, Ctrl-C too, calls `interrupt` to end the others."""
    executor = ThreadPoolExecutor(min(threads, len(rows)), thread_name_prefix="minicpm4_reward")
    try:
        return list(executor.map(function, rows))
    except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        interrupt()
        raise
    finally:
        executor.shutdown()


# -- mathematics ------------------------------------------------------------------------------------------------------


class MathReward:
    """
    1.0 where math-verify finds the answer equal to the gold answer, else 0.0 (MiniCPM4, arXiv 2506.07900, section
    3.2).

    Verification runs in processes of its own, which are killed at the deadline: an expression such as `9^{9^{9^9}}`
    may never end, and math-verify's own alarm works in the main thread alone. Such a row gets 0.0, or None if it was
    the gold answer that did not end. The processes start with the first call and end with this one, however it ends.

    Gold: LaTeX, with or without `$`; `\\boxed{}` in a solution; GSM8K's `#### 42`. Gold that holds no mathematics
    gives None: the row is left out. Answer: what follows the last `</think>`; there the last `\\boxed{}`, else the
    last formula or number ("the answer is 42"). Boxes near each other are one set: listing guesses does not pay.

    Args:
        timeout (`float`): seconds for one row.
        workers (`int`): processes; each needs about 60 MB.
        column (`str`, *optional*): of the gold answers; otherwise `solution`, then `answer`.
        memory_mb (`int`): address space of a worker in MiB (not on Windows).
        start_timeout (`float`): seconds that a worker may take to start.

    Raises:
        ValueError: an option out of range; at the call, a missing column.
        TypeError: at the call, a completion that is no text, a gold that is neither text nor number nor None.
        ImportError: at the call, math-verify is not installed.
        WorkerFailed: at the call, no worker could be started.
    """

    def __init__(
        self,
        timeout: float = 5.0,
        workers: int = 2,
        *,
        column: str | None = None,
        memory_mb: int = 2048,
        start_timeout: float = 120.0,
    ):
        if not timeout > 0 or not start_timeout > 0:
            raise ValueError(f"MathReward: timeout={timeout} and start_timeout={start_timeout} are seconds, above 0")
        if workers < 1 or memory_mb < 256:
            raise ValueError(f"MathReward: workers={workers}, memory_mb={memory_mb}; give at least 1, and 256 MiB")
        self.__name__ = "math_reward"
        self.timeout = timeout
        self.workers = workers
        self.column = column
        self.memory_mb = memory_mb
        self.start_timeout = start_timeout
        self._pool = None

    def __getstate__(self):
        return {**self.__dict__, "_pool": None}  # a copy starts workers of its own

    def __repr__(self):
        return f"MathReward(timeout={self.timeout}, workers={self.workers}, column={self.column!r})"

    def __call__(self, completions: list, prompts: list | None = None, **columns) -> list[float | None]:
        """
        n completions -> n rewards: 1.0, 0.0 or None.

        With the trainer's `log_extra`, its table of completions shows `gold_parsed`, `answer_parsed` and `math_status`
        (`correct`, `wrong`, `no_answer`, `timeout`, `gold_unparsable`, `gold_timeout`, `error: ...`).
        """
        names = (self.column,) if self.column else ("solution", "answer")
        texts = [final_answer(completion_text(completion, "math_reward")) for completion in completions]
        golds = _column(columns, names, len(texts), "math_reward")
        for gold in golds:
            if gold is not None and (isinstance(gold, bool) or not isinstance(gold, str | int | float)):
                raise TypeError(f"math_reward: a gold answer is {gold!r:.60}; give text, a number, or None")
        if not texts:
            return []
        judged = _map_rows(self._judge, list(zip(golds, texts)), self.workers, self._ready().interrupt)
        if log_extra := columns.get("log_extra"):
            for place, name in enumerate(("gold_parsed", "answer_parsed", "math_status"), start=1):
                log_extra(name, [row[place] or "" for row in judged])
        return [row[0] for row in judged]

    def close(self) -> None:
        """Ends the processes. A later call starts new ones."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _ready(self) -> _Pool:
        with _STARTING:
            if self._pool is None or self._pool.pid != os.getpid():
                if find_spec("math_verify") is None:
                    raise ImportError("math_reward needs math-verify: pip install transformers_minicpm4[rl]")
                self._pool = _Pool(self.workers, self.memory_mb, self.start_timeout)
                weakref.finalize(self, self._pool.close)  # at the exit of the interpreter too
            return self._pool

    def _judge(self, row: tuple) -> tuple[float | None, str | None, str | None, str]:
        gold, text = row
        if gold is None or not str(gold).strip():
            return None, None, None, "gold_unparsable"
        request = {"gold": str(gold), "answer": text, "seconds": self.timeout}
        replies, late = self._ready().ask(request, self.timeout)
        shown = [reply.get("gold") or reply.get("answer") for reply in replies] + [None, None]
        last = replies[-1] if replies else {}
        if "error" in last:
            problem = last["error"].strip().splitlines()[-1]
            reward = None if len(replies) == 1 else 0.0  # None: it was the gold answer
            logger.warning(
                "math_reward: %.80r against %.80r gives %s, for it raised\n%s", text, gold, reward, last["error"]
            )
            return reward, None, None, f"error: {problem}"
        if "correct" in last:
            status = "correct" if last["correct"] else "wrong" if last["answer"] else "no_answer"
            return float(last["correct"]), shown[0], shown[1], status
        if "gold" in last and last["gold"] is None:
            return None, None, None, "gold_unparsable"
        if not late:
            # Out of memory, or too deep for the parser: as hopeless as an expression that does not end.
            logger.warning("math_reward: the worker ended while it verified %.80r against %.80r", text, gold)
        if replies:
            return 0.0, shown[0], None, "timeout" if late else "error: the worker ended"
        return None, None, None, "gold_timeout" if late else "error: the worker ended"


def _renew_lock() -> None:
    global _STARTING
    _STARTING = threading.Lock()


_renew_lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)  # another thread may have held it
math_reward = MathReward()


# -- code -------------------------------------------------------------------------------------------------------------


def extract_program(text: str) -> str | None:
    """
    The program of an answer: after the last `</think>`, the last closed code fence marked `python`, `python3` or `py`;
    where none is marked so, the last closed fence without a language; None where there is neither.
    """
    blocks = read_markdown(final_answer(text)).code_blocks
    marked = [code for language, code in blocks if language.lower() in _PYTHON]
    unmarked = [code for language, code in blocks if not language]
    return next((found[-1] for found in (marked, unmarked) if found), None)


def _canonical(value, tuples_are_lists):
    """A value as text, equal where Python's == holds: for None, real numbers, text, bytes, containers of them."""
    if value is None:
        return "None"
    if isinstance(value, float) and not value.is_integer():
        return value.hex()
    if isinstance(value, (int, float)):
        return hex(int(value))
    if isinstance(value, str):
        return ascii(str(value))
    if isinstance(value, (bytes, bytearray)):
        return "b" + value.hex()
    if isinstance(value, (list, tuple)):
        inner = ",".join(_canonical(part, tuples_are_lists) for part in value)
        return f"[{inner}]" if tuples_are_lists or isinstance(value, list) else f"({inner})"
    if isinstance(value, (set, frozenset)):
        return "{" + ",".join(sorted(_canonical(part, tuples_are_lists) for part in value)) + "}"
    if isinstance(value, dict):
        pairs = (_canonical(k, tuples_are_lists) + ":" + _canonical(v, tuples_are_lists) for k, v in value.items())
        return "dict{" + ",".join(sorted(pairs)) + "}"
    raise TypeError(f"a {type(value).__name__} cannot be compared with a literal")


# Evaluates one expression beside the model's program and writes its value. The expected value is not here.
_CALL = """
import os, sys, types
results = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
{canonical}
solution = sys.modules["solution"] = types.ModuleType("solution")
names = solution.__dict__
exec({setup!r}, names)
with open("solution.py", encoding="utf-8") as file:
    exec(compile(file.read(), "solution.py", "exec"), names)
if {method!r} and {method!r} not in names and "Solution" in names:
    names[{method!r}] = getattr(names["Solution"](), {method!r})
results.write(_canonical(eval({expression!r}, names), {lists!r}))
results.close()
"""


class _StdinTest:
    def __init__(self, source: str, output: str):
        self.source = source
        self.lines = self.normal(output)
        self.size = len(output.encode("utf-8", "replace"))

    @staticmethod
    def normal(text: str) -> list[str]:
        return [line.rstrip() for line in text.rstrip().split("\n")]

    def run(self, code: str, **how) -> tuple[bool, str]:
        result = run_python(code, self.source, **how)
        passed = result.status == "ok" and self.normal(result.stdout) == self.lines
        return passed, "wrong" if result.status == "ok" else result.status


class _CallTest:
    def __init__(self, expression: str, expected, setup: str = "", method: str = "", lists: bool = False):
        self.expected = _canonical(expected, lists)
        self.size = len(self.expected)
        self.program = _CALL.format(
            canonical=inspect.getsource(_canonical), setup=setup, expression=expression, method=method, lists=lists
        )

    def run(self, code: str, **how) -> tuple[bool, str]:
        result = run_python(self.program, files={"solution.py": code}, **how)
        return result.stdout == self.expected, "wrong" if result.status == "ok" else result.status


def parse_tests(tests, entry_point: str | None = None) -> list:
    """
    The tests of one problem, from any of these shapes, or the JSON text of one:

    - `[{"input": "2 3\\n", "output": "5\\n"}, ...]`: standard input and output of a program. Lines are compared
      without trailing white space, empty lines at the end are ignored; the program must end with exit code 0.
    - `{"inputs": [...], "outputs": [...]}`: the same in two lists of one length (APPS). With `"fn_name"`, calls.
    - `[{"input": [2, 3], "output": 5}, ...]` with an `entry_point` such as `add` or `Solution().add`: calls of that
      function with these arguments. The value must equal the output as Python compares, a tuple being a list.
    - `["assert add(2, 3) == 5", ...]` (MBPP): each assertion is a test. Other statements (imports) come before the
      program, for all tests. Of `expression == literal` the program's process sees the expression alone;
      any other assertion runs there whole, and a program made to cheat could answer for it.

    Returns:
        list of tests, empty for None and for empty lists.

    Raises:
        ValueError: another shape; the sentence says what was found.
    """
    if isinstance(tests, str):
        try:
            tests = json.loads(tests)
        except ValueError:
            raise _wrong_shape(f"text that is not JSON: {tests[:60]!r}") from None
    if isinstance(tests, dict):
        plural = {"inputs", "outputs"} <= tests.keys()
        if not plural and not {"input", "output"} <= tests.keys():  # as old versions of datasets give a list of pairs
            raise _wrong_shape(f"an object with the keys {sorted(tests)}")
        inputs, outputs = (tests[name] or [] for name in (("inputs", "outputs") if plural else ("input", "output")))
        if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
            raise _wrong_shape("inputs and outputs that are not two lists of one length")
        entry_point = tests.get("fn_name") or entry_point
        tests = [{"input": source, "output": output} for source, output in zip(inputs, outputs)]
    if tests is None:
        return []
    if not isinstance(tests, list):
        raise _wrong_shape(type(tests).__name__)
    if all(isinstance(test, str) for test in tests):
        return _parse_assertions(tests)
    return [_parse_pair(test, entry_point) for test in tests]


def _wrong_shape(found: str) -> ValueError:
    return ValueError(
        f"code_reward: the tests of a problem are {found}; give a list of {{'input': ..., 'output': ...}}, an object "
        "with inputs and outputs, or a list of assert statements (see parse_tests)"
    )


def _parse_pair(test, entry_point: str | None):
    if not isinstance(test, dict) or "input" not in test or "output" not in test:
        raise _wrong_shape(f"a list that holds {str(test)[:60]!r}")
    source, output = test["input"], test["output"]
    if entry_point is None:
        # Some collections keep lines as a list.
        texts = ["\n".join(part) if _all_text(part) else part for part in (source, output)]
        if not all(isinstance(part, str) for part in texts):
            raise _wrong_shape(f"values, not text ({str(test)[:60]!r}), without the entry_point of a function to call")
        return _StdinTest(*texts)
    if not isinstance(source, list):
        raise _wrong_shape(f"calls of {entry_point!r} whose input is no list of arguments: {str(source)[:60]!r}")
    expression = f"{entry_point}(*{source!r})"
    try:
        ast.parse(expression, mode="eval")
        return _CallTest(expression, output, method=entry_point if entry_point.isidentifier() else "", lists=True)
    except (SyntaxError, TypeError) as error:
        raise _wrong_shape(f"a call that cannot be made ({expression[:60]!r}: {error})") from None


def _all_text(part) -> bool:
    return isinstance(part, list) and all(isinstance(line, str) for line in part)


def _parse_assertions(tests: list[str]) -> list[_CallTest]:
    setup, found = [], []
    for text in tests:
        try:
            statements = ast.parse(text).body
        except (SyntaxError, ValueError) as error:
            raise _wrong_shape(f"text that is not Python ({error}): {text[:60]!r}") from None
        setup += [ast.unparse(statement) for statement in statements if not isinstance(statement, ast.Assert)]
        found += [_split_assertion(statement.test) for statement in statements if isinstance(statement, ast.Assert)]
    if setup and not found:
        raise _wrong_shape(f"statements without an assertion: {tests[0][:60]!r}")
    return [_CallTest(ast.unparse(expression), expected, "\n".join(setup)) for expression, expected in found]


def _split_assertion(test: ast.expr) -> tuple[ast.expr, object]:
    """The expression that the program's process evaluates, and the value that it must have."""
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq):
        for expected, expression in ((test.comparators[0], test.left), (test.left, test.comparators[0])):
            try:
                value = ast.literal_eval(expected)
                _canonical(value, False)
            except (ValueError, TypeError):
                continue
            return expression, value
    whole = ast.Call(ast.Name("bool", ast.Load()), [test], [])
    return ast.fix_missing_locations(whole), True


class CodeReward:
    """
    The share of a problem's tests that the answer's program passes; 1.0 only if it passes all (MiniCPM4, arXiv
    2506.07900, section 3.2).

    The program is the last Python block of the answer ([`extract_program`]; none: 0.0). Every test runs it in a
    process of its own in the sandbox (`sandbox.run_python`), with the standard library alone. Expected outputs stay in
    this process: what the program prints or returns is compared here. The sandbox is NOT a security boundary;
    `sandbox_report()` says what protects this machine.

    Dataset columns: `tests`, in a shape of [`parse_tests`], and where the shape asks for it `entry_point`. A row whose
    tests are None or empty gives None.

    Args:
        limits (`SandboxLimits`, *optional*): of one test.
        workers (`int`): programs that run at a time.
        column (`str`): of the tests.
        total_seconds (`float`): for one answer; tests that it has no time left for are failed.
        backend (`str`): of the sandbox: `auto`, `bwrap`, `firejail` or `subprocess`.
        require (sequence of `str`): protections (keys of `sandbox.PROTECTIONS`) without which nothing shall run.

    Raises:
        ValueError: an option out of range; at the call, a missing column or tests of another shape.
        TypeError: at the call, a completion that is no text.
        RuntimeError: at the first call, the sandbox does not start, or lacks a protection of `require`.
    """

    def __init__(
        self,
        limits: SandboxLimits | None = None,
        workers: int = 2,
        *,
        column: str = "tests",
        total_seconds: float = 60.0,
        backend: str = "auto",
        require: Sequence[str] = (),
    ):
        unknown = sorted(set(require) - set(PROTECTIONS))
        if unknown:
            raise ValueError(f"CodeReward: require={unknown} are no protections; those are {list(PROTECTIONS)}")
        if workers < 1 or not total_seconds > 0:
            raise ValueError(
                f"CodeReward: workers={workers}, total_seconds={total_seconds}; give at least 1, and above 0"
            )
        self.__name__ = "code_reward"
        self.limits = limits or SandboxLimits()
        self.workers = workers
        self.column = column
        self.total_seconds = total_seconds
        self.backend = backend
        self.require = tuple(require)
        self._checked = None

    def __repr__(self):
        return f"CodeReward(limits={self.limits}, workers={self.workers}, column={self.column!r})"

    def __call__(self, completions: list, prompts: list | None = None, **columns) -> list[float | None]:
        """
        n completions -> n rewards from 0.0 to 1.0, or None.

        With the trainer's `log_extra`, its table of completions shows `code_tests` ("3 of 5") and `code_status`:
        `passed`, `no_program`, `no_tests`, or how the first failed test ended (`wrong`, `error`, `timeout`,
        `cpu_limit`, `output_limit`, `no_time_left`).
        """
        texts = [completion_text(completion, "code_reward") for completion in completions]
        given = _column(columns, (self.column,), len(texts), "code_reward")
        points = columns.get("entry_point") or [None] * len(texts)
        parsed = {}
        rows = []
        for text, tests, point in zip(texts, given, points):
            # The completions of a group share their tests.
            key = (json.dumps(tests, default=repr), point)
            if key not in parsed:
                parsed[key] = parse_tests(tests, point)
            rows.append((extract_program(text), parsed[key]))
        if not rows:
            return []
        backend = self._check()
        stop = threading.Event()
        judge = functools.partial(self._judge, backend=backend, stop=stop)
        judged = _map_rows(judge, rows, self.workers, stop.set)
        if log_extra := columns.get("log_extra"):
            log_extra("code_tests", [f"{passed} of {len(tests)}" for (_, passed, _), (_, tests) in zip(judged, rows)])
            log_extra("code_status", [status for _, _, status in judged])
        return [reward for reward, _, _ in judged]

    def _check(self) -> str:
        """The backend, once it is known what it protects."""
        if self._checked is None:
            backend = choose_backend(self.backend)
            missing = [name for name in PROTECTIONS if name not in active_protections(backend, self.limits)]
            if lacking := [name for name in self.require if name in missing]:
                raise RuntimeError(
                    f"code_reward: this machine's sandbox ({backend}) lacks {', '.join(lacking)}, which require=... "
                    "asks for; print sandbox_report(), or run where it is complete"
                )
            if missing:
                logger.warning(
                    "code_reward runs code of a model without %s: %s",
                    ", ".join(missing),
                    "; ".join(PROTECTIONS[name] for name in missing),
                )
            self._checked = backend
        return self._checked

    def _judge(self, row: tuple, backend: str, stop: threading.Event) -> tuple[float | None, int, str]:
        code, tests = row
        if not tests:
            return None, 0, "no_tests"
        if code is None:
            return 0.0, 0, "no_program"
        deadline = time.monotonic() + self.total_seconds
        passed, first = 0, "passed"
        for test in tests:
            left = deadline - time.monotonic()
            good, status = False, "no_time_left"
            if left > 0 and not stop.is_set():
                limits = replace(
                    self.limits,
                    wall_seconds=min(self.limits.wall_seconds, left),
                    output_kb=max(self.limits.output_kb, test.size // 1024 + 1),
                )
                good, status = test.run(code, limits=limits, backend=backend, stop=stop)
            if status == "not_started":
                raise RuntimeError("code_reward: the sandbox did not start a program; sandbox_report() may say why")
            passed += good
            first = status if not good and first == "passed" else first
        return passed / len(tests), passed, first


code_reward = CodeReward()


# -- format -----------------------------------------------------------------------------------------------------------

# Reasoning between one pair of tags, which may be empty, then an answer. Each part is read once: time is linear.
THINK_FORMAT = r"\s*<think>(?:(?!</?think>).)*</think>\s*(?!</?think>)\S(?:(?!</?think>).)*"


class _FormatGate:
    def __init__(self, reward: Callable, pattern: str | re.Pattern, name: str | None):
        self.reward = reward
        self.pattern = re.compile(pattern, re.DOTALL) if isinstance(pattern, str) else pattern
        self.__name__ = name or f"format_gated_{_name_of(reward)}"

    def __repr__(self):
        return f"format_gate({_name_of(self.reward)}, {self.pattern.pattern!r})"

    def __call__(self, completions: list, prompts: list | None = None, **columns) -> list[float | None]:
        """n completions -> n rewards: those of the wrapped reward, 0.0 where the format is wrong; None stays None."""
        right = [bool(self.pattern.fullmatch(completion_text(text, self.__name__))) for text in completions]
        rewards = self.reward(completions=completions, prompts=prompts, **columns)
        if len(rewards) != len(right):
            raise ValueError(
                f"{self.__name__}: {_name_of(self.reward)} gave {len(rewards)} rewards for {len(right)} rows"
            )
        if log_metric := columns.get("log_metric"):
            log_metric("format_right", sum(right) / max(1, len(right)))
        return [reward if reward is None or fine else 0.0 for reward, fine in zip(rewards, right)]


def _name_of(reward: Callable) -> str:
    return getattr(reward, "__name__", type(reward).__name__)


def format_gate(reward: Callable, pattern: str | re.Pattern = THINK_FORMAT, *, name: str | None = None) -> Callable:
    r"""
    A reward function that gives what `reward` gives where the completion has the right format, and 0.0 elsewhere
    (MiniCPM4, arXiv 2506.07900, section 3.2: zero if the format is wrong). None, a row that cannot be scored, stays.

    Every row is scored, also one whose format is wrong: only so can the trainer's tables be filled.

    Args:
        reward (callable): a reward function, of this module or of TRL; not an async one and no reward model.
        pattern (`str` or `re.Pattern`, *optional*): must match the whole completion; in a string `.` matches newlines.
            Default: `<think>`, reasoning, `</think>`, an answer, each tag once. Where the chat template opens the
            reasoning in the prompt, give `THINK_FORMAT.replace(r"\s*<think>", "", 1)`.
        name (`str`, *optional*): `__name__` of the result, which names its columns in logs.

    Raises:
        TypeError: reward is not such a callable.
        ValueError: the pattern is no regular expression; at the call, the number of rewards is wrong.
    """
    if not callable(reward) or inspect.iscoroutinefunction(reward) or hasattr(reward, "forward"):
        raise TypeError(f"format_gate wraps a reward function that is called and returns a list, not {reward!r:.80}")
    try:
        return _FormatGate(reward, pattern, name)
    except re.error as error:
        raise ValueError(f"format_gate: {pattern!r} is no regular expression: {error}") from error
