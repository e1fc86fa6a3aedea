"""The engine says what `model.generate` says: chunks, drafts, batches, turns, and after whatever went wrong before."""

import functools
import gc
import threading

import pytest
import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
)

from conftest import SPARSE, make_config
from transformers_minicpm4 import MiniCPM4ForCausalLM
from transformers_minicpm4.edge.engine import EdgeEngine
from transformers_minicpm4.edge.runner import SlotRunner
from transformers_minicpm4.generation.draft_tree import ROOT, DraftTree
from transformers_minicpm4.generation.drafts import Draft, ModelDraft, PromptLookupDraft
from transformers_minicpm4.generation.eagle import EagleConfig, EagleDraft, EagleHead
from transformers_minicpm4.model.prefix_cache import PrefixCache


VOCABULARY = 128
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3, "eos_token_id": 127,
    "pad_token_id": 0, "bos_token_id": 1, "max_position_embeddings": 512,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32,
    "short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)],
}  # fmt: skip
CHANGES = {
    "sparse": {"sparse_config": SPARSE.to_dict()},
    "nope": {"sparse_config": {**SPARSE.to_dict(), "use_nope": True}},
    "switch": {"sparse_config": {**SPARSE.to_dict(), "dense_len": 50}},
    "longrope": {"rope_parameters": LONGROPE},
}
KINDS = ["llama", "head_dim", "qwen2", "dense", *CHANGES]


@functools.cache
def build(kind):
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    if kind == "head_dim":
        return LlamaForCausalLM(LlamaConfig(**SIZES, head_dim=24, tie_word_embeddings=True)).eval()
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval()
    attention = "infllm_v2" if "sparse_config" in CHANGES.get(kind, {}) else "sdpa"
    return MiniCPM4ForCausalLM._from_config(
        make_config(**CHANGES.get(kind, {}), num_hidden_layers=2), attn_implementation=attention
    ).eval()


