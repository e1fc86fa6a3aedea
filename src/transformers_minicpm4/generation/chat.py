"""Chat templates of MiniCPM4 and MiniCPM4.1, each in a form for inference and a form for training.

Both models speak ChatML: `<|im_start|>role`, a line break, the content, `<|im_end|>`, a line break. Tools and system
prompts get no treatment of their own, and no `<s>` is written: the tokenizer adds it when it encodes the text.
MiniCPM4.1 thinks before it answers unless `enable_thinking=False`, which opens the answer with an empty thought.

Source: `tokenizer_config.json` of openbmb/MiniCPM4-8B and openbmb/MiniCPM4.1-8B.
"""

from functools import cache
from importlib import resources


_NAMES = ("minicpm4", "minicpm4.1")


@cache
def chat_template(name: str = "minicpm4", *, training: bool = False) -> str:
    """
    The Jinja source of a chat template, ready for `tokenizer.chat_template`.

    Both forms render the same text. The training form also marks what the assistant writes, its closing `<|im_end|>`
    included, so that `return_assistant_tokens_mask=True` and TRL's `assistant_only_loss=True` train on the answers
    and on stopping, and on nothing else.

    Args:
        name (`str`, *optional*, defaults to `"minicpm4"`):
            `"minicpm4"`, or `"minicpm4.1"` for the template with the `enable_thinking` switch.
        training (`bool`, *optional*, defaults to `False`):
            Whether to return the form with `{% generation %}` marks.

    Returns:
        `str`: the template.

    Example:
    ```python
    >>> from transformers_minicpm4.generation import chat_template

    >>> tokenizer.chat_template = chat_template("minicpm4.1")
    >>> tokenizer.apply_chat_template(
    ...     [{"role": "user", "content": "Hello"}],
    ...     tokenize=False,
    ...     add_generation_prompt=True,
    ...     enable_thinking=False,
    ... )
    '<|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\n<think>\\n\\n</think>\\n'
    ```
    """
    if name not in _NAMES:
        known = " and ".join(f'"{known_name}"' for known_name in _NAMES)
        raise ValueError(
            f"There is no chat template named {name!r}; the names are {known}. Ask for the training form with "
            "training=True."
        )
    file_name = f"{name}_training.jinja" if training else f"{name}.jinja"
    return resources.files(__package__).joinpath("chat_templates", file_name).read_text(encoding="utf-8")
