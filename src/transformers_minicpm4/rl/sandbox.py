"""
Runs a model's Python program with limits: time, memory, output, files, processes, network. For the code reward of
MiniCPM4's reinforcement learning (arXiv 2506.07900, section 3.2).

NOT A SECURITY BOUNDARY. It keeps a training run alive and its machine clean when a program loops, prints for ever,
fills memory or deletes files. The kernel is shared with the program and is attacked through bugs, which nothing here
prevents: whoever fears an adversary runs the trainer in a virtual machine. What is active depends on the machine;
[`sandbox_report`] says it.

The program is started by a launcher (`worker.py`), a small process that gives up rights step by step: nothing of ours
runs between fork and exec in the trainer, which may hold threads and a GPU.
"""

import contextlib
import functools
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path


# What may be active, and what it means. A result lists the names.
PROTECTIONS = {
    "rlimits": "CPU time, memory, file size and open files are limited by the kernel",
    "process_limit": "no more processes than `processes` (none where it is 0)",
    "children_killed": "every process the program started ends with it, also one that left its group",
    "pid_namespace": "processes outside cannot be seen or signalled",
    "no_signals": "no signal reaches a process outside",
    "no_network": "no connection, not even to this machine",
    "no_writes": "files are written only below the temporary folder",
    "no_reads": "only the interpreter, system libraries and the temporary folder can be read",
    "private_folder": "the temporary folder is a file system of its own, limited in size and gone with the program",
}
BACKENDS = ("bwrap", "firejail", "subprocess")
_WITHOUT = ""  # tests name here what shall count as missing: namespaces, landlock, seccomp


@dataclass(frozen=True)
class SandboxLimits:
    """
    Limits of one run.

    Args:
        wall_seconds (`float`): time from the start to the kill.
        cpu_seconds (`int`): CPU time of each process.
        memory_mb (`int`): address space of each process, in MiB.
        file_mb (`int`): size of a file, in MiB; with a private folder also of all files in it.
        open_files (`int`): open file descriptors.
        output_kb (`int`): bytes read of stdout, and of stderr, in KiB; more ends the run.
        processes (`int`): processes the program may start besides itself; threads are bounded by memory alone. 0 needs
            seccomp (Linux on x86-64 or arm64); elsewhere, and for other numbers, the kernel counts processes and
            threads of the user, and exempts root.

    Raises:
        ValueError: a limit that is not positive (`processes`: negative).
    """

    wall_seconds: float = 10.0
    cpu_seconds: int = 5
    memory_mb: int = 512
    file_mb: int = 16
    open_files: int = 64
    output_kb: int = 1024
    processes: int = 0

    def __post_init__(self):
        for name, value in asdict(self).items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            whole = number and (name == "wall_seconds" or isinstance(value, int))
            if not whole or value < 0 or (value == 0 and name != "processes"):
                allowed = "a number above 0" if name == "wall_seconds" else "a whole number above 0"
                allowed = "a whole number from 0" if name == "processes" else allowed
                raise ValueError(f"SandboxLimits: {name} is {value!r}; give {allowed}")


@dataclass(frozen=True)
class SandboxResult:
    """
    How a run ended.

    Args:
        status (`str`): `ok` (exit code 0), `error` (another exit code, or a signal), `timeout` (wall), `cpu_limit`,
            `output_limit`, or `not_started` (`stderr` says why).
        exit_code (`int` or None): of the program; -n for signal n; None where it was ended from outside.
        stdout, stderr (`str`): what was read up to the limit, as UTF-8 with replacement characters.
        wall_seconds (`float`): time that it took, start and clean-up included.
        protections (`tuple` of `str`): those that were active, keys of `PROTECTIONS`.
        backend (`str`): of `BACKENDS`.
    """

    status: str
    exit_code: int | None
    stdout: str
    stderr: str
    wall_seconds: float
    protections: tuple[str, ...]
    backend: str


def choose_backend(backend: str = "auto") -> str:
    """
    `backend`, or for `"auto"` the first of `bwrap`, `firejail`, `subprocess` that is found and starts a program.

    Raises:
        ValueError: an unknown name, or one that is not on this machine.
        NotImplementedError: not a POSIX system.
    """
    if os.name != "posix":
        raise NotImplementedError("the sandbox needs a POSIX system; on Windows run the code reward under WSL")
    if backend == "auto":
        return next(name for name in BACKENDS if name == "subprocess" or (shutil.which(name) and _starts(name)))
    if backend not in BACKENDS:
        raise ValueError(f"sandbox backend {backend!r} is unknown; give auto, {', '.join(BACKENDS)}")
    if backend != "subprocess" and not shutil.which(backend):
        raise ValueError(f"sandbox backend {backend!r} was asked for, but no program of that name is on the PATH")
    return backend