def text(length, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(3, 60, (length,), generator=generator).tolist()


def plain(model, prompt, **options):
    """What `model.generate` adds to a prompt."""
    simple = not options.keys() - {"max_new_tokens"} and model.generation_config.eos_token_id == 127
    if simple:  # asked for again and again
        return list(_plain(model, tuple(prompt), options.get("max_new_tokens", 20)))
    options = {"max_new_tokens": 20, "do_sample": False, **options}
    return model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()


@functools.cache
def _plain(model, prompt, new):
    return model.generate(torch.tensor([prompt]), max_new_tokens=new, do_sample=False)[0, len(prompt) :].tolist()


def engine(model, **options):
    return EdgeEngine(model, **{"context": 192, "chunk": 23, "compile": False, **options})


def differs(model, prompt, got, want):
    """`[]`, or the gap of the two best logits where two answers part: a list of ties."""
    if got == want:
        return []
    place = next((i for i, (a, b) in enumerate(zip(got, want)) if a != b), None)
    assert place is not None, (got, want)
    with torch.no_grad():
        best = model(torch.tensor([[*prompt, *got[:place]]])).logits[0, -1].topk(2).values
    gap = (best[0] - best[1]).item()
    assert gap < 1e-4, (gap, got, want)
    return [gap]


class Trees(Draft):
    """Trees of any shape: nonsense, or the true answer among nonsense."""

    def __init__(self, answer=None, nodes=12):
        self.random, self.answer, self.nodes = torch.Generator().manual_seed(0), answer, nodes

    def draw(self, high):
        return int(torch.randint(high, (1,), generator=self.random))

    def propose(self, token_ids, limit):
        if self.answer is not None:
            good = self.answer[len(token_ids) : len(token_ids) + min(5, limit)]
            wrong = [[*good[:place], (token + 1) % VOCABULARY] for place, token in enumerate(good)]
            return DraftTree.from_chains([*wrong[:2], good, *wrong[2:]])
        tokens, parents, depths = [], [], []
        for node in range(self.draw(self.nodes + 1)):
            parent = self.draw(node + 1) - 1
            if parent != ROOT and depths[parent] == limit:
                parent = ROOT
            tokens.append(self.draw(VOCABULARY))
            parents.append(parent)
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return DraftTree(tuple(tokens), tuple(parents))


# --- The same tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_are_those_of_generate(kind):
    """Prompts of many lengths through one engine; each chunk size."""
    model, ties = build(kind), []
    prompts = [text(length) for length in (1, 2, 9, 31, 75, 150)]
    want = [plain(model, prompt) for prompt in prompts]
    for chunk in (1000,) if kind in ("llama", "head_dim", "qwen2") else (7, 32):
        ours = engine(model, chunk=chunk)
        for prompt, answer in zip(prompts, want):
            got = ours.generate(prompt, max_new_tokens=20)
            ties += differs(model, prompt, got.token_ids, answer)
            assert got.prompt_tokens == len(prompt)
            assert got.finish_reason == ("stop" if answer[-1] == 127 else "length")
    assert len(ties) <= 1, ties


@pytest.mark.parametrize("kind", ["llama", "sparse", "nope", "switch"])
def test_drafts_change_nothing(kind):
    model, small, ties = build(kind), build("qwen2"), []
    for length in (9, 60) if kind == "sparse" else (50,):
        prompt = text(length)
        want = plain(model, prompt, max_new_tokens=30)
        drafts = {
            "nonsense": Trees(),
            "perfect": Trees([*prompt, *want]),
            "lookup": PromptLookupDraft(branches=3),
            "tree": ModelDraft(small, depth=3, topk=3, size=9),
            "hidden states": EagleDraft(EagleHead(EagleConfig.for_target(model.config)).eval()),
        }
        for name, draft in drafts.items():
            ours = engine(model, draft=draft, tree_size=None if name == "lookup" else 20)
            got = ours.generate(prompt, max_new_tokens=30)
            ties += differs(model, prompt, got.token_ids, want)
            assert got.passes + got.accepted == len(got.token_ids)
            if name == "perfect" and len(want) == 30:
                assert got.passes <= 30 / 5 + 1
            # And through generate.
            output = model.generate(
                torch.tensor([prompt]), custom_generate=ours.decode, max_new_tokens=30, do_sample=False
            )
            assert output[0].tolist() == [*prompt, *got.token_ids]
    assert len(ties) <= 1, ties


def test_windows_that_end_where_nothing_was_accepted_are_compressed():
    """Sparse attention goes by compressed keys, also those that a pass completed whose whole tree was refused."""
    model = build("sparse")
    ours = engine(model, draft=Trees(nodes=3))
    ours.generate(text(40), max_new_tokens=100, min_new_tokens=100)
    whole = SlotRunner(model, ours.context)
    whole.prefill(ours._texts[0], 1000)
    length = len(ours._texts[0])
    assert length == 139
    for one, other in zip(ours._runner.cache.layers, whole.cache.layers):
        for name, coarse in (("fine", False), ("coarse", True)):
            size, stride = SPARSE.windows(coarse)
            count = (length - size) // stride + 1
            got, want = (getattr(layer, name)[:, :, :count] for layer in (one, other))
            assert torch.allclose(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "sparse"])
def test_custom_generate_with_padded_rows(kind):
    model = build(kind)
    prompts = [text(length) for length in (30, 12, 21)]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options = {"max_new_tokens": 15, "do_sample": False, "repetition_penalty": 1.2}
    want = model.generate(ids, attention_mask=mask, **options)
    ours = engine(model, batch=4)
    got = model.generate(ids, attention_mask=mask, custom_generate=ours.decode, **options)
    assert got.tolist() == want.tolist()
    # One row, padded further than the context is long: what counts is the text.
    far = torch.tensor([[0] * 300 + prompts[0]])
    ours = engine(model, draft=EagleDraft(EagleHead(EagleConfig.for_target(model.config)).eval()))
    got = model.generate(
        far, attention_mask=(far != 0).long(), custom_generate=ours.decode, max_new_tokens=15, do_sample=False
    )
    assert got[0, 330:].tolist() == plain(model, prompts[0], max_new_tokens=15)


