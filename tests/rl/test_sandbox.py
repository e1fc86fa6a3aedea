"""Hostile programs end within their limits and leave nothing; what is said to be active is active."""

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from transformers_minicpm4.rl import sandbox, worker
from transformers_minicpm4.rl.sandbox import PROTECTIONS, SandboxLimits, choose_backend, run_python, sandbox_report


pytestmark = pytest.mark.skipif(os.name != "posix", reason="the sandbox needs a POSIX system")

LIMITS = SandboxLimits(wall_seconds=20, cpu_seconds=1, memory_mb=256, file_mb=2, output_kb=64)
SLACK = 15  # seconds to start and to clean up on a machine that is busy with other work


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    yield
    assert not list(tmp_path.glob("minicpm4_sandbox_*"))
    assert not programs_below(tmp_path)


def programs_below(folder: Path) -> list[str]:
    """Command lines of the processes that run a program of this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            state = (process / "stat").read_text().rsplit(")", 1)[1].split()[0]
        except (OSError, IndexError):
            continue
        if f"{folder}/minicpm4_sandbox_" in line and state != "Z":
            found.append(line)
    return found


def needs(result, *names):
    missing = set(names) - set(result.protections)
    if missing:
        pytest.skip(f"this machine's sandbox lacks {sorted(missing)}")


def test_a_program_reads_its_input_and_its_end_is_told():
    result = run_python("import sys\nprint(sys.stdin.read().upper())\nprint('e', file=sys.stderr)", "é\n")
    assert (result.status, result.exit_code, result.stdout, result.stderr) == ("ok", 0, "É\n\n", "e\n")
    assert result.backend in sandbox.BACKENDS
    assert "rlimits" in result.protections
    assert set(result.protections) <= set(PROTECTIONS)
    for code, number in (("raise SystemExit(3)", 3), ("import os; os._exit(4)", 4), ("1/0", 1)):
        assert (run_python(code).status, run_python(code).exit_code) == ("error", number)
    assert run_python("import os; os.abort()").exit_code == -signal.SIGABRT
    assert run_python("print(open('b.txt').read())", files={"b.txt": "beside"}).stdout == "beside\n"
    # Neither the trainer's environment nor its packages.
    seen = run_python("import os, sys\nprint(sorted(os.environ), any('site-packages' in p for p in sys.path))").stdout
    assert seen.startswith("['HOME', 'LC_ALL', 'PATH', 'TMPDIR'") or "LIBRARY_PATH" in seen
    assert "False" in seen


HOSTILE = {
    "loops": ("while True: pass", ("cpu_limit",)),
    "sleeps": ("import time\ntime.sleep(1000)", ("timeout",)),
    "takes memory": ("x = bytearray(10**9)", ("error",)),
    "takes memory in pieces": ("x = []\nwhile True: x.append(bytes(10**7))", ("error",)),
    "prints for ever": ("while True: print('x' * 1000)", ("output_limit",)),
    "complains for ever": ("import sys\nwhile True: print('x' * 1000, file=sys.stderr)", ("output_limit",)),
    "reads for ever": ("import sys\nwhile True: sys.stdin.read()", ("cpu_limit",)),
    "reads zeros for ever": ("open('/dev/zero').read()", ("error", "cpu_limit")),
    "writes one large file": ("f = open('f', 'wb')\nfor _ in range(9): f.write(bytes(2**20)); f.flush()", ("error",)),
    "takes away its rights": ("import os\nos.makedirs('a/b')\nos.chmod('a', 0)\nos.chmod('.', 0)", ("ok",)),
    "nests folders": ("import os\nfor _ in range(500): os.mkdir('d'); os.chdir('d')", ("ok",)),
    "leaves a link": ("import os\nos.symlink('/', 'root')\nos.symlink('..', 'up')", ("ok",)),
    "raises its limits": (
        "import resource as r\ntry: r.setrlimit(r.RLIMIT_AS, (2**40,) * 2)\nexcept Exception: pass\nbytearray(10**9)",
        ("error",),
    ),
    "answers for the launcher": (
        "import os\nfor f in range(3, 64):\n  try: os.write(f, b'exit 0 0\\n')\n  except OSError: pass\nos._exit(9)",
        ("error",),
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_end_and_leave_nothing(name):
    code, allowed = HOSTILE[name]
    limits = LIMITS if name != "sleeps" else SandboxLimits(wall_seconds=1)
    start = time.monotonic()
    result = run_python(code, "some input\n", limits=limits)
    assert result.status in allowed, result
    assert time.monotonic() - start < limits.wall_seconds + SLACK
    assert len(result.stdout) <= limits.output_kb * 1024
    assert len(result.stderr) <= limits.output_kb * 1024


def test_all_files_together_are_limited():
    code = "n = 0\nwhile True:\n  open(f'f{n}', 'wb').write(bytes(2**19))\n  n += 1\n  print(n, flush=True)"
    result = run_python(code, limits=LIMITS)
    needs(result, "private_folder")
    assert result.status == "error"
    assert len(result.stdout.split()) <= LIMITS.file_mb * 2


# Each mode of a machine that has less: what is missing, and a protection that must then not be claimed.
MODES = {"": (), "namespaces": ("pid_namespace", "private_folder"), "namespaces,seccomp": ("no_network",)}


@pytest.fixture(params=MODES)
def mode(request, monkeypatch):
    if choose_backend() != "subprocess" or not sys.platform.startswith("linux"):
        pytest.skip("the parts of the Linux subprocess backend")
    monkeypatch.setattr(sandbox, "_WITHOUT", request.param)
    return request.param


def test_children_do_not_outlive_the_program(mode, tmp_path):
    """A child with a session of its own, whose parent is gone, is in no group that could be killed."""
    code = "\n".join(
        [
            "import os, sys, time",
            "try: pid = os.fork()",
            "except OSError: print('refused'); sys.exit()",
            "if pid == 0:",
            "  os.setsid()",
            "  if os.fork() == 0:",
            "    print('left', flush=True)",
            "    time.sleep(1000)",
            "  os._exit(0)",
            "time.sleep(0.5)",
        ]
    )
    result = run_python(code, limits=SandboxLimits(wall_seconds=20, processes=0 if "seccomp" in mode else 4))
    assert not set(MODES[mode]) & set(result.protections)
    needs(result, "children_killed")
    assert result.status == "ok"
    assert result.stdout == "left\n"  # there was a child to be killed: the fixture looks for it
    assert not programs_below(tmp_path)


def test_a_bomb_of_processes(mode, tmp_path):
    """Refused at the first where no process is allowed; else a bounded bomb is cleared at the wall limit."""
    code = (
        "import os, time\nn = 0\ntry:\n  while n < 60:\n    n += 1\n    if os.fork() == 0: time.sleep(1000)\n"
        "except OSError: print('refused at', n)\nelse: time.sleep(1000)"
    )
    result = run_python(code, limits=SandboxLimits(wall_seconds=3))
    if "seccomp" not in mode:
        needs(result, "process_limit")
        assert result.stdout == "refused at 1\n"
    else:
        assert result.status in ("timeout", "ok")
    assert not programs_below(tmp_path)
    threads = "import threading\nt = threading.Thread(target=print, args=('thread',))\nt.start()\nt.join()"
    assert run_python(threads).stdout == "thread\n"


def test_the_program_stays_bound_to_its_launcher_and_has_no_files_in_memory(mode):
    if "seccomp" in mode:
        pytest.skip("the filter of system calls does it")
    code = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
print(libc.prctl(1, 0, 0, 0, 0), ctypes.get_errno(), libc.prctl(15, b"name", 0, 0, 0))
try: os.memfd_create("hidden")
except PermissionError: print("refused")
print(libc.shmget(0, 4096, 0o1600), ctypes.get_errno())
"""
    result = run_python(code)
    needs(result, "process_limit", "no_signals")
    assert result.stdout == "-1 1 0\nrefused\n-1 1\n", result


