"""What a stranger gave the engine: each is one sentence, and what was there before stays."""

import pytest
import torch
from transformers import TextStreamer

from transformers_minicpm4 import MiniCPM4ForCausalLM
from transformers_minicpm4.edge.engine import EdgeEngine
from transformers_minicpm4.edge.runner import SlotRunner
from transformers_minicpm4.generation.drafts import PromptLookupDraft
from transformers_minicpm4.generation.speculative import speculative_decode


PROMPT = list(range(5, 45))


@pytest.fixture
def model(tiny_config):
    return MiniCPM4ForCausalLM._from_config(tiny_config(), attn_implementation="sdpa").eval()


@pytest.mark.parametrize("prompt, words", [
    (b"Name", "the prompt is bytes"),
    (None, "a prompt is a text, messages, token ids or a list of them; got a NoneType"),
    (5, "got a int"),
    ({"role": "user", "content": "x"}, "got a dict"),
])  # fmt: skip
def test_prompts_that_are_none(model, prompt, words):
    with pytest.raises(ValueError, match=words):
        EdgeEngine(model, context=64, compile=False).generate(prompt)


@pytest.mark.parametrize("options, words", [
    ({"stop_strings": ["a"]}, "the engine's own is stop"),
    ({"attention_mask": None}, "attention_mask was given"),
    ({"min_new_tokens": 90}, "min_new_tokens=90 is above the 24"),
])  # fmt: skip
def test_options_that_are_none(model, options, words):
    with pytest.raises(ValueError, match=words):
        EdgeEngine(model, context=64, compile=False).generate(PROMPT, **options)


def test_drafts_that_are_none(model):
    with pytest.raises(ValueError, match="give a Draft, such as PromptLookupDraft"):
        EdgeEngine(model, draft="lookup", compile=False)
    with pytest.raises(ValueError, match="give a Draft, such as PromptLookupDraft"):
        EdgeEngine.from_pretrained("nowhere", draft="lookup")  # before anything is loaded
    with pytest.raises(ValueError, match="whole numbers of 1 or more"):
        PromptLookupDraft(length=2.5)


def test_a_model_whose_rotation_depends_on_the_length_of_a_call(tiny_config):
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, rope_parameters=rope)  # fmt: skip
    with pytest.raises(ValueError, match="rope_type='dynamic'"):
        EdgeEngine(LlamaForCausalLM(config), context=64, compile=False)


def test_a_streamer_that_skips_the_prompt_skips_nothing_else(model, make_words):
    engine = EdgeEngine(model, context=128, compile=False)
    ids = torch.tensor([PROMPT])
    answer = engine.generate(PROMPT, max_new_tokens=6).token_ids
    for options in (
        {"custom_generate": engine.decode},
        {"custom_generate": speculative_decode, "draft": PromptLookupDraft()},
    ):
        seen = make_words()
        model.generate(ids, max_new_tokens=6, do_sample=False, text_streamer=seen, **options)
        assert seen.tokens == answer


@pytest.fixture
def make_words():
    class Words(TextStreamer):
        """Keeps the ids that a streamer with `skip_prompt` shows."""

        def __init__(self):
            super().__init__(None, skip_prompt=True)
            self.tokens = []

        def put(self, value):
            if self.next_tokens_are_prompt:
                self.next_tokens_are_prompt = False
            else:
                self.tokens += value.flatten().tolist()

        def end(self): ...

    return Words


def test_last_tells_of_the_request_that_ran(model):
    engine = EdgeEngine(model, context=128, compile=False)
    first = engine.generate(PROMPT, max_new_tokens=4)
    open_request = engine.stream(PROMPT, max_new_tokens=4)
    with engine.claim(), pytest.raises(RuntimeError, match="is not finished"):
        engine.generate([3, 4, 5])
    list(open_request)
    assert engine.last.token_ids == first.token_ids


def test_an_interrupted_prefill_keeps_the_chunks_that_were_read(model):
    engine = EdgeEngine(model, context=128, chunk=8, compile=False)
    read = []

    def stop():
        read.append(1)
        if len(read) == 4:
            raise KeyboardInterrupt

    engine.on_chunk = stop
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPT, max_new_tokens=5)
    engine.on_chunk = None
    answer = engine.generate(PROMPT, max_new_tokens=5)
    assert answer.reused_tokens == 24
    assert (
        answer.token_ids == EdgeEngine(model, context=128, compile=False).generate(PROMPT, max_new_tokens=5).token_ids
    )


def test_no_shape_of_a_step_is_one_too_many(tiny_config, monkeypatch):
    """Dynamo gives up on a code object after eight programs; its own limit is lowered to one here."""
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    model = MiniCPM4ForCausalLM(tiny_config(num_hidden_layers=1)).eval()
    compiled, eager = SlotRunner(model, 64, batch=2, compile=True), SlotRunner(model, 64, batch=2)
    for runner in (compiled, eager):
        for row in range(2):
            runner.prefill(PROMPT[:20], 64, row=row)
    for rows in (1, 2):
        tokens = torch.full((rows,), 7)
        assert torch.allclose(compiled.decode(tokens), eager.decode(tokens), atol=1e-4, rtol=0)
    assert compiled.compile