@pytest.mark.parametrize("kind", ["dense", pytest.param("sparse", marks=pytest.mark.slow)])
def test_compiled_steps_say_the_same(kind):
    """A tree padded to the engine's size, and no tree."""
    config = make_config(**CHANGES.get(kind, {}), num_hidden_layers=1)
    attention = "sdpa" if kind == "dense" else "infllm_v2"
    model, prompt = MiniCPM4ForCausalLM._from_config(config, attn_implementation=attention).eval(), text(40)
    want = plain(model, prompt, max_new_tokens=12)
    ours = engine(model, compile=True, draft=Trees([*prompt, *want[:6], *text(9)], nodes=5), tree_size=11)
    assert ours.generate(prompt, max_new_tokens=12).token_ids == want
    assert ours._runner.compile  # it did not fall back
    # No tree.
    assert ours.generate(prompt, max_new_tokens=1).token_ids == want[:1]


# --- Rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "nope", "switch"])
def test_rows_are_answered_as_if_alone(kind):
    """Different lengths, more and fewer rows by turns, and rows that end while others go on."""
    model = build(kind)
    prompts = [text(length) for length in (70, 5, 33, 50)]
    alone = [plain(model, prompt, max_new_tokens=25) for prompt in prompts]
    ours = engine(model, batch=4, context=110)
    ties = []
    for some in ((0, 1, 2, 3), (1, 2), (3,), (2, 3, 0)):
        for prompt, got in zip(
            (prompts[i] for i in some), ours.generate([prompts[i] for i in some], max_new_tokens=25)
        ):
            ties += differs(model, prompt, got.token_ids, alone[prompts.index(prompt)])
    end = alone[1][8]
    want = [plain(model, prompt, max_new_tokens=25, eos_token_id=end) for prompt in prompts]
    assert len({len(answer) for answer in want}) > 1
    for prompt, got, answer in zip(prompts, ours.generate(prompts, max_new_tokens=25, eos_token_id=end), want):
        ties += differs(model, prompt, got.token_ids, answer)
        assert got.finish_reason == ("stop" if answer[-1] == end else "length")
    assert len(ties) <= 1, ties


class EndsRow(StoppingCriteria):
    """Ends a row when it has a multiple of 7 in its new tokens."""

    def __init__(self, begin):
        self.begin = begin

    def __call__(self, ids, scores, **kwargs):
        return (ids[:, self.begin :] % 7 == 0).any(-1)


def test_a_stopping_criterion_ends_its_row_alone():
    model = build("llama")
    prompts = [text(20, seed) for seed in range(4)]
    criteria = StoppingCriteriaList([EndsRow(20)])
    ours = engine(model, batch=4)
    want = [plain(model, prompt, stopping_criteria=criteria) for prompt in prompts]
    assert len({len(answer) for answer in want}) > 1
    got = ours.generate(prompts, max_new_tokens=20, stopping_criteria=criteria)
    assert [answer.token_ids for answer in got] == want
    assert [answer.finish_reason for answer in got] == ["length" if len(a) == 20 else "stop" for a in want]
    single = ours.generate(prompts[0], max_new_tokens=20, stopping_criteria=criteria)
    assert (single.token_ids, single.finish_reason) == (want[0], got[0].finish_reason)


# --- Turns -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, draft", [("dense", False), ("switch", False), ("nope", False), ("sparse", True)])
def test_turns_share_what_they_have_in_common(kind, draft):
    """Longer, shorter, divergent and unrelated prompts: what a fresh engine says, with less to read."""
    model = build(kind)

    def make():
        return engine(model, draft=Trees() if draft else None, tree_size=12 if draft else None)

    ours, ties = make(), []
    first = text(60)
    answer = ours.generate(first, max_new_tokens=20).token_ids
    second = [*first, *answer, *text(10)]
    turns = [
        (second, len(first) + len(answer) - 1),
        (second[:50], 49),
        ([*second[:40], 61, 62, 63, *text(30)], 40),
        (text(90, 1), 0),
        (text(90, 1), 89),
        ([*text(90, 1)[:3], *text(20, 2)], 3),
    ]
    for prompt, shared in turns:
        got = ours.generate(prompt, max_new_tokens=20)
        assert got.reused_tokens >= min(shared, len(prompt) - 1)
        ties += differs(model, prompt, got.token_ids, plain(model, prompt))
    ours.reset()
    assert ours.generate(first, max_new_tokens=20).reused_tokens == 0
    assert len(ties) <= 1, ties