def test_nothing_is_written_or_read_elsewhere(mode, tmp_path):
    secret = tmp_path / "expected.txt"
    secret.write_text("the expected output")
    code = f"""
import os
for name, act in {{
    "write": lambda: open({str(tmp_path / "new")!r}, "w").write("x"),
    "append": lambda: open({str(secret)!r}, "a").write("x"),
    "remove": lambda: os.remove({str(secret)!r}),
    "rename": lambda: os.rename({str(secret)!r}, "mine"),
    "link": lambda: os.link({str(secret)!r}, "mine"),
    "read": lambda: open({str(secret)!r}).read(),
    "list": lambda: os.listdir({str(tmp_path)!r}),
    "environment": lambda: open("/proc/{os.getpid()}/environ").read(),
    "memory": lambda: open("/proc/{os.getpid()}/mem", "rb").read(1),
}}.items():
    try: print(name, act())
    except OSError: pass
open("own", "w").write("x")
print(open("own").read(), os.listdir())
"""
    result = run_python(code)
    needs(result, "no_writes", "no_reads")
    first, _, rest = result.stdout.partition(" ")
    assert first == "x", result
    assert "own" in rest
    assert "\n" not in rest.strip()
    assert secret.read_text() == "the expected output"
    assert not (tmp_path / "new").exists()


