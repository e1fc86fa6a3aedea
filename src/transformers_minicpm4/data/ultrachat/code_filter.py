"""
Python code that must run on its own: no imports from outside the standard library, no questions to a user (MiniCPM4,
arXiv 2506.07900, UltraChat v2: AST filter of the code interpreter's data, discard after 10 failed attempts).

The code is parsed, never run. Names are followed through imports, assignments, `__import__`, `importlib`, `getattr`
with a constant name, `__dict__`, `vars`, `sys.modules` and `__builtins__`, in every scope; where control flow leaves a
choice, each choice counts. Values in containers, attributes and arguments are not followed: this filters data and is
no sandbox.
"""

import ast
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from .reasons import OK, column_of, join_reasons, shorten
from .text_counts import read_markdown


# Modules whose use is a dialogue: terminal, windows, browser, debugger. Those of third parties count where allowed.
_DIALOGUE = {
    "bdb",
    "cmd",
    "code",
    "curses",
    "fileinput",
    "getpass",
    "pdb",
    "pty",
    "readline",
    "termios",
    "tty",
    "msvcrt",
}
_WINDOWS = {"antigravity", "idlelib", "tkinter", "turtle", "turtledemo", "webbrowser"}
_PROMPTS = {"inquirer", "keyboard", "mouse", "prompt_toolkit", "pynput", "questionary", "textual"}
_TOOLKITS = {"PyQt5", "PyQt6", "PySide2", "PySide6", "PySimpleGUI", "dearpygui", "easygui", "flet", "gi", "kivy", "wx"}
_SCREENS = {"gradio", "ipywidgets", "nicegui", "pyautogui", "pygame", "pyglet", "streamlit"}
INTERACTIVE_MODULES = frozenset(_DIALOGUE | _WINDOWS | _PROMPTS | _TOOLKITS | _SCREENS)
# Ends of dotted names, so that os.sys.stdin counts as sys.stdin.
_INTERACTIVE_NAMES = {
    ("builtins", "input"),
    ("builtins", "breakpoint"),
    ("sys", "stdin"),
    ("sys", "__stdin__"),
    ("sys", "breakpointhook"),
    ("pyplot", "show"),
    ("pyplot", "ginput"),
    ("cv2", "imshow"),
    ("cv2", "waitKey"),
}
_OPENERS = {("builtins", "open"), ("io", "open"), ("os", "open"), ("os", "fdopen"), ("os", "read")}
_TERMINALS = {0, "/dev/stdin", "/dev/tty", "/dev/fd/0", "/proc/self/fd/0", "CON", "CONIN$", "con"}
_IMPORTERS = {("builtins", "__import__"), ("importlib", "import_module"), ("importlib", "__import__")}
_RUNNERS = {("builtins", "exec"), ("builtins", "eval"), ("builtins", "compile")}
_MAX_DEPTH = 5  # of code in strings in code
_MAX_PARTS = 32  # of a dotted name that is followed
_MAX_MEANINGS = 100  # of one expression
_MAX_STEPS = 3_000_000  # names looked at in one program: some seconds
_FENCED = ("py", "python", "python3")

UNKNOWN = ""  # the meaning "some value of the user's own"


def extract_code(text: str) -> str:
    """The Python of a Markdown answer: its closed ```python fences, joined; the text itself where it has none."""
    blocks = [f"{code}\n" for language, code in read_markdown(text).code_blocks if language.lower() in _FENCED]
    return "\n".join(blocks) if blocks else text


class _TooTangled(Exception):
    """Branches or meanings multiply beyond what is followed."""


def _dotted(base: str, name: str) -> str:
    """`base.name`; of a very long one the first part and the last, so that a chain of n takes time in proportion."""
    if base == UNKNOWN:
        return UNKNOWN
    whole = f"{base}.{name}"
    if whole.count(".") < _MAX_PARTS:
        return whole
    parts = whole.split(".")
    return ".".join([parts[0], *parts[1 - _MAX_PARTS :]])


def _tail(name: str) -> tuple[str, ...]:
    return tuple(name.split(".")[-2:])


