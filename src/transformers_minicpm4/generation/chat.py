"""
Chat templates of MiniCPM4 and MiniCPM4.1, each in a form for inference and a form for training; how a rendered text is
encoded, and which tokens end one.

Both models speak ChatML: `<|im_start|>role`, a line break, the content, `<|im_end|>`, a line break. Tools and system
prompts get no treatment of their own, and no `<s>` is written: the tokenizer adds it when it encodes the text.
MiniCPM4.1 thinks before it answers unless `enable_thinking=False`, which opens the answer with an empty thought.

Source: `tokenizer_config.json` of openbmb/MiniCPM4-8B and openbmb/MiniCPM4.1-8B.
"""

from functools import cache
from importlib import resources
from numbers import Integral


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


def encode_rendered(tokenizer, text: str, **options):
    """
    Tokens of a text that a chat template rendered: the templates write no `<s>`, so the tokenizer adds it unless the
    text begins with it. `options` and result are those of calling the tokenizer.
    """
    begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    return tokenizer(text, add_special_tokens=not begun, verbose=False, **options)


def as_ids(token_ids) -> list[int]:
    """An id, a list or tensor of them, or `None`, as `generation_config.eos_token_id` may be: always a list."""
    if token_ids is None:
        return []
    if isinstance(token_ids, Integral):
        return [int(token_ids)]
    return [int(token) for token in (token_ids.flatten() if hasattr(token_ids, "flatten") else token_ids)]


def end_ids(model, tokenizer=None) -> list[int]:
    """The ids that end a text, sorted: the model's and, since a configuration may lack its own, the tokenizer's."""
    own = () if tokenizer is None else as_ids(tokenizer.eos_token_id)
    return sorted({*as_ids(model.generation_config.eos_token_id), *own})