def test_no_network(mode):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        ports = [end.getsockname()[1] for end in (server, udp)]
        code = (
            f"import socket\nfor kind, port in zip((socket.SOCK_STREAM, socket.SOCK_DGRAM), {ports}):\n"
            "  try:\n    s = socket.socket(socket.AF_INET, kind)\n    s.connect(('127.0.0.1', port))\n"
            "    s.send(b'x')\n    print('sent')\n  except OSError: print('refused')"
        )
        result = run_python(code)
        server.settimeout(0.2)
        udp.settimeout(0.2)
        needs(result, "no_network")
        assert result.stdout == "refused\nrefused\n"
        for waiting in (server.accept, lambda: udp.recv(1)):
            with pytest.raises(TimeoutError):
                waiting()


def test_no_signal_reaches_a_process_outside(mode):
    with subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(1000)"]) as victim:
        try:
            code = (
                f"import os\nfor pid in ({victim.pid}, os.getppid()):\n"
                "  try: os.kill(pid, 9)\n  except OSError: pass\nprint('alive')\nos.kill(os.getpid(), 9)"
            )
            if "no_signals" not in run_python("").protections:
                pytest.skip("this machine's sandbox lacks no_signals")
            result = run_python(code)
            assert victim.poll() is None
            assert result.stdout in ("alive\n", "")
            assert result.status == "error"  # by its own signal, at the latest
        finally:
            victim.kill()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux ends a run with its trainer")
