# /// script
# dependencies = ["mcp>=2.3"]
# ///
"""An MCP server over stdio: the Python language reference that every Python carries with it."""

from pydoc_data.topics import topics

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError


server = MCPServer("python_manual", log_level="WARNING")


@server.tool()
def search(query: str, limit: int = 3) -> str:
    """Names of the topics of the Python language reference that speak most often of a word."""
    word = query.lower()
    counts = {name: text.lower().count(word) for name, text in topics.items()}
    best = sorted((name for name in counts if counts[name]), key=lambda name: (-counts[name], name))[:limit]
    return "\n".join(f"{name}: {counts[name]} times" for name in best) or f"no topic speaks of {query!r}"


@server.tool("show-topic")
def show_topic(name: str, characters: int = 400) -> str:
    """The beginning of a topic of the Python language reference."""
    if name not in topics:
        raise ToolError(f"there is no topic {name!r}; find one with search")
    return topics[name][:characters]


if __name__ == "__main__":
    server.run()
