# /// script
# dependencies = ["mcp>=2.3"]
# ///
"""
An MCP server over stdio: the text files of one folder, and of no other.

    python examples/mcp_servers/files.py FOLDER
"""

import sys
from pathlib import Path

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError


server = MCPServer("files", log_level="WARNING")
FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()


@server.tool()
def search(query: str, limit: int = 3) -> str:
    """Lines of the folder's Markdown files that hold a text, as path:line: text."""
    found = []
    for path in sorted(FOLDER.rglob("*.md")):
        for place, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if query.lower() in line.lower():
                found.append(f"{path.relative_to(FOLDER)}:{place}: {line.strip()}")
    return "\n".join(found[:limit]) or f"no line holds {query!r}"


@server.tool("read-lines")
def read_lines(path: str, first: int = 1, count: int = 10) -> str:
    """Lines of one file of the folder, by number."""
    file = (FOLDER / path).resolve()
    if not file.is_relative_to(FOLDER) or not file.is_file():
        raise ToolError(f"there is no file {path!r} in the folder; find one with search")
    return "\n".join(file.read_text(encoding="utf-8").splitlines()[max(first, 1) - 1 :][:count])


if __name__ == "__main__":
    server.run()