@functools.cache
def _starts(backend: str) -> bool:
    """Found is not enough: in a container without the rights, bwrap and firejail refuse to start."""
    return run_python("print(6 * 7)", backend=backend).stdout == "42\n"


@functools.cache
def active_protections(backend: str = "auto", limits: SandboxLimits | None = None) -> tuple[str, ...]:
    """
    The protections that a run on this machine has (keys of `PROTECTIONS`), found by running an empty program once.

    Raises:
        RuntimeError: the program could not be started; the message says why.
    """
    result = run_python("", limits=limits or SandboxLimits(), backend=backend)
    if result.status != "ok":
        raise RuntimeError(
            f"the sandbox ({result.backend}) cannot run an empty program: {result.status} {result.stderr}"
        )
    return result.protections


def sandbox_report(backend: str = "auto") -> str:
    """What protects this machine from a program in the sandbox, and what does not, as text of some lines."""
    backend = choose_backend(backend)
    active = active_protections(backend)
    lines = [
        f"Sandbox for model-written code: backend {backend}. It is NOT a security boundary: the kernel is shared."
    ]
    lines += [f"  {'yes' if name in active else 'NO ':3} {name:15} {text}" for name, text in PROTECTIONS.items()]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        lines.append("  The trainer runs as root: run it as a user, so that a program that escapes is not root.")
    return "\n".join(lines)


def run_python(
    code: str,
    stdin: str = "",
    *,
    files: dict[str, str] | None = None,
    limits: SandboxLimits | None = None,
    backend: str = "auto",
    stop: threading.Event | None = None,
) -> SandboxResult:
    """
    Runs `code` with the interpreter's standard library alone (`python -I -S`) and returns how it ended.

    Safe to call from many threads. When it returns, no process and no file of the run is left (without
    `children_killed`: no process of its group).

    Args:
        code (`str`): the program.
        stdin (`str`): its standard input; the end of the file follows.
        files (`dict`, *optional*): further text files beside the program, by name.
        limits (`SandboxLimits`, *optional*).
        backend (`str`): `auto` or one of `BACKENDS`.
        stop (`threading.Event`, *optional*): set by another thread, it ends the run as its wall limit would.

    Raises:
        TypeError: code or stdin is no string.
        ValueError, NotImplementedError: see [`choose_backend`].
    """
    for name, value in (("code", code), ("stdin", stdin)):
        if not isinstance(value, str):
            raise TypeError(f"run_python: {name} is {type(value).__name__}; give a string")
    backend = choose_backend(backend)
    limits = limits or SandboxLimits()
    place = os.path.realpath(tempfile.mkdtemp(prefix="minicpm4_sandbox_"))
    # The launcher copies what is given to the program's folder, over which it may have put a file system of its own.
    given, folder = os.path.join(place, "given"), os.path.join(place, "work")
    start = time.monotonic()
    status_read, status_write = os.pipe()
    try:
        os.mkdir(given)
        os.mkdir(folder)
        for name, text in {**(files or {}), "program.py": code}.items():
            with open(os.path.join(given, name), "w", encoding="utf-8", errors="replace", newline="") as file:
                file.write(text)
        with tempfile.TemporaryFile() as source:
            source.write(stdin.encode("utf-8", "replace"))
            source.seek(0)
            process = subprocess.Popen(
                _command(backend, given, folder, limits, status_write),
                stdin=source,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=folder,
                env=_environment(folder),
                pass_fds=(status_write,),
                start_new_session=True,
            )
        os.close(status_write)
        status_write = -1
        try:
            ended, output = _read(process, status_read, start + limits.wall_seconds, limits.output_kb * 1024, stop)
        finally:
            _end(process)
    finally:
        os.close(status_read)
        if status_write >= 0:
            os.close(status_write)
        _remove(place)
    return _result(ended, output, time.monotonic() - start, backend, process.returncode)


def _end(process: subprocess.Popen) -> None:
    # The launcher is asked first: it knows the processes that have left its group.
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(6)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.stdout.close()
    process.stderr.close()
    process.wait()


