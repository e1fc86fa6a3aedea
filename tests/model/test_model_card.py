"""The model-card template: metadata the Hub understands, and code that names this model and its attention."""

import ast
import re
from importlib import resources

import pytest
from huggingface_hub import ModelCard, ModelCardData

from transformers_minicpm4 import InfLLMv2Config


@pytest.fixture
def render():
    template = resources.files("transformers_minicpm4.model") / "model_card_template.md"

    def card(data=None, **fields):
        return ModelCard.from_template(
            ModelCardData(**(data or {})), template_str=template.read_text("utf-8"), **fields
        )

    return card


DATA = {"license": "apache-2.0", "base_model": "openbmb/MiniCPM4-0.5B"}


def code(card) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", card.text, re.S)
    ast.parse(block)
    return block


def test_metadata(render):
    card = render(DATA, model_id="me/mine")
    assert card.data.to_dict() == {
        **DATA,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["minicpm4", "infllm_v2"],
    }
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


def test_what_is_given_wins_over_the_defaults(render):
    given = {
        **DATA,
        "library_name": "peft",
        "pipeline_tag": "text-classification",
        "tags": ["lora"],
        "language": ["en"],
    }
    assert render(given).data.to_dict() == given


@pytest.mark.parametrize("data", [{}, DATA, {**DATA, "library_name": "peft"}], ids=["empty", "model", "adapter"])
@pytest.mark.parametrize("sparse", [None, InfLLMv2Config(), InfLLMv2Config(dense_len=-1)], ids=["dense", "8192", "-1"])
def test_text_is_complete(render, data, sparse):
    card = render(data, model_id="me/mine", sparse_config=sparse and sparse.to_dict())
    assert "# me/mine\n" in card.text
    assert 'name = "me/mine"' in code(card)
    prose = card.text.replace(code(card), "")
    assert not re.search(r"\{[{%]|[%}]\}|None|undefined|\n\n\n| $", prose, re.M), prose
    assert ("at most 96 blocks of 64 tokens" in prose) == (sparse is not None)
    assert ("first 8192 tokens" in prose) == (sparse == InfLLMv2Config())


def test_an_adapter_is_loaded_with_the_attention_it_was_trained_with(render):
    """An adapter's folder holds no config of the model."""
    sparse = InfLLMv2Config(topk=16).to_dict()
    block = code(render({**DATA, "library_name": "peft"}, sparse_config=sparse))
    assert "AutoPeftModelForCausalLM.from_pretrained(name, sparse_config=sparse_config, dtype=" in block
    (line,) = [line for line in block.splitlines() if line.startswith("sparse_config = ")]
    assert ast.literal_eval(line.removeprefix("sparse_config = ")) == sparse


def test_sections_take_what_they_are_given(render):
    sections = {name: f"about {name}" for name in ("model_summary", "training", "evaluation", "limitations")}
    text = render(DATA, **sections).text
    assert all(section in text for section in sections.values())
    assert "Not described yet" not in text