class Interrupt:
    """Raises in the `count`th call of a module from now on."""

    def __init__(self, module, count, error=KeyboardInterrupt):
        self.count, self.error = count, error
        self.handle = module.register_forward_pre_hook(self)

    def __call__(self, module, arguments):
        self.count -= 1
        if self.count == 0:
            self.handle.remove()
            raise self.error


@pytest.mark.parametrize("kind, draft", [("dense", False), ("nope", False), ("sparse", True)])
def test_an_interrupted_request_leaves_the_next_one_alone(kind, draft):
    model = build(kind)
    implementation = model.config._attn_implementation
    layer = model.model.layers[1]  # the first layer has written by then
    ours = engine(model, draft=Trees() if draft else None)
    prompt, other = text(70), [*text(70)[:45], *text(60, 3)]

    def closed(stream):
        next(stream)
        stream.close()

    def dropped(stream):
        next(stream)

    def thrown(stream):
        next(stream)
        with pytest.raises(ZeroDivisionError):
            stream.throw(ZeroDivisionError)

    def interrupted(count):
        def interrupt(stream):
            Interrupt(layer, count)
            with pytest.raises(KeyboardInterrupt):
                list(stream)

        return interrupt

    ours.tokenizer = Numbers()
    # The prompt takes 3 calls.
    turns = [(prompt, other), (other, prompt)]
    for way in (closed, dropped, thrown, *map(interrupted, (1, 3, 4, 7))):
        turns.reverse()
        for first, second in turns[: 2 if way in (closed, thrown) else 1]:
            stream = ours.stream(first, max_new_tokens=12)
            way(stream)
            del stream
            assert not ours._busy.locked()
            assert model.config._attn_implementation == implementation
            held = ours._texts[0]
            assert held == [*first, *ours.last.token_ids][: len(held)]
            got = ours.generate(second, max_new_tokens=10).token_ids
            assert not differs(model, second, got, plain(model, second, max_new_tokens=10))


def test_one_request_at_a_time():
    ours = engine(build("dense"), tokenizer=Numbers())
    one, two = ours.stream(text(9), max_new_tokens=15), ours.stream(text(8))
    next(one)
    for refused in (lambda: next(two), lambda: ours.generate(text(5)), ours.reset):
        with pytest.raises(RuntimeError, match="not finished"):
            refused()
    errors = []

    def other():
        try:
            ours.generate(text(5))
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert len(errors) == 1
    rest = "".join(one)
    assert ours.generate(text(9), max_new_tokens=15).text.endswith(rest)
    never = ours.stream(text(9))  # opened, and not once read
    del never
    assert ours.generate(text(8), max_new_tokens=20).token_ids == plain(ours.model, text(8))


# --- Sampling --------------------------------------------------------------------------------------------------------


SAMPLING = [
    {"temperature": 0.7, "top_p": 0.9},
    {"top_k": 5, "repetition_penalty": 1.3},
    {"temperature": 1.5, "min_new_tokens": 12, "eos_token_id": [*range(3, 128, 3)]},
    {"min_p": 0.1, "no_repeat_ngram_size": 2, "bad_words_ids": [[4], [8, 9]]},
]


@pytest.mark.parametrize("options", SAMPLING)
def test_sampling_draws_the_tokens_that_generate_draws(options):
    """From the same state of the random generator, rows and a single one: the same distributions, and draws."""
    model = build("llama")
    for prompts in ([text(20)], [text(20), text(7), text(13)]):
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        ours = engine(model, batch=3)
        torch.manual_seed(3)
        want = model.generate(ids, attention_mask=mask, do_sample=True, max_new_tokens=20, **options)
        torch.manual_seed(3)
        got = ours.generate(prompts, do_sample=True, max_new_tokens=20, **options)
        for row, answer in zip(want[:, longest:].tolist(), got):
            assert row[: len(answer.token_ids)] == answer.token_ids
            assert not set(row[len(answer.token_ids) :]) - {0}
        if "min_new_tokens" in options:
            assert min(len(answer.token_ids) for answer in got) >= 12
            assert {answer.finish_reason for answer in got} >= {"stop"}


