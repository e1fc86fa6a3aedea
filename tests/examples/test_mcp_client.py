"""The MCP client finds two real servers' tools, tells equal names apart, and sends each call where it belongs."""

import asyncio
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("mcp", reason="the MCP client needs the package mcp")

from mcp import Client
from mcp.server import MCPServer

from transformers_minicpm4.generation.responses import parse_response
from transformers_minicpm4.generation.tool_calls import ToolCall


ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "mcp_client.py"

# A signature a tool, as the released template for tools, and no more.
TOOLS_TEMPLATE = """{%- for tool in tools %}
def {{ tool.function.name }}({{ tool.function.parameters.properties|join(', ') }})
{% endfor %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_two_real_servers_answer():
    run = subprocess.run(
        [sys.executable, str(EXAMPLE)], capture_output=True, text=True, timeout=300, cwd=ROOT, env=dict(os.environ)
    )
    assert run.returncode == 0, run.stderr
    out = run.stdout
    assert "its turns are scripted" in out
    assert "tools: manual_search, show-topic, files_search, read-lines" in out
    # The same tool's name, two servers: the manual counts words, the folder of files shows lines.
    gets = re.split(r"\n(?=\w+:|  gets:)", out)
    gets = [part.removeprefix("  gets: ") for part in gets if part.startswith("  gets:")]
    assert len(gets) == 4
    assert gets[0] == "Error: manual_search.limit must be integer, not '3'"
    assert re.fullmatch(r"\w+\.md:\d+: .*tool calls.*", gets[1], re.IGNORECASE)
    assert re.fullmatch(r"lambda: \d+ times(\n +\w+: \d+ times){2}", gets[2])
    assert gets[3].startswith("Lambdas\n")
    assert out.rstrip().endswith("the manual says so under `lambda`.")


@pytest.fixture
def example():
    return runpy.run_path(str(EXAMPLE), run_name="mcp_client")


def servers():
    first, second = MCPServer("first", log_level="CRITICAL"), MCPServer("second", log_level="CRITICAL")

    @first.tool("look-up")
    def first_look_up(word: str, times: int = 1) -> str:
        """Look a word up."""
        return f"first has {word}" * times

    @second.tool("look-up")
    def second_look_up(word: str) -> str:
        """Look a word up."""
        return f"second has {word}"

    @second.tool()
    def fail() -> str:
        """Fail."""
        raise ValueError("no")

    return {"first": first, "second": second}


def results(example, text):
    async def ask():
        servers_by_name = servers()
        async with Client(servers_by_name["first"]) as first, Client(servers_by_name["second"]) as second:
            tools, routes = await example["offered_tools"]({"first": first, "second": second})
            response = parse_response(text, tools=tools)
            return tools, await example["results_of"](response, tools, routes)

    return asyncio.run(ask())


def test_calls_go_where_they_belong(example):
    code = "\n".join(
        [
            "second_look-up(word='a')",
            "first_look-up(word='b', times=2)",
            "first_look-up('c')",
            "fail()",
            "look-up(word='d')",
            "first_look-up(words='e')",
            "first_look-up(word=e)",
        ]
    )
    tools, messages = results(example, f"<|tool_call_start|>\n```python\n{code}\n```\n<|tool_call_end|>")
    assert [tool["function"]["name"] for tool in tools] == ["first_look-up", "second_look-up", "fail"]
    assert tools[0]["function"]["parameters"]["required"] == ["word"]
    assert {message["role"] for message in messages} == {"tool"}
    contents = [message["content"] for message in messages]
    assert contents[0] == "Error: e is no value; put text in quotes: first_look-up(word=e)"
    assert contents[1:4] == ["second has a", "first has bfirst has b", "first has c"]
    assert contents[4].startswith("Error: ")
    assert contents[5].startswith("Error: there is no tool 'look-up'; did you mean ")
    assert "lacks the required 'word'" in contents[6]
    assert "no parameter 'words'; did you mean 'word'?" in contents[6]
    assert len(contents) == 7


def test_files_outside_the_folder_stay_closed(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "a.md").write_text("one\ntwo\nthree\n")
    (tmp_path / "secret.md").write_text("secret")
    script = ROOT / "examples" / "mcp_servers" / "files.py"
    code = (
        f"import runpy, sys; sys.argv = ['files.py', {str(tmp_path / 'open')!r}]\n"
        f"files = runpy.run_path({str(script)!r})\n"
        "print(files['read_lines']('a.md', first=2, count=1))\n"
        "for path in ('../secret.md', '..', '/etc/passwd', 'b.md'):\n"
        "    try: print(files['read_lines'](path))\n"
        "    except Exception as error: print(type(error).__name__)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout.split() == ["two", *["ToolError"] * 4], run.stderr


@pytest.mark.real
def test_a_real_model_sees_the_tools(example, real_checkpoint, tmp_path):
    for file in real_checkpoint.iterdir():
        if not file.name.endswith(".jinja"):
            (tmp_path / file.name).symlink_to(file)
    tool = {"type": "function", "function": {"name": "look-up", "parameters": {"properties": {"word": {}}}}}
    messages = [{"role": "user", "content": "Hi"}]
    (tmp_path / "chat_template.jinja").write_text(TOOLS_TEMPLATE)
    prompt, text = example["real_model"](str(tmp_path), 4)(messages, [tool])
    assert prompt.startswith("def look-up(word)\n<|im_start|>user\nHi<|im_end|>")
    assert text
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(SystemExit, match="leaves tools out"):
        example["real_model"](str(tmp_path), 4)(messages, [tool])


def test_the_script_s_calls_are_read():
    """What the example plays is in the released format, with nothing that the parser refuses."""
    turns = [parse_response(text) for text in runpy.run_path(str(EXAMPLE), run_name="mcp_client")["SCRIPT"]]
    assert [turn.errors for turn in turns] == [(), (), ()]
    assert turns[1].tool_calls[1] == ToolCall("show-topic", {"name": "lambda", "characters": 120})