def test_a_run_ends_with_a_trainer_that_crashes(tmp_path):
    folder = str(Path(sandbox.__file__).parent)
    code = (
        f"import sys\nsys.path.insert(0, {folder!r})\nimport sandbox\nsandbox.tempfile.tempdir = {str(tmp_path)!r}\n"
        "sandbox.run_python('import time; time.sleep(1000)', limits=sandbox.SandboxLimits(wall_seconds=500))"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as trainer:
        assert wait_for(lambda: any("program.py" in line for line in programs_below(tmp_path)))
        trainer.kill()
    assert wait_for(lambda: not programs_below(tmp_path))
    for place in tmp_path.glob("minicpm4_sandbox_*"):
        sandbox._remove(str(place))  # a folder is what a killed trainer leaves


def wait_for(condition, seconds: float = 30) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_another_thread_stops_a_run():
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    start = time.monotonic()
    assert (
        run_python("import time; time.sleep(1000)", limits=SandboxLimits(wall_seconds=200), stop=stop).status
        == "timeout"
    )
    assert time.monotonic() - start < SLACK


def test_many_threads_at_a_time():
    results = {}
    threads = [
        threading.Thread(target=lambda n=n: results.__setitem__(n, run_python("print(input())", str(n)).stdout))
        for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: f"{n}\n" for n in range(6)}


def filtered(program, machine: str, number: int, *arguments: int, architecture: int | None = None) -> int:
    """What the kernel would answer: an interpreter of the instructions that filters use."""
    right = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]
    data = struct.pack(
        "<iIQ6Q", number, right if architecture is None else architecture, 0, *arguments, *[0] * (6 - len(arguments))
    )
    place, held = 0, 0
    while True:
        code, true, false, constant = program[place]
        if code == 0x20:
            held = struct.unpack_from("<I", data, constant)[0]
        elif code == 0x06:
            return constant
        else:
            met = {0x15: held == constant, 0x35: held >= constant, 0x45: bool(held & constant)}[code]
            place += true if met else false
        place += 1


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_of_system_calls(machine):
    """On both machines, of which one at most runs this test."""
    column = ["x86_64", "aarch64"].index(machine)
    calls = {name: numbers[column] for name, numbers in worker._CALLS.items() if numbers[column] is not None}
    allow = 0x7FFF0000
    for processes in (0, 3):
        program = worker._seccomp_program(machine, 77, processes)
        ask = lambda name, *arguments: filtered(program, machine, calls[name], *arguments)  # noqa: B023, E731
        assert all(ask(name, 77, 77) != allow for name in worker._REFUSED)
        for name in ("kill", "tgkill"):
            assert ask(name, 77, 9) == allow
            assert all(ask(name, pid, 9) != allow for pid in (1, 76, 0, 2**32 - 1))
        assert ask("clone", 0x10000) == allow
        assert (ask("clone", 17) == allow) is bool(processes)
        assert (ask("clone3") == allow) is bool(processes)
        assert all(
            ("fork" not in calls) or (ask(name) == allow) is bool(processes)
            for name in ("fork", "vfork")
            if name in calls
        )
        assert ask("prlimit64", 0, 9, 0) == allow
        assert ask("prlimit64", 0, 9, 2**40) != allow
        assert ask("setrlimit", 9, 5) != allow
        assert ask("prctl", 1, 0) != allow  # what it dies with
        assert ask("prctl", 15) == allow  # its name
        ordinary = (0, 1, 9, 63) if machine == "x86_64" else (56, 63, 64, 222)  # read, write, mmap, uname; openat ...
        assert all(filtered(program, machine, number, 5) == allow for number in ordinary)
        assert filtered(program, machine, ordinary[0], architecture=0x40000003) == 0x80000000  # 32-bit calls: killed
    assert worker._seccomp_program("riscv64", 77, 0) is None


def test_the_report_says_what_is_missing(monkeypatch):
    report = sandbox_report()
    assert "NOT a security boundary" in report
    active = run_python("").protections
    for name in PROTECTIONS:
        line = next(line for line in report.splitlines() if f" {name} " in line)
        assert line.strip().startswith("yes" if name in active else "NO")
    monkeypatch.setattr(sandbox, "active_protections", lambda *_: ("rlimits",))
    assert "NO  no_network" in sandbox_report()


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda: SandboxLimits(wall_seconds=0), "wall_seconds is 0; give a number above 0"),
        (lambda: SandboxLimits(memory_mb=1.5), "memory_mb is 1.5; give a whole number above 0"),
        (lambda: SandboxLimits(processes=-1), "processes is -1; give a whole number from 0"),
        (lambda: run_python("", backend="docker"), "'docker' is unknown; give auto, bwrap, firejail, subprocess"),
    ],
)
def test_wrong_settings_are_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_what_is_not_there_is_said(monkeypatch):
    monkeypatch.setattr(sandbox.shutil, "which", lambda _: None)
    with pytest.raises(ValueError, match="no program of that name is on the PATH"):
        run_python("", backend="bwrap")
    assert choose_backend() == "subprocess"
    with pytest.raises(TypeError, match="code is bytes; give a string"):
        run_python(b"")
    monkeypatch.setattr(sandbox, "_interpreter", lambda: "/bin/false")
    result = run_python("")
    assert result.status == "not_started"
    assert "ended with code 1 before the program began" in result.stderr


def test_a_backend_that_does_not_start_is_not_chosen(monkeypatch):
    """As bwrap in a container without the right to make namespaces."""
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: "/bin/false" if name == "bwrap" else None)
    sandbox._starts.cache_clear()
    assert choose_backend() == "subprocess"
    sandbox._starts.cache_clear()
