"""How text comes out: chat templates now; constrained decoding and speculative drafting stand here later."""

from .chat import chat_template


__all__ = ["chat_template"]