@pytest.mark.parametrize("draft", [None, PromptLookupDraft()])
def test_a_seed_repeats(draft):
    ours = engine(build("dense"), draft=draft)
    options = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 30}
    one, two, other = (ours.generate(text(30), seed=seed, **options).token_ids for seed in (1, 1, 2))
    torch.manual_seed(8)
    state = torch.get_rng_state()
    assert ours.generate(text(30), seed=1, **options).token_ids == one == two != other
    assert torch.equal(torch.get_rng_state(), state)  # a seeded request leaves the global generator alone


def test_processors_are_handed_on():
    def only_even(ids, scores):
        return scores.masked_fill(torch.arange(scores.shape[-1]) % 2 == 1, -torch.inf)

    from transformers import LogitsProcessorList

    model = build("dense")
    processors = LogitsProcessorList([only_even])
    got = engine(model, draft=Trees()).generate(text(30), max_new_tokens=20, logits_processor=processors)
    assert got.token_ids == plain(model, text(30), logits_processor=processors)
    assert not any(token % 2 for token in got.token_ids)


def test_what_ends_an_answer():
    model, prompt = build("llama"), text(30)
    answer = plain(model, prompt)
    ours = engine(model)
    for ends in (answer[6], [answer[9], answer[4], 3], torch.tensor([answer[5]]), None):
        got = ours.generate(prompt, max_new_tokens=20, eos_token_id=ends)
        assert got.token_ids == plain(model, prompt, eos_token_id=ends)
        assert got.finish_reason == ("length" if ends is None else "stop")
    before = model.generation_config.eos_token_id
    try:
        model.generation_config.eos_token_id = [127, answer[7], answer[3]]
        assert ours.generate(prompt, max_new_tokens=20).token_ids == plain(model, prompt)
        model.generation_config.eos_token_id = None
        assert ours.generate(prompt, max_new_tokens=20).token_ids == plain(model, prompt)
    finally:
        model.generation_config.eos_token_id = before


# --- Text ------------------------------------------------------------------------------------------------------------


class Numbers:
    """A tokenizer of numbers."""

    eos_token_id = 127
    bos_token = chat_template = None
    all_special_ids, added_tokens_decoder = [127], {}

    def __call__(self, text, **kwargs):
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids, **kwargs):
        return "".join(f"{token} " for token in ids if token != 127)

    def convert_ids_to_tokens(self, token):
        return str(token)


@pytest.fixture(scope="module")
def spoken():
    """SmolLM2's tokenizer and a random model of its vocabulary."""
    from transformers_minicpm4.cli.assets import smollm2_path

    try:
        tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    except FileNotFoundError as error:
        pytest.skip(f"no converted SmolLM2 weights: {error}")
    config = LlamaConfig(**{**SIZES, "vocab_size": 49152, "hidden_size": 16, "num_hidden_layers": 1,
                            "eos_token_id": tokenizer.eos_token_id, "initializer_range": 1.0})  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval(), tokenizer


def test_pieces_are_the_text_and_the_text_is_the_decoded_tokens(spoken):
    model, tokenizer = spoken
    ours = engine(model, tokenizer=tokenizer, draft=PromptLookupDraft())
    for seed, prompt in enumerate(
        ("大模型在手机上运行。", "The quick 👩‍👩‍👧‍👦", [{"role": "user", "content": "Hi 你好"}])
    ):
        options = {"do_sample": True, "seed": seed, "max_new_tokens": 60, "temperature": 1.0}
        pieces = list(ours.stream(prompt, **options))
        answer = ours.last
        assert len(pieces) > 20
        assert "".join(pieces) == answer.text == tokenizer.decode(answer.token_ids, skip_special_tokens=True)
        whole = ours.generate(prompt, **options)
        assert (whole.text, whole.token_ids) == (answer.text, answer.token_ids)
        # A stop string out of its middle: cut before it, and nothing of it was shown.
        stop = [answer.text[25:31], "no such text"]
        cut = "".join(ours.stream(prompt, stop=stop, **options))
        assert cut == ours.last.text == answer.text[: answer.text.index(stop[0])]
        assert ours.last.finish_reason == "stop"
        assert answer.token_ids[: len(ours.last.token_ids)] == ours.last.token_ids
        # Text to go on from.
        again = ours.generate(prompt, max_new_tokens=5)
        assert again.token_ids == plain(model, ours.encode(prompt), max_new_tokens=5)


