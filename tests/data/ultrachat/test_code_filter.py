"""The code filter on code that hides what it does, and on innocent code that looks guilty."""

import json
import sys
import time

import pytest
from datasets import Dataset

from transformers_minicpm4.data.ultrachat.code_filter import CodeFilter, check_code, extract_code
from transformers_minicpm4.data.ultrachat.reasons import reason_counts


GUILTY = {
    "user_interaction": [
        "x = input()",
        "from builtins import input as i\ni()",
        "import builtins as b\nb.input()",
        "f = input\nf()",
        "a, b = 3, input\nb()",
        "input = input\ninput()",
        "if 0:\n    input = 1\nx = input()",
        "try:\n    input = 1\nfinally:\n    input()",
        "for input in ():\n    pass\ninput()",
        "input = 3\ndel input\ninput()",
        "def g(input):\n    return input\ninput()",
        "class A:\n    input = 3\n    def f(self):\n        return input()",
        "def f(x=input()):\n    pass",
        "@input\ndef f():\n    pass",
        "f = lambda i=input: i()",
        "[input() for _ in range(3)]",
        "print(f'{input()}')",
        "list(map(int, iter(input, '')))",
        "(raw := input)()",
        "(input if True else print)()",
        "__builtins__.input()",
        "__builtins__['input']()",
        "globals()['__builtins__'].input()",
        "vars(__import__('builtins'))['input']()",
        "getattr(__import__('builtins'), 'input')()",
        "import sys\nsys.modules['builtins'].input()",
        "import sys\nsys.modules.get('builtins').input()",
        "import sys\nfor line in sys.stdin:\n    pass",
        "import sys as s\ns.__stdin__.read()",
        "import os\nos.sys.stdin",
        "from sys import stdin as lines",
        "from sys import *\nstdin.read()",
        "import importlib as l\nl.import_module('sys').stdin",
        "def f():\n    return s.stdin\nimport sys as s",
        "def f():\n    global s\n    import sys as s\ndef g():\n    return s.stdin",
        "def g():\n    return s.stdin\ndef f():\n    global s\n    import sys as s",
        "while x:\n    y = s.stdin\n    import sys as s",
        "class A:\n    async def f(self):\n        import sys as q\n        await q.stdin",
        "match 3:\n    case 3:\n        input()",
        "open(0).read()",
        "open('/dev/stdin')",
        "import os as o\no.read(0, 10)",
        "exec('x = input()')",
        "eval(\"exec('breakpoint()')\")",
        "breakpoint()",
        "help()",
        "import pdb",
        "import tkinter as tk",
        "from getpass import getpass",
        "__import__('turtle')",
    ],
    "external_import": [
        "import numpy as np",
        "from numpy.linalg import norm",
        "import os, requests",
        "def f():\n    import torch",
        "try:\n    import numpy\nexcept ImportError:\n    numpy = None",
        "if False:\n    import numpy",
        "__import__('numpy')",
        "i = __import__\ni('numpy')",
        "from importlib import import_module as m\nm('numpy.linalg')",
        "import importlib\nimportlib.import_module(name='numpy')",
        "from . import secrets",
        "from .json import loads",
        "exec('import numpy')",
        "import json_",
    ],
    "dynamic_code": [
        "eval(text)",
        "exec(b64decode('aW5wdXQoKQ=='))",
        "__import__('num' + 'py')",
        "getattr(__builtins__, 'inp' + 'ut')()",
        "import sys\ngetattr(sys, name)",
        "exec('def f(:')",
        "e = exec\ne(x)",
    ],
    "syntax_error": [
        "def f(:",
        "print 'x'",
        "(" * 1000,
        "x = 1\n  y = 2",
        "import\x00os",
        "return\x0c\n)",
        "-" * 200_000 + "1",
    ],
    "empty": ["", " \n", None],
}