class _Reader:
    """
    Walks one program in the order it would run and collects problems.

    An environment maps a name to the set of dotted names it may mean (`UNKNOWN`: a value of the program's own). A name
    without entry means the builtin. Bodies of functions are read after the scope around them, with both the
    environment at their definition and that at the end.
    """

    def __init__(self, allowed: frozenset[str], depth: int = 0):
        self.allowed = allowed
        self.depth = depth
        self.problems: dict[str, None] = {}  # a set that keeps its order
        self.shared: dict[str, set[str]] = {}  # names bound through global and nonlocal
        self.known: dict[ast.AST, set[str]] = {}  # meanings under the environment of the moment
        self.steps = 0

    def step(self, cost: int = 1):
        self.steps += cost
        if self.steps > _MAX_STEPS:
            raise _TooTangled

    def report(self, code: str, node: ast.AST, detail: str):
        self.problems.setdefault(f"{code}: line {getattr(node, 'lineno', 1)}, {shorten(detail)}")

    # -- meanings --------------------------------------------------------------------------------------------------

    def lookup(self, name: str, env: dict) -> set[str]:
        found = set(env.get(name) or (f"builtins.{name}",)) | self.shared.get(name, set())
        if name == "__builtins__" and "builtins.__builtins__" in found:
            found = {"builtins"}
        if f"builtins.{name}" in found:
            found |= {f"{module}.{name}" for module in env.get("*", ())}
        return found

    def meanings(self, node: ast.AST, env: dict) -> set[str]:
        """The dotted names an expression may stand for; `UNKNOWN` for anything else."""
        if node not in self.known:
            found = self._meanings(node, env)
            self.step(len(found))
            if len(found) > _MAX_MEANINGS:
                raise _TooTangled
            self.known[node] = found
        return self.known[node]

    def _meanings(self, node: ast.AST, env: dict) -> set[str]:
        if isinstance(node, ast.Name):
            return self.lookup(node.id, env)
        if isinstance(node, ast.Attribute):
            bases = self.meanings(node.value, env)
            if node.attr == "__dict__":
                return bases
            return {_dotted(base, node.attr) for base in bases}
        if isinstance(node, ast.NamedExpr):
            return self.meanings(node.value, env)
        if isinstance(node, ast.IfExp):
            return self.meanings(node.body, env) | self.meanings(node.orelse, env)
        if isinstance(node, ast.BoolOp):
            return set().union(*(self.meanings(value, env) for value in node.values))
        if isinstance(node, ast.Subscript):
            return self._meanings_of_item(self.meanings(node.value, env), node.slice, env)
        if isinstance(node, ast.Call):
            return self._meanings_of_call(node, env)
        return {UNKNOWN}

    def _meanings_of_item(self, bases: set[str], index: ast.AST, env: dict) -> set[str]:
        key = index.value if isinstance(index, ast.Constant) else None
        if not isinstance(key, str):
            return {UNKNOWN}
        found = set()
        for base in bases:
            if _tail(base) == ("sys", "modules"):
                found.add(key)
            elif base == "globals()":
                found |= self.lookup(key, env)
            else:
                found.add(_dotted(base, key))
        return found

    def _meanings_of_call(self, node: ast.Call, env: dict) -> set[str]:
        found = set()
        first = node.args[0] if node.args else None
        for name in self.meanings(node.func, env):
            if _tail(name) in _IMPORTERS and isinstance(first, ast.Constant) and isinstance(first.value, str):
                whole = first.value if _tail(name)[1] == "import_module" else first.value.split(".")[0]
                found.add(whole)
            elif name in ("builtins.globals", "builtins.locals") or (name == "builtins.vars" and first is None):
                found.add("globals()")
            elif name == "builtins.vars":
                found |= self.meanings(first, env)
            elif name == "builtins.getattr" and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
                bases = self.meanings(first, env)
                key = node.args[1].value
                found |= {_dotted(base, key) if isinstance(key, str) else UNKNOWN for base in bases}
            elif name.endswith((".__getitem__", ".get", ".pop")) and isinstance(first, ast.Constant):
                owned = self.meanings(node.func.value, env) if isinstance(node.func, ast.Attribute) else {UNKNOWN}
                found |= self._meanings_of_item(owned, first, env)
            else:
                found.add(UNKNOWN)
        return found

    # -- expressions -----------------------------------------------------------------------------------------------

    def check(self, node: ast.AST | None, env: dict):
        """Report what an expression uses; bind what it binds."""
        if node is None:
            return
        if isinstance(node, ast.Lambda):
            for default in (*node.args.defaults, *node.args.kw_defaults):
                self.check(default, env)
            self.known.clear()  # another environment begins, and ends
            self.step(len(env))
            self.check(node.body, {**env, **{name: {UNKNOWN} for name in _parameters(node.args)}})
            self.known.clear()
            return
        if isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp):
            self._check_comprehension(node, env)
            return
        if isinstance(node, ast.NamedExpr):
            self.check(node.value, env)
            self.bind(node.target, self.meanings(node.value, env), env)
            return
        if isinstance(node, ast.Name | ast.Attribute | ast.Subscript | ast.Call) and not isinstance(
            getattr(node, "ctx", None), ast.Store | ast.Del
        ):
            self._report_names(self.meanings(node, env), node)
        if isinstance(node, ast.Call):
            self._check_call(node, env)
        for child in ast.iter_child_nodes(node):
            self.check(child, env)

    def _check_comprehension(self, node, env: dict):
        inner = dict(env)
        self.step(len(env))
        self.known.clear()
        for generator in node.generators:
            self.check(generator.iter, inner)
            self.bind(generator.target, {UNKNOWN}, inner)
            for condition in generator.ifs:
                self.check(condition, inner)
        for part in (node.key, node.value) if isinstance(node, ast.DictComp) else (node.elt,):
            self.check(part, inner)
        self.known.clear()

    def _report_names(self, names: Iterable[str], node: ast.AST):
        for name in sorted(names):
            if name == UNKNOWN:
                continue
            if _tail(name) in _INTERACTIVE_NAMES or any(
                pair in _INTERACTIVE_NAMES for pair in zip(name.split("."), name.split(".")[1:])
            ):
                self.report("user_interaction", node, name.removeprefix("builtins."))
            elif name.split(".")[0] != "builtins" and not isinstance(node, ast.Name):
                self._report_module(name, node)

    def _report_module(self, name: str, node: ast.AST):
        top = name.split(".")[0]
        if top == "globals()":
            return
        if top in INTERACTIVE_MODULES:
            self.report("user_interaction", node, f"module {top}")
        elif top not in sys.stdlib_module_names and top not in self.allowed:
            self.report("external_import", node, top)

    def _check_call(self, node: ast.Call, env: dict):
        first = node.args[0] if node.args else None
        if first is None and node.keywords:
            first = next((word.value for word in node.keywords if word.arg in ("name", "file", "path", "fd")), None)
        constant = first.value if isinstance(first, ast.Constant) else None
        for name in self.meanings(node.func, env):
            tail = _tail(name)
            if tail in _IMPORTERS:
                if isinstance(constant, str) and constant:
                    self._report_module(constant, node)
                else:
                    self.report("dynamic_code", node, "an import of a name that is computed")
            elif tail in _OPENERS and not isinstance(constant, bool) and constant in _TERMINALS:
                self.report("user_interaction", node, f"{tail[1]}({constant!r})")
            elif tail in _RUNNERS:
                self._check_string(constant, node, env)
            elif tail == ("builtins", "help") and not node.args:
                self.report("user_interaction", node, "help()")
            elif name == "builtins.getattr" and self._hides_a_name(node, env):
                self.report("dynamic_code", node, "getattr with a name that is computed")

    def _hides_a_name(self, node: ast.Call, env: dict) -> bool:
        if len(node.args) < 2 or isinstance(node.args[1], ast.Constant):
            return False
        return any(base.split(".")[-1] in ("sys", "builtins") for base in self.meanings(node.args[0], env))

    def _check_string(self, code, node: ast.Call, env: dict):
        if isinstance(code, bytes):
            code = code.decode("utf-8", "replace")
        if not isinstance(code, str) or self.depth >= _MAX_DEPTH:
            self.report("dynamic_code", node, "code that is computed cannot be read")
            return
        tree, problem = _parse(code.strip())
        if problem:
            self.report("dynamic_code", node, f"code in a string: {problem}")
            return
        inner = _Reader(self.allowed, self.depth + 1)
        inner.steps = self.steps
        inner.run(tree, env)
        self.steps = inner.steps
        for found in inner.problems:
            self.report(found.split(":")[0], node, f"in a string: {found.split(', ', 1)[-1]}")

    # -- statements ------------------------------------------------------------------------------------------------

    def bind(self, target: ast.AST, names: set[str], env: dict):
        self.known.clear()
        if isinstance(target, ast.Name):
            if target.id in env.get("global", ()):
                self.shared[target.id] = self.shared.get(target.id, set()) | names
            env[target.id] = set(names)
        elif isinstance(target, ast.Tuple | ast.List):
            for item in target.elts:
                self.bind(item, {UNKNOWN}, env)
        elif isinstance(target, ast.Starred):
            self.bind(target.value, {UNKNOWN}, env)
        else:
            self.check(target, env)

    def bind_value(self, target: ast.AST, value: ast.AST, env: dict):
        pairs = isinstance(target, ast.Tuple | ast.List) and isinstance(value, ast.Tuple | ast.List)
        if pairs and len(target.elts) == len(value.elts):
            meanings = [self.meanings(item, env) for item in value.elts]
            for item, names in zip(target.elts, meanings):
                self.bind(item, names, env)
        else:
            self.bind(target, self.meanings(value, env), env)

    def scope(self, statements: list, env: dict):
        """Read a whole scope: its statements, then the functions defined in it."""
        later: dict = {}
        self.block(statements, env, later)
        for node, then in later.items():
            self._function(node, _merge(then, env))

    def block(self, statements: list, env: dict, later: dict):
        for statement in statements:
            self.statement(statement, env, later)

    def branches(self, blocks: Iterable[list], env: dict, later: dict, loop: bool = False):
        """Blocks of which each may run or not: afterwards a name may mean what it meant before or in any of them."""
        for statements in blocks:
            inside = dict(env)
            self.step(len(env))
            self.block(statements, inside, later)
            if loop and (merged := _merge(inside, env)) != env:  # what one round binds, the next may read
                inside = merged
                self.block(statements, inside, later)
            env.update(_merge(env, inside))

    def statement(self, node: ast.stmt, env: dict, later: dict):
        self.known.clear()
        self.step()
        if isinstance(node, ast.Import | ast.ImportFrom):
            self._import(node, env)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            outside = (*node.decorator_list, *node.args.defaults, *node.args.kw_defaults, node.returns)
            annotations = [argument.annotation for argument in _arguments(node.args)]
            for part in (*outside, *annotations):
                self.check(part, env)
            self.bind(ast.Name(id=node.name), {UNKNOWN}, env)
            later[node] = _merge(later[node], env) if node in later else dict(env)
        elif isinstance(node, ast.ClassDef):
            for part in (*node.decorator_list, *node.bases, *(word.value for word in node.keywords)):
                self.check(part, env)
            self._class(node, env, later)
            self.bind(ast.Name(id=node.name), {UNKNOWN}, env)
        elif isinstance(node, ast.Assign):
            self.check(node.value, env)
            for target in node.targets:
                self.bind_value(target, node.value, env)
        elif isinstance(node, ast.AnnAssign):
            self.check(node.annotation, env)
            self.check(node.value, env)
            if node.value is not None:
                self.bind_value(node.target, node.value, env)
        elif isinstance(node, ast.Global | ast.Nonlocal):
            env["global"] = {*env.get("global", ()), *node.names}
        elif isinstance(node, ast.Delete):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    env.pop(target.id, None)
                else:
                    self.check(target, env)
        elif isinstance(node, ast.If):
            self.check(node.test, env)
            self.branches((node.body, node.orelse), env, later)
        elif isinstance(node, ast.For | ast.AsyncFor):
            self.check(node.iter, env)
            self._for(node, env, later)
        elif isinstance(node, ast.While):
            self.check(node.test, env)
            self.branches((node.body, node.orelse), env, later, loop=True)
            self.check(node.test, env)
        elif isinstance(node, ast.With | ast.AsyncWith):
            for item in node.items:
                self.check(item.context_expr, env)
                if item.optional_vars is not None:
                    self.bind(item.optional_vars, {UNKNOWN}, env)
            self.block(node.body, env, later)
        elif isinstance(node, ast.Try | ast.TryStar):
            self._try(node, env, later)
        elif isinstance(node, ast.Match):
            self.check(node.subject, env)
            for case in node.cases:
                self._bind_pattern(case.pattern, env)
                self.check(case.guard, env)
            self.branches([case.body for case in node.cases], env, later)
        else:  # Expr, Return, Raise, Assert, AugAssign, Pass, type aliases ...
            self.check(node, env)

    def _for(self, node, env: dict, later: dict):
        before = dict(env)
        self.bind(node.target, {UNKNOWN}, env)
        self.branches((node.body, node.orelse), env, later, loop=True)
        env.update(_merge(env, before))

    def _try(self, node, env: dict, later: dict):
        before = dict(env)
        self.block([*node.body, *node.orelse], env, later)
        env.update(_merge(env, before))
        for handler in node.handlers:
            self.check(handler.type, env)
            if handler.name:
                env[handler.name] = {UNKNOWN, *env.get(handler.name, (f"builtins.{handler.name}",))}
        self.branches([handler.body for handler in node.handlers], env, later)
        self.block(node.finalbody, env, later)

    def _bind_pattern(self, pattern: ast.AST, env: dict):
        for part in ast.walk(pattern):
            name = getattr(part, "name", None) or getattr(part, "rest", None)
            if isinstance(name, str):
                env[name] = {UNKNOWN, *env.get(name, (f"builtins.{name}",))}
            if isinstance(part, ast.MatchValue):
                self.check(part.value, env)

    def _import(self, node, env: dict):
        if isinstance(node, ast.Import):
            for alias in node.names:
                self._report_module(alias.name, node)
                name = alias.asname or alias.name.split(".")[0]
                self.bind(ast.Name(id=name), {alias.name if alias.asname else name}, env)
            return
        if node.level:
            self.report("external_import", node, f"relative import of {'.' * node.level}{node.module or ''}")
        else:
            self._report_module(node.module, node)
        for alias in node.names:
            whole = UNKNOWN if node.level else f"{node.module}.{alias.name}"
            if alias.name == "*":
                env["*"] = {*env.get("*", ()), node.module or UNKNOWN}
                continue
            self._report_names({whole}, ast.Name(id="", lineno=node.lineno))
            self.bind(ast.Name(id=alias.asname or alias.name), {whole}, env)

    def _function(self, node, outer: dict):
        self.known.clear()
        self.step(len(outer))
        env = {name: names for name, names in outer.items() if name != "global"}
        local = _bound_in(node.body)
        env.update({name: {UNKNOWN} for name in (*local, *_parameters(node.args))})
        self.scope(node.body, env)

    def _class(self, node: ast.ClassDef, env: dict, later: dict):
        # Names of a class's body are not seen by its methods: those are read with the environment around the class.
        methods: dict = {}
        self.step(2 * len(env))
        self.block(node.body, dict(env), methods)
        later.update(dict.fromkeys(methods, dict(env)))

    def run(self, tree: ast.Module, env: dict | None = None):
        # Twice: a name bound through `global` by a later function may be used by an earlier one.
        for _ in range(2):
            self.scope(tree.body, dict(env or {}))