def test_messages_and_texts_are_rows_too(spoken):
    model, tokenizer = spoken
    ours = engine(model, tokenizer=tokenizer, batch=2)
    prompts = ["One prompt", [{"role": "user", "content": "another"}]]
    together = ours.generate(prompts, max_new_tokens=8)
    for prompt, answer in zip(prompts, together):
        assert ours.generate(prompt, max_new_tokens=8).token_ids == answer.token_ids
    chat = tokenizer.apply_chat_template(prompts[1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ours.encode(prompts[1]) == chat


def test_a_stop_string_found_at_the_end_is_a_stop():
    """It is complete, and waits for a longer one that began before it, until the answer ends."""
    model, prompt = build("llama"), text(30)
    answer = plain(model, prompt, max_new_tokens=6)
    ours = engine(model, tokenizer=Numbers())
    stop = [f"{answer[4]} {answer[5]} never", f"{answer[5]} "]
    got = ours.generate(prompt, max_new_tokens=6, stop=stop)
    assert got.text == Numbers().decode(answer[:5])
    assert got.finish_reason == "stop"
    assert ours.generate(prompt, max_new_tokens=6, stop=None).text == Numbers().decode(answer)


# --- Limits and errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, draft", [("llama", None), ("llama", "perfect"), ("llama", "lookup"), ("sparse", "nonsense")]
)
def test_answers_end_at_the_context(kind, draft):
    """A context that is no multiple of anything; drafts near its end."""
    model, prompt = build(kind), text(60)
    want = plain(model, prompt, max_new_tokens=50, min_new_tokens=40)
    drafts = {"nonsense": Trees(nodes=40), "perfect": Trees([*prompt, *want]), "lookup": PromptLookupDraft()}
    ours = engine(model, context=101, draft=drafts.get(draft))
    got = ours.generate(prompt, max_new_tokens=300, min_new_tokens=40)
    assert len(got.token_ids) == 41
    assert got.token_ids == want[:41]
    assert got.finish_reason == ("stop" if want[40] == 127 else "length")
    for new in (1, 2, 40):
        assert len(ours.generate(prompt, max_new_tokens=new, min_new_tokens=new).token_ids) == new
    assert len(ours.generate(text(100), min_new_tokens=1).token_ids) == 1
    output = model.generate(
        torch.tensor([prompt]), custom_generate=ours.decode, max_new_tokens=300, min_new_tokens=40, do_sample=False
    )
    assert output[0].tolist() == [*prompt, *want[:41]]


def test_bad_requests_are_refused_and_the_next_one_works():
    model = build("llama")
    ours = engine(model, batch=2)
    spoken = engine(model, tokenizer=Numbers())
    refused = [
        (ours, [], {}, "prompt is empty"),
        (ours, [[], [3]], {}, "prompt is empty"),
        (ours, torch.empty(1, 0, dtype=torch.long), {}, "prompt is empty"),
        (ours, text(192), {}, "192 tokens and the engine's context is 192"),
        (ours, [text(3)] * 3, {}, "3 prompts were given to an engine of batch=2"),
        (ours, [128], {}, "between 0 and 127; got 128"),
        (ours, [-1, 4], {}, "got -1 to 4"),
        (ours, [3.5, 4], {}, "token ids are whole numbers"),
        (ours, torch.tensor([[3, 4], [5, 6]]), {}, "one prompt.*\\[2, 2\\]"),
        (ours, "text", {}, "without a tokenizer"),
        (ours, [{"role": "user", "content": "x"}], {}, "without a tokenizer"),
        (ours, text(5), {"stop": "x"}, "need the engine to have a tokenizer"),
        (spoken, [{"role": "user", "content": "x"}], {}, "no chat template"),
        (spoken, "3 \ud83d", {}, "lone surrogate at character 2"),
        (spoken, "", {}, "prompt is empty"),
        (spoken, text(5), {"stop": ["\ud83d"]}, "lone surrogate"),
        (spoken, text(5), {"stop": [""]}, "stop string is empty"),
        (ours, text(5), {"num_beams": 2}, "num_beams=2 is not available"),
        (ours, text(5), {"max_new_tokens": 0}, "max_new_tokens"),
        (ours, text(5), {"max_new_tokens": None}, "max_new_tokens"),
        (ours, text(5), {"max_length": 9}, "max_length.*max_new_tokens"),
        (ours, text(5), {"generation_config": GenerationConfig()}, "generation_config"),
        (ours, text(5), {"temprature": 0.5}, "temprature"),
        (ours, text(5), {"do_sample": True, "temperature": -1.0}, "temperature"),
    ]
    for one, prompt, options, words in refused:
        for call in (one.generate, one.stream):
            if call == one.stream and isinstance(prompt, list) and prompt and isinstance(prompt[0], list):
                continue
            with pytest.raises(ValueError, match=words):
                call(prompt, **options)
        assert not one._busy.locked()
        assert one.generate(text(9), max_new_tokens=3).token_ids == plain(model, text(9), max_new_tokens=3)
    with pytest.raises(ValueError, match="one prompt"):
        ours.stream([text(3), text(4)])


def test_bad_engines_are_refused():
    model = build("llama")
    other = LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": 64}))
    for options, words in [
        ({"context": 0}, "context must be a whole number"),
        ({"batch": True}, "batch must be"),
        ({"chunk": 2.5}, "chunk must be"),
        ({"draft": Trees(), "tree_size": 65}, "tree_size.*65"),
        ({"draft": Trees(), "tree_size": 0}, "tree_size.*0"),
        ({"draft": ModelDraft(other)}, "vocabulary of 64 tokens and the target one of 128"),
        ({"capture": True}, "needs a CUDA device"),
        ({"prefix": PrefixCache([3], [torch.zeros(1, 2, 1, 16)], [torch.zeros(1, 2, 1, 16)])}, "of 1 layers"),
    ]:
        with pytest.raises(ValueError, match=words):
            engine(model, **options)
    nope = build("nope")
    with pytest.raises(ValueError, match="use_nope"):
        engine(nope, prefix=PrefixCache.from_model(nope, [3]))
    sliding = Qwen2ForCausalLM(Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=0))
    with pytest.raises(ValueError, match="cache layers of type"):
        engine(sliding)
    with pytest.raises(ValueError, match="made for another model"):
        other.generate(torch.tensor([[3]]), custom_generate=engine(model).decode, max_new_tokens=2)


