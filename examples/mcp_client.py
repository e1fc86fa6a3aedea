# /// script
# dependencies = ["transformers_minicpm4", "mcp>=2.3"]
# ///
"""
Let MiniCPM4 use the tools of several MCP servers: two real ones are started here, and both have a tool `search`.

    python examples/mcp_client.py

plays the model's turns from a script (`SCRIPT` below): no model is loaded, and what the model says is not its own. The
servers, the calls and their results are real. With a checkpoint whose chat template knows tools, it is the model:

    python examples/mcp_client.py --model openbmb/MiniCPM4-MCP --question "Where do the docs speak of lambda?"

A call that cannot be read, or that its tool's schema refuses, is not made; the model is told why and may repair it.
"""

import argparse
import asyncio
import sys
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

from mcp import Client, MCPError, StdioServerParameters

from transformers_minicpm4.generation.responses import parse_response
from transformers_minicpm4.generation.tool_schemas import check_arguments


HERE = Path(__file__).resolve().parent
SERVERS = {
    "manual": [str(HERE / "mcp_servers" / "python_manual.py")],
    "files": [str(HERE / "mcp_servers" / "files.py"), str(HERE.parent / "docs")],
}
MAX_TURNS = 8
SCRIPT = [
    """<|thought_start|>
I look into both sources at once.
<|thought_end|>
<|tool_call_start|>
```python
manual_search(query="lambda", limit="3")
files_search(query="tool calls", limit=1)
```
<|tool_call_end|>
""",
    """<|thought_start|>
The limit must be a number. And I know a topic already.
<|thought_end|>
<|tool_call_start|>
```python
manual_search(query="lambda", limit=3)
show-topic(name="lambda", characters=120)
```
<|tool_call_end|>
""",
    "A lambda expression makes an anonymous function; the manual says so under `lambda`.<|im_end|>",
]


async def offered_tools(clients: dict[str, Client]) -> tuple[list[dict], dict[str, tuple[Client, str]]]:
    """The tools for a chat template, and for each name where it leads: a clash gets its server's name in front."""
    listed = []
    for server, client in clients.items():
        cursor = None
        while True:
            page = await client.list_tools(cursor=cursor)
            listed += [(server, tool) for tool in page.tools]
            cursor = page.next_cursor
            if not cursor:
                break
    counts = Counter(tool.name for _, tool in listed)
    tools, routes = [], {}
    for server, tool in listed:
        name = tool.name if counts[tool.name] == 1 else f"{server}_{tool.name}"
        if name in routes:
            raise SystemExit(f"two tools would be called {name!r}; give the server {server!r} another name")
        function = {"name": name, "description": tool.description or "", "parameters": tool.input_schema}
        tools.append({"type": "function", "function": function})
        routes[name] = (clients[server], tool.name)
    return tools, routes


async def results_of(response, tools: list[dict], routes: dict) -> list[dict]:
    """One message a call, and one for what could not be read."""
    messages = [{"role": "tool", "content": f"Error: {error.message}: {error.source}"} for error in response.errors]
    for call in response.tool_calls:
        problems = check_arguments([call], tools)
        if problems:
            messages.append({"role": "tool", "content": "Error: " + "; ".join(problems)})
            continue
        client, name = routes[call.name]
        try:
            result = await client.call_tool(name, call.arguments, read_timeout_seconds=30)
        except MCPError as error:
            messages.append({"role": "tool", "content": f"Error: {error}"})
            continue
        text = "\n".join(part.text if part.type == "text" else f"({part.type})" for part in result.content)
        messages.append({"role": "tool", "content": ("Error: " if result.is_error else "") + text})
    return messages


def scripted_model():
    turns = iter(SCRIPT)
    return lambda messages, tools: ("", next(turns))


def real_model(name: str, max_new_tokens: int):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval()

    def answer(messages, tools):
        prompt = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
        if not all(tool["function"]["name"] in prompt for tool in tools):
            raise SystemExit(f"the chat template of {name} leaves tools out; take a checkpoint made for tools")
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens)[0, inputs["input_ids"].shape[1] :]
        return prompt, tokenizer.decode(ids, skip_special_tokens=False)

    return answer


async def main(arguments: argparse.Namespace):
    answer = real_model(arguments.model, arguments.max_new_tokens) if arguments.model else scripted_model()
    print("model:", arguments.model or "none, its turns are scripted")
    async with AsyncExitStack() as stack:
        clients = {
            server: await stack.enter_async_context(Client(StdioServerParameters(command=sys.executable, args=args)))
            for server, args in SERVERS.items()
        }
        tools, routes = await offered_tools(clients)
        print("tools:", ", ".join(routes))
        messages = [{"role": "user", "content": arguments.question}]
        for _ in range(MAX_TURNS):
            prompt, text = answer(messages, tools)
            response = parse_response(text, prefix=prompt, tools=tools)
            # The turn as the model wrote it: templates with tools, and without, render this text alike.
            messages.append({"role": "assistant", "content": text.partition("<|im_end|>")[0].strip()})
            results = await results_of(response, tools, routes)
            if response.thinking:
                print("thinks:", response.thinking)
            if response.content:
                print("says:", response.content)
            for call in response.tool_calls:
                print("calls:", call.source)
            for message in results:
                print("  gets:", message["content"].replace("\n", "\n        "))
            if not results:
                return
            messages += results
    print(f"no answer within {MAX_TURNS} turns")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hub id or folder of a checkpoint whose chat template knows tools")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="the longest turn of a model, in tokens")
    parser.add_argument("--question", default="What is a lambda in Python?")
    asyncio.run(main(parser.parse_args()))