def _merge(one: dict, other: dict) -> dict:
    """Either environment: a name that one of them lacks may also mean the builtin."""
    merged = {}
    for name in {**one, **other}:
        if name in ("*", "global"):
            merged[name] = {*one.get(name, ()), *other.get(name, ())}
        elif one.get(name) is other.get(name):
            merged[name] = one[name]
        else:
            builtin = {f"builtins.{name}"}
            merged[name] = set(one.get(name, builtin)) | set(other.get(name, builtin))
    return merged


def _arguments(arguments: ast.arguments) -> list[ast.arg]:
    several = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [*several, *(argument for argument in (arguments.vararg, arguments.kwarg) if argument)]


def _parameters(arguments: ast.arguments) -> list[str]:
    return [argument.arg for argument in _arguments(arguments)]


def _bound_in(statements: list) -> set[str]:
    """Names local to a function: bound anywhere in its own body and not declared global or nonlocal."""
    bound, declared, stack = set(), set(), list(statements)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
            continue
        if isinstance(node, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            continue
        if isinstance(node, ast.Global | ast.Nonlocal):
            declared.update(node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
            bound.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound.update(alias.asname or alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar | ast.MatchMapping):
            bound.add(getattr(node, "name", None) or getattr(node, "rest", None))
        stack.extend(ast.iter_child_nodes(node))
    return {name for name in bound - declared if name}


def _parse(code: str):
    """(tree, "") or (None, why it is no Python)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\\d" in a plain string: which kind of warning depends on the Python
            return ast.parse(code), ""
    except SyntaxError as error:
        return None, f"line {error.lineno or 1}, {shorten(error.msg)}"
    except (ValueError, RecursionError, MemoryError) as error:
        return None, f"line 1, {shorten(error) or type(error).__name__}"


def check_code(code: str | None, allowed_imports: Iterable[str] = ()) -> str:
    """
    `"ok"`, or what keeps Python code from running alone: each problem as `"code: line N, detail"`, joined by `"; "`.

    Codes: empty, syntax_error, external_import (neither of this interpreter's standard library nor allowed, or
    relative), user_interaction (input, breakpoint, help(), standard input, terminal, windows, browser), dynamic_code
    (`exec`, `eval`, imports of computed text: what cannot be read cannot be vouched for; constant text is read).
    Nothing is run.

    Args:
        code: the source.
        allowed_imports: top-level modules allowed besides the standard library, as "numpy".
    Raises:
        TypeError: the code is neither a string nor None.
    """
    if code is not None and not isinstance(code, str):
        raise TypeError(f"code is a string or None, not {type(code).__name__}; name the column that holds source")
    if code is None or not code.strip():
        return "empty: no code"
    tree, problem = _parse(code)
    if problem:
        return f"syntax_error: {problem}"
    reader = _Reader(frozenset(allowed_imports))
    try:
        reader.run(tree)
    except RecursionError:
        return "syntax_error: line 1, nested too deep"
    except _TooTangled:
        return join_reasons([*reader.problems, "dynamic_code: line 1, more branches and meanings than are followed"])
    return join_reasons(reader.problems)


@dataclass(frozen=True)
class CodeFilter:
    """
    For `map`, row by row: adds `code_passed` (bool) and `code_reason` (`"ok"` or the problems of `check_code`).

    Args:
        code_column: column of the source; Markdown around it is taken off by `extract_code`.
        allowed_imports: top-level modules allowed besides the standard library.
        attempts_column: a column with the number of attempts that failed before (null: none). With it a failure adds
            one there, and `code_status` says `passed`, `retry`, or `discarded` once `max_attempts` have failed.
        max_attempts: the recipe's 10.
    Raises:
        ValueError: an allowed import that is no name of a top-level module; max_attempts below 1.
        KeyError: a column is missing.
    """

    code_column: str = "code"
    allowed_imports: tuple[str, ...] = ()
    attempts_column: str | None = None
    max_attempts: int = 10

    def __post_init__(self):
        if isinstance(self.allowed_imports, str):
            raise ValueError(f"allowed_imports is a tuple of names; write ({self.allowed_imports!r},)")
        object.__setattr__(self, "allowed_imports", tuple(sorted(self.allowed_imports)))
        for name in self.allowed_imports:
            if not name.isidentifier():
                raise ValueError(f"allowed import {name!r} is no top-level module; write its first part, as 'numpy'")
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts = {self.max_attempts}; give 1 or more")

    def __call__(self, row: dict) -> dict:
        code = column_of(row, self.code_column, "CodeFilter")
        reason = check_code(extract_code(code) if isinstance(code, str) else code, self.allowed_imports)
        passed = reason == OK
        added = {"code_passed": passed, "code_reason": reason}
        if self.attempts_column is not None:
            failed = (column_of(row, self.attempts_column, "CodeFilter") or 0) + (not passed)
            status = "passed" if passed else "discarded" if failed >= self.max_attempts else "retry"
            added |= {self.attempts_column: failed, "code_status": status}
        return added