INNOCENT = [
    "import math, json, collections.abc as c\nfrom os.path import join",
    "from __future__ import annotations",
    "input = '3 4'\nprint(input.split())\ndef g():\n    return input",
    "def solve(input):\n    return input + 1",
    "def f():\n    input = 3\n    return [input for _ in 'ab']",
    "def f():\n    for input in 'ab':\n        yield input",
    "f = lambda input: input * 2",
    "def input(prompt):\n    return 3\ninput('x')",
    "with open('x') as input:\n    input.read()",
    "[input for input in 'ab']",
    "class A:\n    def input(self):\n        return 1\nA().input()",
    "import subprocess as s\np = s.Popen('x', stdin=s.PIPE)\np.stdin.write('')",
    "text = 'input()'  # input()",
    '"""import numpy"""',
    "eval('1 + 2')",
    r"pattern = '\d'",
    "open('0')\nopen(False)",
    "import sys\nsys.stdout.write('a')\nsys.argv",
    "import os\nos.environ.get('x')",
    "import re\nre.compile('x')",
    "model.eval()\ncursor.exec(x)",
    "help(print)",
    "def breakpoint():\n    pass\nbreakpoint()",
    "try:\n    import tomllib\nexcept ImportError:\n    tomllib = None",
]


@pytest.mark.parametrize("code, wanted", [(code, kind) for kind, codes in GUILTY.items() for code in codes])
def test_guilty_code_is_named(code, wanted):
    assert wanted in [part.split(":")[0] for part in check_code(code).split("; ")]


@pytest.mark.parametrize("code", INNOCENT)
def test_innocent_code_passes(code):
    assert check_code(code) == "ok"


def test_lines_and_all_problems_are_named():
    reason = check_code("import os\nimport numpy\n\nx = input()\n")
    assert reason == "external_import: line 2, numpy; user_interaction: line 4, input"


def test_allowed_imports_allow_their_parts_and_nothing_else():
    assert check_code("import numpy.linalg as la\nfrom numpy import array", ["numpy"]) == "ok"
    assert check_code("import numpy_financial", ["numpy"]) == "external_import: line 1, numpy_financial"
    assert check_code("import pygame", ["pygame"]) == "user_interaction: line 1, module pygame"
    reason = check_code("import matplotlib.pyplot as plt\nplt.show()", ["matplotlib"])
    assert reason == "user_interaction: line 2, matplotlib.pyplot.show"


def test_nothing_is_run(tmp_path):
    target = tmp_path / "ran"
    code = f"open({str(target)!r}, 'w').write('x')\nexec('open({json.dumps(str(target))}, \"w\")')\nimport this"
    before = set(sys.modules)
    assert check_code(code) == "ok"
    assert not target.exists()
    assert "this" not in set(sys.modules) - before


def test_deep_loops_take_no_exponential_time():
    depth = 18
    code = "".join(" " * n + f"for a{n} in x:\n" for n in range(depth)) + " " * depth + "import os as s\n"
    assert check_code(code) == "ok"


def test_the_standard_library_reads_itself():
    """Real code: pure modules of the interpreter pass, those that talk do not."""
    import bisect
    import fractions
    import getpass
    import heapq
    import textwrap

    for module in (bisect, fractions, heapq, textwrap):
        with open(module.__file__, encoding="utf-8") as file:
            assert check_code(file.read()) == "ok", module.__name__
    with open(getpass.__file__, encoding="utf-8") as file:
        assert "user_interaction" in check_code(file.read())


def test_code_is_taken_out_of_markdown():
    answer = "Here:\n```python\nx = 1\n```\nand\n~~~py\ny = 2\n~~~\n```bash\nls\n```"
    assert extract_code(answer) == "x = 1\n\ny = 2\n"
    assert extract_code("x = 1") == "x = 1"


def test_attempts_are_counted_and_discarded_after_the_last():
    dataset = Dataset.from_dict({"code": ["x = 1", "input()", "input()", "x ="], "tries": [9, None, 9, 8]})
    judged = dataset.map(CodeFilter(attempts_column="tries"))
    assert judged["code_status"][:] == ["passed", "retry", "discarded", "retry"]
    assert judged["tries"][:] == [9, 1, 10, 9]


