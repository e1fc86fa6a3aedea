"""Both forms of a chat template render one text, and the training form marks exactly what the assistant writes."""

import itertools
import random

import pytest
from jinja2 import TemplateError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from transformers_minicpm4.generation import chat_template


NAMES = ("minicpm4", "minicpm4.1")
CONTENTS = ("", "Hello", "  two\nlines ", "\n", "answer: 42 <tag> {{ x }}", "問い", "<think>\nhm\n</think>\nyes")
ROLES = ("system", "user", "assistant", "tool")
TRAINING_TEXT = ["user and assistant speak in turns", "system: be brief", "answer: 42", "two lines\n\nof text"]


@pytest.fixture(scope="module")
def tokenizer():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special_tokens = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TRAINING_TEXT * 3, trainer)
    # As the released tokenizer: encoding a text puts <s> in front.
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="<|im_end|>", unk_token="<unk>", pad_token="</s>"
    )


def conversations(count=60, seed=0):
    """Every single message, then `count` random conversations of up to seven messages in any order of roles."""
    for role, content in itertools.product(ROLES, CONTENTS):
        yield [{"role": role, "content": content}]
    chance = random.Random(seed)
    for _ in range(count):
        length = chance.randint(2, 7)
        yield [{"role": chance.choice(ROLES), "content": chance.choice(CONTENTS)} for _ in range(length)]


def chatml(messages, add_generation_prompt=False, no_thinking=False):
    """ChatML written out, as (piece of text, whether the assistant writes it)."""
    pieces = []
    for message in messages:
        pieces.append((f"<|im_start|>{message['role']}\n", False))
        pieces.append((f"{message['content']}<|im_end|>", message["role"] == "assistant"))
        pieces.append(("\n", False))
    if add_generation_prompt:
        pieces.append(("<|im_start|>assistant\n" + ("<think>\n\n</think>\n" if no_thinking else ""), False))
    return pieces


@pytest.mark.parametrize("thinking", [{}, {"enable_thinking": True}, {"enable_thinking": False}], ids=str)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_both_forms_render_chatml(tokenizer, name, training, add_generation_prompt, thinking):
    no_thinking = name == "minicpm4.1" and thinking.get("enable_thinking") is False
    for messages in conversations():
        rendered = tokenizer.apply_chat_template(
            messages,
            chat_template=chat_template(name, training=training),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **thinking,
        )
        assert rendered == "".join(text for text, _ in chatml(messages, add_generation_prompt, no_thinking))


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_mask_is_what_the_assistant_writes(tokenizer, name, add_generation_prompt):
    for messages in conversations():
        encoded = tokenizer.apply_chat_template(
            messages,
            chat_template=chat_template(name, training=True),
            add_generation_prompt=add_generation_prompt,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        written, text = set(), ""
        for piece, by_assistant in chatml(messages, add_generation_prompt):
            if by_assistant:
                written.update(range(len(text), len(text) + len(piece)))
            text += piece
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        # A token that straddles the edge (content that begins with a line break) belongs to the assistant.
        expected = [int(any(position in written for position in range(*offset))) for offset in offsets]
        assert encoded["assistant_masks"] == expected, messages


@pytest.mark.parametrize("name", NAMES)
def test_every_answer_ends_on_a_trained_stop_token_and_nothing_follows(tokenizer, name):
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "answer: 42"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": ""},
    ]
    encoded = tokenizer.apply_chat_template(
        messages,
        chat_template=chat_template(name, training=True),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    marked = [token for token, mark in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == "answer: 42<|im_end|><|im_end|>"


@pytest.mark.parametrize("name", NAMES)
def test_trl_accepts_the_training_form(tokenizer, name):
    utils = pytest.importorskip("trl.chat_template_utils")
    template = chat_template(name, training=True)
    assert utils.has_generation_markers(template)
    assert not utils.has_generation_markers(chat_template(name))
    assert utils.is_chat_template_stop_token_trained(tokenizer, chat_template=template)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_an_unfinished_answer_can_be_continued(tokenizer, name, training):
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "answer: "}]
    rendered = tokenizer.apply_chat_template(
        messages,
        chat_template=chat_template(name, training=training),
        tokenize=False,
        continue_final_message=True,
    )
    assert rendered == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nanswer: "


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("content", [None, [{"type": "image"}], 3])
def test_content_that_is_not_text_is_refused(tokenizer, name, training, content):
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": content}]
    with pytest.raises(TemplateError, match="message 2 is not"):
        tokenizer.apply_chat_template(messages, chat_template=chat_template(name, training=training), tokenize=False)


@pytest.mark.parametrize("name", ["minicpm", "minicpm4_training", "../minicpm4", ""])
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ValueError, match=r'"minicpm4" and "minicpm4\.1"') as error:
        chat_template(name)
    assert repr(name) in str(error.value)