def _environment(folder: str) -> dict[str, str]:
    # Nothing of the trainer's, which may hold keys; but its interpreter may need its libraries.
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH") if name in os.environ}
    return {"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LC_ALL": "C.UTF-8", **kept}


def _interpreter() -> str:
    # The base interpreter: a virtual environment's link may stand where the sandbox cannot read.
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def _command(backend: str, given: str, folder: str, limits: SandboxLimits, status: int) -> list[str]:
    settings = {"given": given, "folder": folder, "status": status, "backend": backend, "without": _WITHOUT}
    words = [f"{name}={value}" for name, value in {**settings, **asdict(limits)}.items()]
    script = str(Path(__file__).resolve().with_name("worker.py"))
    launcher = [_interpreter(), "-I", "-S", script, "launch", *words]
    if backend == "bwrap":
        walls = ["--unshare-all", "--die-with-parent", "--ro-bind", "/", "/", "--dev", "/dev"]
        walls += ["--size", str(limits.file_mb * 2**20), "--tmpfs", folder, "--chdir", folder]
        return [shutil.which("bwrap"), *walls, "--", *launcher]
    if backend == "firejail":
        walls = ["--quiet", "--noprofile", "--net=none", f"--keep-fd={status}", "--read-only=/"]
        return [shutil.which("firejail"), *walls, f"--read-write={folder}", "--", *launcher]
    return launcher


def _read(process, status_read: int, deadline: float, limit: int, stop) -> tuple[str | None, dict]:
    """Reads both outputs and the status until the launcher is gone; names the limit that was broken, if any."""
    pipes = {process.stdout.fileno(): "stdout", process.stderr.fileno(): "stderr", status_read: "status"}
    output = {name: bytearray() for name in pipes.values()}
    with selectors.DefaultSelector() as selector:
        for pipe in pipes:
            os.set_blocking(pipe, False)
            selector.register(pipe, selectors.EVENT_READ)
        launcher_gone = False
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0 or (stop is not None and stop.is_set()):
                return "timeout", output
            ready = selector.select(0 if launcher_gone else left if stop is None else min(left, 0.1))
            if launcher_gone and not ready:
                return None, output  # a process left behind may hold the pipes open: what was written is read
            for key, _ in ready:
                name = pipes[key.fd]
                data = os.read(key.fd, 65536)
                if not data:
                    selector.unregister(key.fd)
                    launcher_gone |= name == "status"
                output[name] += data[: limit + 1 - len(output[name])]
                if len(output[name]) > limit:
                    del output[name][limit:]
                    return "output_limit", output
    return None, output


def _result(ended: str | None, output: dict, seconds: float, backend: str, launcher_code: int) -> SandboxResult:
    lines = bytes(output["status"]).decode("utf-8", "replace").splitlines()
    said = {word: rest for word, _, rest in (line.partition(" ") for line in lines)}
    exit_code, over_cpu = map(int, said["exit"].split()) if "exit" in said else (None, 0)
    stdout, stderr = (bytes(output[name]).decode("utf-8", "replace") for name in ("stdout", "stderr"))
    if "failed" in said:
        status, stderr = "not_started", said["failed"]
    elif ended:
        status, exit_code = ended, None
    elif "protections" not in said:
        status, stderr = "not_started", f"{backend} ended with code {launcher_code} before the program began: {stderr}"
    elif exit_code is None:
        status = "error"  # the launcher was killed: by the program, or by the kernel's out-of-memory killer
    elif over_cpu:
        status = "cpu_limit"
    else:
        status = "ok" if exit_code == 0 else "error"
    active = said.get("protections", "").split()
    return SandboxResult(
        status, exit_code, stdout, stderr, seconds, tuple(name for name in PROTECTIONS if name in active), backend
    )


def _remove(place: str) -> None:
    """
    Removes a folder whatever is in it: folders without rights, or nested deeper than recursion or a path's length
    goes. Each folder's folders move up to `place` before it goes.
    """
    folders, moved = [place], 0
    while folders:
        folder = folders.pop()
        for entry in list(os.scandir(folder)):
            if entry.is_dir(follow_symlinks=False):
                os.chmod(entry.path, 0o700)
                target = os.path.join(place, f".{moved}")
                moved += 1
                os.rename(entry.path, target)
                folders.append(target)
            else:
                os.unlink(entry.path)
        if folder != place:
            os.rmdir(folder)
    os.rmdir(place)