def test_a_tree_above_the_engines_size_is_refused_and_the_next_request_works():
    model, prompt = build("llama"), text(9)
    ours = engine(model, draft=Trees(text(60), nodes=12), tree_size=2)
    with pytest.raises(ValueError, match="tree of .* nodes.* made for 2;"):
        ours.generate(prompt, max_new_tokens=20)
    ours.draft.answer, ours.draft.nodes = None, 2
    assert ours.generate(prompt, max_new_tokens=20).token_ids == plain(model, prompt)


def test_decode_refuses_what_it_would_ignore():
    model = build("llama")
    ours = engine(model)
    ids = torch.tensor([text(9)])
    options = {"custom_generate": ours.decode, "max_new_tokens": 5, "do_sample": False}
    cache = PrefixCache.from_model(model, text(4)).to_cache(model)
    with pytest.raises(ValueError, match="past_key_values"):
        model.generate(ids, past_key_values=cache, **options)
    right = torch.tensor([[1] * 8 + [0]])
    with pytest.raises(ValueError, match="padded on the left"):
        model.generate(ids, attention_mask=right, **options)
    output = model.generate(ids, return_dict_in_generate=True, **options)
    assert output.sequences[0, 9:].tolist() == plain(model, text(9), max_new_tokens=5)


# --- A stored prefix -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", [None, "lookup", "hidden"])
@pytest.mark.parametrize("kind, words", [("dense", [3, 9, 4]), ("sparse", [3])])
def test_a_stored_prefix_stands_for_its_tokens(kind, words, draft):
    """Keys and values that are not the model's own, so that it shows who wrote them: in every order of requests."""
    model = build(kind)
    prefix = PrefixCache.from_model(model, words)
    generator = torch.Generator().manual_seed(4)
    for tensor in prefix.keys + prefix.values:
        tensor += torch.randn(tensor.shape, generator=generator)

    class Sees(PromptLookupDraft):
        hidden_layers = (-1,)

    def want(prompt):
        ids, mask = prefix.prepend(torch.tensor([prompt]))
        cache = prefix.to_cache(model)
        options = {"max_new_tokens": 9, "do_sample": False}
        return model.generate(ids, attention_mask=mask, past_key_values=cache, **options)[0, ids.shape[1] :].tolist()

    drafts = {"lookup": PromptLookupDraft(), "hidden": Sees()}
    ours = engine(model, prefix=prefix, batch=2, draft=drafts.get(draft))
    first = text(50)
    answer = want(first)
    assert answer != plain(model, [*words, *first], max_new_tokens=9)
    prompts = [first, [*first, *answer, 5, 6], text(30, 1), words, text(20, 2), [*words, *text(40)], first[:4], first]
    reused = []
    for prompt in prompts:
        got = ours.generate(prompt, max_new_tokens=9)
        assert got.token_ids == want(prompt)
        reused.append(got.reused_tokens)
    assert reused[0] == 0
    if draft != "hidden":
        assert reused[1] >= len(words) + len(first)
    for prompt, got in zip((text(7), first), ours.generate([text(7), first], max_new_tokens=9)):
        assert got.token_ids == want(prompt)
    # Through generate nothing is put in front; a prompt that is the prefix leaves nothing behind for others.
    model.generate(torch.tensor([words]), custom_generate=ours.decode, max_new_tokens=3)
    assert ours.generate(first, max_new_tokens=9).token_ids == answer


