"""
The two programs that the rewards start as processes of their own, by the path of this file: the sandbox's launcher
(`launch`, see `sandbox.py`) and the verifier of mathematics (`verify`, see `rewards.py`).

Never imported for its functions by the trainer's process. It imports as little as it can: a launcher is started for
every test of every program.
"""

import errno
import os
import signal
import struct
import sys
import time


# -- launch: gives up rights step by step, starts the program, waits for it and leaves nothing behind ----------------

_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
_CLONE_THREAD = 0x00010000
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 22, 36, 38


class _Stop(BaseException):
    """The trainer says that time is over."""


def _stop(*_):
    raise _Stop


def _say(settings: dict, *words: str) -> None:
    """A line to the trainer, if it still listens."""
    try:  # noqa: SIM105 - contextlib would take as long to import as all the rest
        os.write(settings["status"], " ".join(words).replace("\n", " ").encode("utf-8", "replace") + b"\n")
    except OSError:
        pass


def _libc():
    import ctypes  # not on Windows, where only `verify` runs

    return ctypes.CDLL(None, use_errno=True)


def _checked(value: int) -> int:
    import ctypes

    if value < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return value


def _unshare() -> int:
    """New user, process, network and mount namespaces, as many as this machine allows. Returns their flags."""
    libc = _libc()
    uid, gid = os.geteuid(), os.getegid()
    everything = _NEWUSER | _NEWNET | _NEWPID | _NEWIPC | _NEWNS
    for flags in (everything, _NEWUSER | _NEWNET | _NEWPID, _NEWUSER | _NEWNET):
        if libc.unshare(flags) == 0:
            break
    else:
        return 0
    # Inside the program is "nobody": exec as user 0 would bring the namespace's rights back.
    for name, text in (("setgroups", "deny"), ("uid_map", f"65534 {uid} 1"), ("gid_map", f"65534 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return flags


def _mount_private(folder: str, megabytes: int) -> bool:
    """A file system in memory over the folder."""
    libc = _libc()
    private, no_suid, no_dev, recursive = 1 << 18, 2, 4, 16384
    if libc.mount(None, b"/", None, private | recursive, None) != 0:
        return False
    options = f"size={megabytes}m,nr_inodes=4096,mode=700"
    return libc.mount(b"tmpfs", folder.encode(), b"tmpfs", no_suid | no_dev, options.encode()) == 0


def _copy(given: str, folder: str) -> None:
    for name in os.listdir(given):
        with open(os.path.join(given, name), "rb") as source, open(os.path.join(folder, name), "wb") as file:
            file.write(source.read())
    os.chdir(folder)  # anew, where another file system lies over it


def _landlock(folder: str) -> int:
    """Landlock (kernel documentation, userspace-api/landlock): returns its version, 0 where there is none."""
    import ctypes

    libc = _libc()
    version = libc.syscall(444, None, 0, 1)
    if version < 1:
        return 0
    handled = (1 << 13) - 1  # execute, write, read, list, remove, make ...
    handled |= (1 << 13 if version >= 2 else 0) | (1 << 14 if version >= 3 else 0) | (1 << 15 if version >= 5 else 0)
    network = 3 if version >= 4 else 0  # bind and connect of TCP
    scopes = 3 if version >= 6 else 0  # abstract sockets, signals
    attributes = struct.pack("QQQ", handled, network, scopes)
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = _checked(libc.syscall(444, attributes, ctypes.c_size_t(size), 0))
    execute, write, read, listing = 1, 2, 4, 8
    of_files = (1 | 2 | 4 | 1 << 14 | 1 << 15) & handled
    library = (execute, read, listing)
    places = dict.fromkeys((sys.base_prefix, sys.base_exec_prefix, os.path.dirname(os.__file__)), sum(library))
    places |= dict.fromkeys(("/usr", "/lib", "/lib32", "/lib64", "/bin", "/nix/store"), sum(library))
    places |= dict.fromkeys(("/etc/ld.so.cache", "/etc/localtime", "/dev/zero", "/dev/random", "/dev/urandom"), read)
    places |= {sys.executable: execute | read, "/dev/null": write | read, folder: handled}
    for place, rights in places.items():
        try:
            opened = os.open(place, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        if not os.path.isdir(place):
            rights &= of_files
        _checked(libc.syscall(445, rules, 1, struct.pack("=Qi", rights, opened), 0))
        os.close(opened)
    _checked(libc.syscall(446, rules, 0))
    os.close(rules)
    return version


# System calls by name: (x86-64, arm64; None where the architecture has none).
_CALLS = {
    "clone": (56, 220), "fork": (57, None), "vfork": (58, None), "clone3": (435, 435), "kill": (62, 129),
    "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "socket": (41, 198), "io_uring_setup": (425, 425), "unshare": (272, 97),
    "setns": (308, 268), "mount": (165, 40), "bpf": (321, 280), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "setrlimit": (160, 164),
    "prlimit64": (302, 261), "pidfd_getfd": (438, 438), "process_madvise": (440, 440), "memfd_create": (319, 279),
    "memfd_secret": (447, 447), "prctl": (157, 167), "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190),
}  # fmt: skip
_REFUSED = (
    "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_send_signal", "ptrace", "process_vm_readv", "process_vm_writev",
    "socket", "io_uring_setup", "unshare", "setns", "mount", "bpf", "add_key", "request_key", "keyctl",
    "perf_event_open", "userfaultfd", "pidfd_getfd", "process_madvise", "tkill",
    "memfd_create", "memfd_secret", "shmget", "msgget", "semget",
)  # fmt: skip


def _seccomp_program(machine: str, pid: int, processes: int) -> list[tuple[int, int, int, int]] | None:
    """
    Instructions (code, jump if true, jump if false, constant) of a filter of system calls, None on other machines:
    no process but threads, no signal but to itself, no socket, no file or segment in memory, which no limit would
    count; limits cannot be changed (the call does nothing), nor what happens to it when the launcher dies.
    """
    column = {"x86_64": 0, "aarch64": 1, "arm64": 1}.get(machine)
    if column is None or struct.calcsize("P") != 8 or sys.byteorder != "little":
        return None
    number = {name: calls[column] for name, calls in _CALLS.items() if calls[column] is not None}
    load, equal, above, bits, ret = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, again, missing, ignore, kill = (
        0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.EAGAIN, 0x00050000 | errno.ENOSYS, 0x00050000,
        0x80000000,
    )  # fmt: skip
    first = 16  # byte offset of the first argument; each has 8 bytes, the lower half first
    code = [(load, 0, 0, 4), (equal, 1, 0, (0xC000003E, 0xC00000B7)[column]), (ret, 0, 0, kill), (load, 0, 0, 0)]
    if column == 0:
        code += [(above, 0, 1, 0x40000000), (ret, 0, 0, refuse)]  # the x32 numbers of the same calls
    for name in _REFUSED:
        code += [(equal, 0, 1, number[name]), (ret, 0, 0, refuse)]
    for name in ("kill", "tgkill"):
        code += [(equal, 0, 4, number[name]), (load, 0, 0, first), (equal, 0, 1, pid), (ret, 0, 0, allow)]
        code += [(ret, 0, 0, refuse)]
    code += [(equal, 0, 4, number["prctl"]), (load, 0, 0, first), (equal, 0, 1, _PR_SET_PDEATHSIG)]
    code += [(ret, 0, 0, refuse), (ret, 0, 0, allow)]
    code += [(equal, 0, 1, number["setrlimit"]), (ret, 0, 0, ignore)]
    # prlimit64 reads a limit where its third argument, the new one, is null.
    code += [(equal, 0, 6, number["prlimit64"]), (load, 0, 0, first + 16), (equal, 0, 3, 0), (load, 0, 0, first + 20)]
    code += [(equal, 0, 1, 0), (ret, 0, 0, allow), (ret, 0, 0, ignore)]
    if processes == 0:
        for name in ("fork", "vfork"):
            if name in number:
                code += [(equal, 0, 1, number[name]), (ret, 0, 0, again)]
        # clone3's flags lie in memory, out of a filter's reach; without it the C library takes clone.
        code += [(equal, 0, 1, number["clone3"]), (ret, 0, 0, missing)]
        code += [(equal, 0, 4, number["clone"]), (load, 0, 0, first), (bits, 0, 1, _CLONE_THREAD), (ret, 0, 0, allow)]
        code += [(ret, 0, 0, again)]
    return [*code, (ret, 0, 0, allow)]


def _seccomp(pid: int, processes: int) -> bool:
    import ctypes

    program = _seccomp_program(os.uname().machine, pid, processes)
    if program is None:
        return False
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("HP", len(program), ctypes.addressof(code)))
    return _libc().prctl(_PR_SET_SECCOMP, 2, header, 0, 0) == 0


def _tasks_of_user() -> int:
    """Processes and threads of this user, which the kernel's limit counts."""
    count, uid = 0, os.geteuid()
    for entry in os.scandir("/proc") if os.path.isdir("/proc") else ():
        try:
            if entry.name.isdigit() and entry.stat().st_uid == uid:
                count += len(os.listdir(f"/proc/{entry.name}/task"))
        except OSError:  # gone meanwhile
            pass
    return count


def _limit(settings: dict, tasks: int | None) -> None:
    import resource

    size = settings["memory_mb"] * 2**20
    limits = {
        "RLIMIT_CPU": settings["cpu_seconds"],
        "RLIMIT_AS": size,
        "RLIMIT_DATA": size,
        "RLIMIT_FSIZE": settings["file_mb"] * 2**20,
        "RLIMIT_NOFILE": settings["open_files"],
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
        **({} if tasks is None else {"RLIMIT_NPROC": tasks}),
    }
    for name, value in limits.items():
        if hasattr(resource, name):
            which = getattr(resource, name)
            _, most = resource.getrlimit(which)
            value = value if most == resource.RLIM_INFINITY else min(value, most)
            hard = value + 1 if name == "RLIMIT_CPU" and value != most else value  # a signal first, then the kill
            try:  # noqa: SIM105
                resource.setrlimit(which, (value, hard))
            except (ValueError, OSError):  # macOS refuses some
                pass


def _become_program(settings: dict, active: list[str], flags: int) -> None:
    """In the program's own process: give up what is left, say what is active, and become the program."""
    linux = sys.platform.startswith("linux")
    without = settings["without"]
    filters = linux and "seccomp" not in without and _seccomp_program(os.uname().machine, 1, 0) is not None
    tasks, landlock = None, 0
    if settings["processes"] or not filters:
        # A user namespace has a count of its own (Linux 5.14), in which the launcher, process 1 and the program stand.
        own_count = flags & _NEWUSER and tuple(map(int, os.uname().release.split(".")[:2])) >= (5, 14)
        tasks = (3 if own_count else _tasks_of_user()) + (settings["processes"] or 16)
    if linux:
        libc = _libc()
        _checked(libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
        _checked(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        landlock = 0 if "landlock" in without else _landlock(settings["folder"])
    _limit(settings, tasks)
    active.append("rlimits")
    filters = filters and _seccomp(os.getpid(), settings["processes"])
    # The kernel counts no processes of root.
    if (filters and settings["processes"] == 0) or (tasks is not None and not settings["as_root"]):
        active.append("process_limit")
    if filters or landlock >= 6:
        active.append("no_signals")
    if filters:
        active.append("no_network")
    if landlock:
        active += ["no_writes", "no_reads"]
    _say(settings, "protections", *active)
    program = os.path.join(settings["folder"], "program.py")
    os.execv(sys.executable, [sys.executable, "-I", "-S", program])


def _kill_children() -> None:
    """Kills whatever is below this process, which is the reaper of all orphans there, until nothing is."""
    until = time.monotonic() + 5
    while time.monotonic() < until:
        parents = {}
        for name in os.listdir("/proc"):
            try:
                with open(f"/proc/{int(name)}/stat", "rb") as file:
                    parents[int(name)] = int(file.read().rsplit(b")", 1)[1].split()[1])
            except (OSError, ValueError):  # gone meanwhile, or no process
                pass
        below, grown = {os.getpid()}, True
        while grown:
            more = {pid for pid, parent in parents.items() if parent in below} - below
            below |= more
            grown = bool(more)
        for pid in below - {os.getpid()}:
            try:  # noqa: SIM105
                os.kill(pid, signal.SIGKILL)
            except OSError:
                pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:  # none is left
            return


def _supervise(settings: dict, active: list[str], flags: int) -> None:
    """Starts the program, waits, says how it ended, and leaves nothing behind."""
    import resource

    linux = sys.platform.startswith("linux")
    if flags & _NEWPID:
        active += [
            "children_killed",
            "pid_namespace",
            "no_signals",
        ]  # this is process 1: the kernel kills the rest with it
    elif linux and _libc().prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0:
        active.append("children_killed")
    if flags & _NEWNS and _mount_private(settings["folder"], settings["file_mb"]):
        active.append("private_folder")
    _copy(settings["given"], settings["folder"])
    child = os.fork()
    if child == 0:
        try:
            _become_program(settings, active, flags)
        except BaseException as error:
            _say(settings, "failed", f"{type(error).__name__}: {error}")
        finally:
            os._exit(127)
    # The program has its own copies of these: a reader must see the end when the program ends.
    for descriptor in (0, 1, 2):
        os.close(descriptor)
    try:
        pid = 0
        while pid != child:
            pid, state = os.wait()
    except _Stop:
        _kill_children()
        return
    code = os.waitstatus_to_exitcode(state)
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    # The kernel's limit counts by ticks of its clock, and usage exactly: they differ a little.
    over = spent.ru_utime + spent.ru_stime >= 0.8 * settings["cpu_seconds"]
    cpu_limit = code == -signal.SIGXCPU or (code == -signal.SIGKILL and over)
    if not flags & _NEWPID and linux:
        _kill_children()
    _say(settings, "exit", str(code), str(int(cpu_limit)))


def launch(settings: dict) -> None:
    os.set_inheritable(settings["status"], False)
    linux = sys.platform.startswith("linux")
    signal.signal(signal.SIGTERM, _stop)
    active, flags = [], 0
    settings["as_root"] = os.geteuid() == 0
    # The trainer kills at the wall limit. If it is gone, these end the run: its death, and the clock.
    if linux:
        _libc().prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, settings["wall_seconds"] + 2)
    try:
        if settings["backend"] == "subprocess" and linux and "namespaces" not in settings["without"]:
            flags = _unshare()
            active += ["no_network"] if flags else []
        elif settings["backend"] != "subprocess":
            active += ["children_killed", "pid_namespace", "no_signals", "no_network", "no_writes"]
            active += ["private_folder"] if settings["backend"] == "bwrap" else []
        if not flags & _NEWPID:
            _supervise(settings, active, flags)
            return
        inner = os.fork()
        if inner == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _libc().prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            try:
                _supervise(settings, active, flags)
            finally:
                os._exit(0)
        try:
            os.waitpid(inner, 0)
        except _Stop:
            os.kill(inner, signal.SIGKILL)
            os.waitpid(inner, 0)  # process 1 is gone when all others of its namespace are
    except BaseException as error:
        _say(settings, "failed", f"{type(error).__name__}: {error}")


# -- verify: answers requests, one JSON object a line, until its input ends ------------------------------------------

_MARKED = ("$", "\\boxed", "\\(", "\\[", "\\begin{")


def _read_gold(text: str):
    """What math-verify reads from a gold answer: a list that is empty where it finds no mathematics."""
    import re

    from math_verify import parse

    text = text.rsplit("####", 1)[-1].strip()
    if scientific := re.fullmatch(r"([+-]?\d+(?:\.\d+)?)[eE]([+-]?\d+)", text):
        text = rf"{scientific[1]} \cdot 10^{{{scientific[2]}}}"
    plain = re.sub(r"\\(?:text|mathrm|mbox|operatorname)\s*\{[^{}]*\}", "", text)
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]{2,}", plain)
    if not any(mark in text for mark in _MARKED) and not words:
        # A bare answer is all mathematics: unmarked, "10^{5}" would be read as 10 and "\\frac12" not at all.
        text = rf"\boxed{{{text}}}"
    found = parse(text, extraction_mode="first_match", parsing_timeout=None)
    return found if any(not isinstance(part, str) for part in found) else []


def _read_answer(text: str):
    """The last box, else the last formula or number; what is boxed wins, and nothing else is tried in its place."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    configuration = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    return parse(text, configuration, extraction_mode="first_match", parsing_timeout=None)


def _shown(found: list) -> str | None:
    """The text of what was read. Never of the object: an integer may have more digits than can be written."""
    return next((part[:200] for part in found if isinstance(part, str)), "?") if found else None


def verify() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's; this ends with its input
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
    import json
    import logging
    import traceback

    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what a library prints is no reply

    def reply(**fields):
        replies.write(json.dumps(fields) + "\n")
        replies.flush()

    requests = os.fdopen(0, encoding="ascii", closefd=False)
    setup = json.loads(requests.readline())
    sys.path[:] = setup["path"]
    try:
        import resource

        size = setup["memory_mb"] * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    except (ImportError, ValueError, OSError):
        pass  # no such limit here: Windows, or a lower one holds
    logging.disable(logging.CRITICAL)  # that timeouts are off, for each answer
    try:
        from math_verify import verify as equal

        assert equal(_read_gold("1"), _read_answer("$1$"), timeout_seconds=None)
    except BaseException:
        reply(error=traceback.format_exc())
        return
    reply(ready=True)
    clock = getattr(signal, "setitimer", lambda *_: None)
    for line in requests:
        request = json.loads(line)
        # The trainer kills at its deadline. If it is gone, this clock ends an expression that would never end.
        clock(getattr(signal, "ITIMER_REAL", 0), request["seconds"] + 1)
        try:
            gold = _read_gold(request["gold"])
            reply(gold=_shown(gold))
            if gold:
                answer = _read_answer(request["answer"])
                reply(answer=_shown(answer), correct=bool(answer) and equal(gold, answer, timeout_seconds=None))
        except Exception:
            reply(error=traceback.format_exc())
        clock(getattr(signal, "ITIMER_REAL", 0), 0)


if __name__ == "__main__":
    if sys.argv[1] == "verify":
        verify()
    else:
        given = dict(word.split("=", 1) for word in sys.argv[2:])
        texts = ("given", "folder", "backend", "without")
        launch(
            {
                name: text if name in texts else float(text) if name == "wall_seconds" else int(text)
                for name, text in given.items()
            }
        )
