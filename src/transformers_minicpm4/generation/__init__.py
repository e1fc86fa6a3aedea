"""How text comes out: chat templates, drafts and their verification, text that streams, grammars, tool calls."""

from .chat import chat_template


__all__ = ["chat_template"]