# --- The model, memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "sparse"])
def test_the_model_is_left_as_it_was(kind):
    model = build(kind)
    ids = torch.tensor([text(40)])
    with torch.no_grad():
        before = model(ids).logits
    config, generation = model.config.to_dict(), model.generation_config.to_dict()
    ours = engine(model, draft=Trees())
    ours.generate(text(30), max_new_tokens=9, top_k=3, do_sample=True, eos_token_id=5)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    assert (model.config.to_dict(), model.generation_config.to_dict()) == (config, generation)
    assert model.config._attn_implementation == ("sdpa" if kind == "llama" else "infllm_v2")


def test_requests_leave_nothing_behind():
    ours = engine(build("sparse"), draft=Trees(), tokenizer=Numbers())

    def use():
        for length in (5, 30):
            ours.generate(text(length), max_new_tokens=12, stop=["no"], repetition_penalty=1.1)
            next(ours.stream(text(length, 1)))

    def count():
        gc.collect()
        things = gc.get_objects()
        return sum(issubclass(type(thing), torch.Tensor) for thing in things), len(things)

    use()
    use()
    before = count()
    for _ in range(3):
        use()
    after = count()
    assert after[0] == before[0]
    assert after[1] <= before[1] + 60


@pytest.mark.parametrize("inside", ["creation", "first request"])
def test_inference_mode_around_a_part_of_it(inside):
    model, prompt = build("sparse"), text(30)
    with torch.inference_mode():
        ours = engine(model, draft=Trees())
        if inside == "first request":
            ours.generate(prompt, max_new_tokens=5)
    assert ours.generate(prompt, max_new_tokens=20).token_ids == plain(model, prompt)
    with torch.inference_mode():
        assert ours.generate(text(31), max_new_tokens=20).token_ids == plain(model, text(31))


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_bfloat16(kind):
    """Sums in another order round to other numbers; a token that differs was as good as the best one."""
    torch.manual_seed(0)
    changes = CHANGES.get(kind, {})
    attention = "infllm_v2" if changes else "sdpa"
    model = MiniCPM4ForCausalLM._from_config(make_config(**changes), attn_implementation=attention).eval().bfloat16()
    ours = engine(model, draft=Trees())
    for prompt in (text(12), text(70)):
        got = ours.generate(prompt, max_new_tokens=20).token_ids
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *got]])).logits[0, len(prompt) - 1 : -1].float()
        lost = logits.amax(-1) - logits.gather(1, torch.tensor(got)[:, None])[:, 0]
        assert (lost <= logits.abs().amax(-1) / 32).all(), lost