def test_workers_and_streams_change_nothing():
    codes = [*INNOCENT, *(code for codes in GUILTY.values() for code in codes if code is None or len(code) < 2000)]
    dataset = Dataset.from_dict({"code": codes})
    one = dataset.map(CodeFilter(), load_from_cache_file=False)
    two = dataset.map(CodeFilter(), num_proc=2, load_from_cache_file=False)
    stream = list(dataset.to_iterable_dataset(num_shards=2).map(CodeFilter()))
    assert one.to_dict() == two.to_dict() == {name: [row[name] for row in stream] for name in one.column_names}
    assert one["code_reason"][:] == [check_code(code) for code in codes]
    assert sum(reason_counts(one["code_reason"]).values()) == len(codes)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"allowed_imports": "numpy"}, "tuple of names"),
        ({"allowed_imports": ("numpy.linalg",)}, "no top-level module"),
        ({"max_attempts": 0}, "1 or more"),
    ],
)
def test_wrong_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        CodeFilter(**arguments)
    with pytest.raises(TypeError, match="not int"):
        check_code(3)


def guarded(function, *arguments, seconds=2.0):
    start = time.process_time()
    result = function(*arguments)
    assert time.process_time() - start < seconds
    return result


@pytest.mark.parametrize(
    "code",
    [
        "import os as x\n" + "x" + ".get('a')" * 150,
        "import os as x\n" + "x" + ".pop('a').b" * 100,
        "import os as x\n" + "getattr(" * 80 + "x" + ", 'a')" * 80,
        "import os as x\n" + ("x" + ".a" * 300 + "\n") * 60,
        "".join(f"if c: a{n} = 1\n" for n in range(1000)),
        "import os as x\n" + "".join(" " * n + "while c:\n" for n in range(30)) + " " * 30 + "x = x.a\n",
    ],
)
def test_chains_and_branches_take_time_in_proportion(code):
    assert guarded(check_code, code, seconds=5.0) == "ok"


def test_long_chains_still_hide_nothing():
    assert "user_interaction: line 2" in check_code("import os\nf = os" + ".sys.os" * 60 + ".sys.stdin")
    assert "user_interaction" in check_code("import sys\n" + "sys.modules.get('builtins').input()")


@pytest.mark.parametrize(
    "code",
    [
        "import os as x\n" + "x = x.a if c else x.b\n" * 30,
        "import os as a\n"
        + "".join(" " * n + "while c:\n" for n in range(30))
        + "".join(" " * 30 + f"{x} = {y}.q if c else {y}.r\n" for x, y in zip("abcdefgh", "bcdefgha")),
        "x = input()\nimport os as x\n" + "x = x.a if c else x.b\n" * 30,
    ],
)
def test_what_multiplies_is_named_not_followed(code):
    reason = guarded(check_code, code, seconds=20.0)
    assert reason.endswith("dynamic_code: line 1, more branches and meanings than are followed")
    assert ("user_interaction: line 1, input" in reason) == code.startswith("x = input()")


@pytest.mark.parametrize("line", ["[i for i in c]\n", "lambda i: i\n", "class C: pass\n"])
def test_copies_of_many_names_are_counted(line):
    names = [f"a{n} = 1\n" for n in range(8000)]
    reason = guarded(check_code, "".join(names) + line * 8000)
    assert reason.endswith("dynamic_code: line 1, more branches and meanings than are followed")
    assert check_code("c = ()\n" + "".join(names[:500]) + line * 500) == "ok"


@pytest.mark.parametrize("code", ["a" + ".b()" * 50_000, "[" * 50_000, "1" + "+1" * 50_000, "not " * 50_000 + "1"])
def test_absurd_depth_is_a_syntax_error(code):
    assert check_code(code).startswith("syntax_error: line 1, ")


def test_odd_text_gets_a_reason():
    assert check_code("x = '\ud800'").startswith("syntax_error: line 1, ")
    assert check_code("import sys\ngetattr(sys, 0x1" + "0" * 5000 + ")") == "ok"


def test_fences_by_any_line_end_and_case():
    answer = "Here:\n```Python\nx = 1\n```\nand\n~~~PY3\nno\n~~~\n```PYTHON3\ny = 2\n````\n"
    for end in ("\n", "\r\n", "\r"):
        assert extract_code(answer.replace("\n", end)) == "x = 1\n\ny = 2\n"
    assert CodeFilter()({"code": "```Python\r\nx = 1\r\n```\r\n"})["code_passed"]


@pytest.mark.parametrize("text", ["```python\n", "~~~py\n`", "```python\n```", "`", "```", "x\n```python\n```\n"])
def test_fences_that_stay_open_take_linear_time(text):
    guarded(extract_code, text * (10**6 // len(text)))
