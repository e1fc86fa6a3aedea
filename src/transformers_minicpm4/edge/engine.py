"""
Generation on one machine with memory that is planned, taken once and kept: chunked prefill, compiled or captured
steps, drafts that are verified, text that streams, and turns that share what they have in common.

The tokens are those of `model.generate` with the same arguments. Letters: `B` rows, `S` tokens.
"""

from __future__ import annotations

import operator
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.utils import logging

from ..generation.chat import as_ids, encode_rendered, end_ids
from ..generation.draft_tree import MAX_NODES
from ..generation.drafts import Draft
from ..generation.speculative import decode_passes
from ..generation.text_stream import TextStream
from ..model.prefix_cache import PrefixCache
from .device_profile import DeviceProfile
from .memory_plan import CHUNK_TOKENS, MemoryPlan
from .runner import SlotRunner, compiler_missing


logger = logging.get_logger(__name__)

MAX_NEW_TOKENS = 256
# Slots where no plan was made, if the model is meant for that many tokens.
UNPLANNED_CONTEXT = 8192


@dataclass
class Generation:
    """
    One answer.

    Attributes:
        text: without the stop string that ended it.
        token_ids: as they were generated, the end-of-text token included.
        finish_reason: `"stop"` (an end-of-text token, a stop string or a stopping criterion) or `"length"`.
        prompt_tokens: of the prompt, of which `reused_tokens` were in the cache from an earlier request.
        passes: of the model while decoding; `proposed` drafted tokens were looked at and `accepted` of them agreed to.
        prefill_seconds, decode_seconds: of the whole batch.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    prompt_tokens: int = 0
    reused_tokens: int = 0
    passes: int = 0
    proposed: int = 0
    accepted: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return len(self.token_ids) / self.decode_seconds if self.decode_seconds else 0.0


class EdgeEngine:
    """
    Args:
        model: a causal language model with full attention or InfLLM v2, where it is to run.
        tokenizer: needed for text; prompts of token ids do without.
        context: most tokens a row, prompt and answer together. By default the plan's, or what the model is meant for,
            at most 8,192.
        batch: most rows of a request.
        draft: drafts tokens for requests of one row (`generation.drafts`, `generation.eagle`).
        tree_size: nodes of the draft's largest tree; by default `draft.size`.
        chunk: tokens of a prefill call.
        compile: whether steps are compiled (`None`: where a compiler is). The first step of each shape takes a while.
        capture: whether steps are captured as CUDA graphs (`None`: on CUDA).
        prefix: keys and values that every prompt begins with (`PrefixCache`).
        plan: what was planned, for reference.

    Raises:
        ValueError: a number below 1, or a model that keeps more than keys and values of every token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        context: int | None = None,
        batch: int = 1,
        draft: Draft | None = None,
        tree_size: int | None = None,
        chunk: int | None = None,
        compile: bool | None = None,
        capture: bool | None = None,
        prefix: PrefixCache | None = None,
        plan: MemoryPlan | None = None,
    ):
        limit = model.config.get_text_config().max_position_embeddings
        if context is None:
            context = plan.context if plan is not None else min(limit, UNPLANNED_CONTEXT)
        chunk = CHUNK_TOKENS if chunk is None else chunk
        for name, value in (("context", context), ("batch", batch), ("chunk", chunk)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of 1 or more, got {value!r}.")
        if context > limit:
            logger.warning(f"A context of {context:,} tokens is beyond the {limit:,} that the model is meant for.")
        if draft is None:
            tree_size = 0
        else:
            _check_draft(draft)
            tree_size = draft.size if tree_size is None else tree_size
            if type(tree_size) is not int or not 1 <= tree_size <= MAX_NODES:
                raise ValueError(f"tree_size must be a whole number of 1 to {MAX_NODES} nodes, got {tree_size!r}.")
        device = model.get_input_embeddings().weight.device
        if compile is None or compile:
            reason = compiler_missing(device)
            if reason is not None:
                logger.warning_once(f"Steps run eagerly, which is slower: {reason}.")
            compile = reason is None
        capture = device.type == "cuda" if capture is None else capture
        if capture and device.type != "cuda":
            raise ValueError(f"capture=True needs a CUDA device, and the model is on {device}; leave it out.")
        self.model, self.tokenizer, self.draft, self.plan, self.prefix = model.eval(), tokenizer, draft, plan, prefix
        self.context, self.batch, self.chunk = context, batch, chunk
        self._runner = SlotRunner(
            model,
            context + tree_size,
            batch,
            tree=tree_size,
            hidden_layers=() if draft is None else draft.hidden_layers,
            compile=compile,
            capture=capture,
        )
        # What the slots of each row hold for certain.
        self._texts: list[list[int]] = [[] for _ in range(batch)]
        self._prefixed = [False] * batch  # whether it begins with the stored prefix's keys and values
        self._busy = threading.Lock()
        # Called before each chunk of a prompt; what it raises gives the request up, and the next one can come.
        self.on_chunk: Callable[[], None] | None = None
        self._request: _Request | None = None
        if draft is not None:
            draft.begin(model)  # refuses another vocabulary
        if prefix is not None:
            prefix.to_cache(model)  # refuses another model's
            if self._runner.settings is not None and self._runner.settings.use_nope:
                raise ValueError(
                    "a stored prefix has no un-rotated keys, which use_nope selects by; leave the prefix out."
                )

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        *,
        context: int | None = None,
        batch: int = 1,
        precision: str | None = None,
        draft: Draft | Callable[[PreTrainedModel], Draft] | None = None,
        tree_size: int | None = None,
        profile: DeviceProfile | None = None,
        chunk: int | None = None,
        compile: bool | None = None,
        capture: bool | None = None,
        **kwargs,
    ) -> EdgeEngine:
        """
        Look at the machine, plan, and load a checkpoint as planned.

        Args:
            name_or_path: Hub id or folder.
            context, batch, chunk, draft, tree_size, compile, capture: as for the class. `draft` may also be a function
                that makes one for the model, such as `lambda model: EagleDraft.from_pretrained(folder, model)`; the
                plan then counts a head of EAGLE's size.
            precision: `"fp32"`, `"bf16"`, `"fp16"`; by default what the checkpoint is quantized to, else 16 bits on a
                GPU and, where it fits, 32 bits on a CPU.
            profile: another machine than the one that is detected, such as with less memory to spend.
            kwargs: for the model's `from_pretrained`, such as `attn_implementation`.

        Raises:
            DoesNotFit: no memory for it; names the missing bytes and what would fit.
            ValueError: what the class refuses.
        """
        from .loading import load_planned

        if draft is not None and not callable(draft):
            _check_draft(draft)
        model, tokenizer, prefix, plan = load_planned(
            name_or_path,
            profile,
            context=context,
            batch=batch,
            precision=precision,
            draft=draft,
            tree_size=tree_size,
            chunk=chunk,
            **kwargs,
        )
        if draft is not None and not isinstance(draft, Draft):
            draft = draft(model)  # the class checks what came of it
        return cls(
            model,
            tokenizer,
            batch=batch,
            draft=draft,
            tree_size=tree_size,
            chunk=plan.chunk,
            compile=compile,
            capture=capture,
            prefix=prefix,
            plan=plan,
        )

    @property
    def compiles(self) -> bool:
        """Whether steps are compiled, so that the first ones take a while."""
        return self._runner.compile

    @property
    def captures(self) -> bool:
        """Whether steps are captured as CUDA graphs."""
        return self._runner.capture

    # ------------------------------------------------------------------------------------------------------ requests

    def generate(self, prompt, **options) -> Generation | list[Generation]:
        """
        Answer one prompt, or as many as the engine has rows.

        Args:
            prompt: a text; messages (`[{"role": "user", "content": ...}]`), for which the chat template is used; a
                list of token ids; or a list of such prompts.
            max_new_tokens: 256 by default. An answer ends at the engine's context at the latest.
            stop: strings that end the answer; they are not part of it.
            seed: of the sampling.
            logits_processor, stopping_criteria: as for `model.generate`.
            options: everything else `GenerationConfig` has for sampling: `do_sample` (`False` by default, whatever the
                model's own says), `temperature`, `top_p`, ... An answer ends with `eos_token_id`, by default the
                model's and the tokenizer's.

        Returns:
            [`Generation`], one for each prompt.

        Raises:
            ValueError: an empty prompt, one as long as the context, more prompts than rows, or an unusable option.
            RuntimeError: another request of this engine is not finished.
        """
        prompts = prompt if _is_batch(prompt) else [prompt]
        request = _Request(self, [self.encode(each) for each in prompts], options)
        for _ in request.pieces:
            pass
        return request.answers if _is_batch(prompt) else request.answers[0]

    def stream(self, prompt, **options) -> Iterator[str]:
        """
        The answer to one prompt, piece by piece as it is certain; arguments and errors as for `generate`.

        Whoever stops reading early closes the stream (or drops it): the next request goes on from what is there.
        `engine.last` then tells about the answer.
        """
        request = _Request(self, [self.encode(prompt)], options)  # errors come here, not at the first piece

        def pieces():
            try:
                yield from (text for texts in request.pieces for text in texts if text)
            finally:
                request.pieces.close()

        return pieces()

    @property
    def last(self) -> Generation | None:
        """The answer, as far as it got, of the last request of one prompt."""
        return None if self._request is None else self._request.answers[0]

    def encode(self, prompt) -> list[int]:
        """
        Token ids of a prompt, the engine's prefix in front.

        Raises:
            ValueError: an empty prompt, or a text without a tokenizer for it.
        """
        if isinstance(prompt, (bytes, bytearray)):
            raise ValueError("the prompt is bytes; decode them first: prompt.decode('utf-8', errors='replace').")
        if not isinstance(prompt, (str, Sequence, torch.Tensor)):
            raise ValueError(
                f"a prompt is a text, messages, token ids or a list of them; got a {type(prompt).__name__}."
            )
        if isinstance(prompt, str) or _is_messages(prompt):
            if self.tokenizer is None:
                raise ValueError("a text was given to an engine without a tokenizer; give one, or token ids.")
            ids = self._tokenize(prompt)
        else:
            ids = _token_ids(prompt)
        if not ids:
            raise ValueError("the prompt is empty; give at least one token.")
        prefix = [] if self.prefix is None else list(self.prefix.token_ids)
        # As `PrefixCache.prepend`: at least one token follows the prefix.
        if len(ids) <= len(prefix) or ids[: len(prefix)] != prefix:
            ids = [*prefix, *ids]
        return ids

    def _tokenize(self, prompt) -> list[int]:
        if isinstance(prompt, str):
            return list(self.tokenizer(_valid(prompt), verbose=False)["input_ids"])
        if self.tokenizer.chat_template is None:
            raise ValueError(
                "messages were given and the tokenizer has no chat template; give a text, or store a template: "
                "transformers_minicpm4.generation.chat_template."
            )
        try:
            text = self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template may raise anything over a message that lacks what it reads
            raise ValueError(
                f"the chat template cannot write these messages ({type(error).__name__}: {error}); each needs a role "
                "and a text as content."
            ) from error
        return list(encode_rendered(self.tokenizer, _valid(text))["input_ids"])

    def reset(self) -> None:
        """
        Forget what earlier requests left in the cache.

        Raises:
            RuntimeError: a request is not finished.
        """
        with self.claim():
            self._texts = [[] for _ in range(self.batch)]

    # ------------------------------------------------------------------------------------------------------ decoding

    def decode(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor=None,
        stopping_criteria=None,
        generation_config: GenerationConfig | None = None,
        text_streamer=None,
        generator: torch.Generator | None = None,
        **model_kwargs,  # attention_mask is in here: generate hands a parameter of that name over twice
    ) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """
        For `model.generate(..., custom_generate=engine.decode)`. Rows are padded on the left, as `generate` wants
        them, and what comes back is padded on the right.

        Args:
            input_ids, attention_mask: `[B, S]`.
            text_streamer: a streamer of Transformers, for one row (`generate` keeps the name `streamer` to itself).

        Returns:
            `[B, S + new]`, or `GenerateDecoderOnlyOutput` with `return_dict_in_generate`.

        Raises:
            ValueError: another model, a filled cache, padding on the right, or what `generate` refuses.
        """
        if model is not self.model:
            raise ValueError("this engine was made for another model; call generate of engine.model.")
        given = model_kwargs.get("past_key_values")
        if given is not None and given.get_seq_length():
            raise ValueError(
                f"past_key_values hold {given.get_seq_length()} tokens, and the engine has a cache of its own, which "
                "remembers earlier requests; leave them out."
            )
        prompts = _unpadded(input_ids, model_kwargs.get("attention_mask"))
        ids = input_ids
        with self.claim():
            if text_streamer is not None:
                text_streamer.put(input_ids.cpu())  # as generate does: a streamer may skip it
            for emitted in self._passes(
                prompts, input_ids, logits_processor, stopping_criteria, generation_config, generator
            ):
                ids = torch.cat([ids, torch.tensor(emitted, device=ids.device)], dim=1)
                if text_streamer is not None:
                    for token in emitted[0]:
                        text_streamer.put(torch.tensor([token]))
        if text_streamer is not None:
            text_streamer.end()
        if generation_config is not None and generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=ids)
        return ids

    def claim(self):
        """For the time of a `with`: no request may begin. RuntimeError where one is not finished."""
        return _Claim(self._busy)

    def _passes(
        self, prompts, input_ids, logits_processor, stopping_criteria, generation_config, generator, reports=None
    ) -> Iterator[list[list[int]]]:
        """Tokens of each row, pass by pass: as many for every row; behind a row's end stands the padding token."""
        self._check(prompts, generation_config)
        reports = [Generation() for _ in prompts] if reports is None else reports
        begun = time.perf_counter()
        # A draft sees the ids as they are, and padding is not text.
        draft = self.draft if len(prompts) == 1 and len(prompts[0]) == input_ids.shape[1] else None
        if draft is not None:
            draft.begin(self.model)
        for row, prompt in enumerate(prompts):
            reports[row].prompt_tokens = len(prompt)
            reports[row].reused_tokens = self._fill(row, prompt, draft)
        if self._runner.device.type == "cuda":
            torch.cuda.synchronize(self._runner.device)
        for report in reports:
            report.prefill_seconds = time.perf_counter() - begun
        # Length at which `input_ids`, padding included, ends.
        limit = self.context + input_ids.shape[1] - max(map(len, prompts))
        limit = min(limit, getattr(generation_config, "max_length", None) or limit)
        arguments = (input_ids, logits_processor, stopping_criteria, generation_config, generator, limit, reports)
        decoded = self._decode_one(draft, *arguments) if len(prompts) == 1 else self._decode_rows(prompts, *arguments)
        while True:
            begun = time.perf_counter()
            emitted = next(decoded, None)
            if emitted is None:
                return
            for report in reports:
                report.decode_seconds += time.perf_counter() - begun
                report.passes += 1
            if draft is not None:
                reports[0].proposed, reports[0].accepted = draft.proposed, draft.accepted
            yield emitted

    def _fill(self, row: int, prompt: list[int], draft: Draft | None) -> int:
        """Bring all but the last token of a prompt into a row; returns how many were there."""
        held, wanted = self._texts[row], prompt[:-1]
        common = next((i for i, (a, b) in enumerate(zip(held, wanted)) if a != b), min(len(held), len(wanted)))
        if draft is not None and draft.hidden_layers:
            common = 0  # it needs the hidden states of every token
        prefix = [] if self.prefix is None else list(self.prefix.token_ids)
        prefixed = 0 < len(prefix) <= len(wanted) and wanted[: len(prefix)] == prefix
        if prefixed != self._prefixed[row]:
            common = 0  # what is there was computed with other keys and values
        filled = common
        # Valid whatever happens from here on.
        self._texts[row] = wanted[:common]
        if prefixed and common < len(prefix):
            if draft is not None and draft.hidden_layers:
                self._runner.prefill(prefix, self.chunk, row=row, draft=draft, on_chunk=self.on_chunk)
            self._texts[row], self._prefixed[row] = [], True
            self._write_prefix(row)
            common, filled = len(prefix), 0
            self._texts[row] = wanted[:common]
        elif not prefixed:
            self._prefixed[row] = False
        try:
            self._runner.prefill(wanted, self.chunk, begin=common, row=row, draft=draft, on_chunk=self.on_chunk)
        finally:
            self._texts[row] = wanted[: self._runner.lengths[row]]  # the chunks that were read whole
        return filled

    def _write_prefix(self, row: int) -> None:
        runner, length = self._runner, len(self.prefix.token_ids)
        for layer, keys, values in zip(runner.cache.layers, self.prefix.keys, self.prefix.values, strict=True):
            layer.keys[row, :, :length] = keys[0].to(layer.keys)
            layer.values[row, :, :length] = values[0].to(layer.values)
        runner.cache.compress(torch.zeros(runner.batch, dtype=torch.long, device=runner.device), length)

    def _decode_one(
        self, draft, input_ids, processors, criteria, config, generator, limit, reports
    ) -> Iterator[list[list[int]]]:
        last, length = input_ids[0, -1:].tolist(), input_ids.shape[1]
        for emitted in decode_passes(
            self._runner, draft, input_ids, processors, criteria, config, generator, limit=limit
        ):
            self._texts[0] += [*last, *emitted[:-1]]
            last = emitted[-1:]
            length += len(emitted)
            yield [emitted]
        if length < limit:
            reports[0].finish_reason = "stop"

    def _decode_rows(
        self, prompts, ids, processors, criteria, config, generator, limit, reports
    ) -> Iterator[list[list[int]]]:
        runner = self._runner
        rows = len(prompts)
        padding = _padding(config)
        tokens = torch.tensor([prompt[-1] for prompt in prompts], device=runner.device)
        finished = torch.zeros(rows, dtype=torch.bool, device=ids.device)
        sampled = config is not None and config.do_sample
        while not bool(finished.all()):
            scores = runner.decode(tokens)
            for row, token in enumerate(tokens.tolist()):
                self._texts[row].append(token)
            if sampled or processors:
                scores = scores.to(torch.float32)
                scores = processors(ids, scores) if processors else scores
            if sampled:
                new = torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]
            else:
                new = scores.argmax(-1)
            new = torch.where(finished, padding, new.to(ids.device))
            ids = torch.cat([ids, new[:, None]], dim=1)
            tokens = new
            if criteria:
                finished = finished | criteria(ids, scores)
            if ids.shape[1] >= limit:
                finished = torch.ones_like(finished)
            else:
                for report, ended in zip(reports, finished.tolist()):
                    report.finish_reason = "stop" if ended else report.finish_reason
            yield new[:, None].tolist()

    def _check(self, prompts: list[list[int]], config: GenerationConfig | None) -> None:
        if len(prompts) > self.batch:
            raise ValueError(f"{len(prompts)} prompts were given to an engine of batch={self.batch}; give fewer.")
        vocabulary = self.model.config.get_text_config().vocab_size
        for prompt in prompts:
            if not prompt:
                raise ValueError("the prompt is empty; give at least one token.")
            if not 0 <= min(prompt) <= max(prompt) < vocabulary:
                raise ValueError(f"token ids lie between 0 and {vocabulary - 1}; got {min(prompt)} to {max(prompt)}.")
            if len(prompt) >= self.context:
                raise ValueError(
                    f"the prompt has {len(prompt):,} tokens and the engine's context is {self.context:,}, of which "
                    "the answer needs some too; shorten the prompt, or make the engine with a longer context."
                )
        for name in ("num_beams", "num_return_sequences"):
            if (getattr(config, name, None) or 1) > 1:
                raise ValueError(f"{name}={getattr(config, name)} is not available in the engine; use model.generate.")


def _check_draft(draft) -> None:
    if not isinstance(draft, Draft):
        raise ValueError(
            f"draft={draft!r} was given; give a Draft, such as PromptLookupDraft(), or to from_pretrained a function "
            "that makes one of the model."
        )


class _Claim:
    """One request at a time."""

    def __init__(self, lock: threading.Lock):
        self._lock = lock

    def __enter__(self):
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                "another request of this engine is not finished: read its stream to the end or close it, or make one "
                "engine, with a model of its own, for each thread."
            )

    def __exit__(self, *error):
        self._lock.release()


class _Request:
    """One call: what `generate` prepares of it, and its answers as they grow."""

    def __init__(self, engine: EdgeEngine, prompts: list[list[int]], options: dict):
        self.engine, self.prompts = engine, prompts
        stop = options.pop("stop", None)
        stop = [] if stop is None else [stop] if isinstance(stop, str) else list(stop)
        if stop and engine.tokenizer is None:
            raise ValueError("stop strings need the engine to have a tokenizer.")
        seed = options.pop("seed", None)
        device = engine._runner.device
        self.generator = None if seed is None else torch.Generator(device).manual_seed(seed)
        engine._check(prompts, None)
        for name in ("generation_config", "max_length", "streamer", "attention_mask", "custom_generate"):
            if name in options:
                raise ValueError(f"{name} was given; give max_new_tokens and the other settings by name, or stream.")
        if "stop_strings" in options:
            raise ValueError("stop_strings was given; the engine's own is stop=[...], which also cuts the text.")
        most = options.setdefault("max_new_tokens", MAX_NEW_TOKENS)
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise ValueError(f"max_new_tokens must be a whole number of 1 or more, got {most!r}.")
        longest = max(map(len, prompts))
        options["max_new_tokens"] = min(most, engine.context - longest)
        least = options.get("min_new_tokens") or 0
        if least > options["max_new_tokens"]:
            raise ValueError(
                f"min_new_tokens={least} is above the {options['max_new_tokens']} tokens there is room for."
            )
        self.arguments = self._prepare(options, longest)
        engine._check(prompts, self.arguments[3])
        self.streams = [TextStream(engine.tokenizer, stop) if engine.tokenizer is not None else None for _ in prompts]
        self.answers = [Generation() for _ in prompts]
        self.pieces = self._run()
        if not engine._busy.locked():  # or `last` would tell of a request that will be refused
            engine._request = self

    def _prepare(self, options: dict, longest: int):
        """Processors and criteria exactly as `model.generate` makes them."""
        model = self.engine.model
        options.setdefault("eos_token_id", end_ids(model, self.engine.tokenizer) or None)
        padding = options.get("pad_token_id", model.generation_config.pad_token_id)
        if padding is None:
            padding = min(as_ids(options["eos_token_id"]), default=0)
        options["pad_token_id"] = padding
        options.setdefault("do_sample", False)
        device = self.engine._runner.device
        rows = [[padding] * (longest - len(prompt)) + prompt for prompt in self.prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in self.prompts]
        ids = torch.tensor(rows, device=device)
        prepared = {}

        def capture(model, input_ids, logits_processor, stopping_criteria, generation_config, **unused):
            prepared["arguments"] = (input_ids, logits_processor, stopping_criteria, generation_config)
            return input_ids

        model.generate(ids, attention_mask=torch.tensor(mask, device=device), custom_generate=capture, **options)
        return prepared["arguments"]

    def _run(self) -> Iterator[list[str]]:
        engine, config = self.engine, self.arguments[3]
        ends = set(as_ids(config.eos_token_id))
        with engine.claim():
            engine._request = self
            open_rows = set(range(len(self.prompts)))
            # Stop strings are ours: they are looked for in the text, which shows what must not be shown.
            passes = engine._passes(self.prompts, *self.arguments, self.generator, reports=self.answers)
            for emitted in passes:
                pieces = [""] * len(emitted)
                for row in sorted(open_rows):
                    answer, stream = self.answers[row], self.streams[row]
                    for token in emitted[row]:
                        answer.token_ids.append(token)
                        pieces[row] += "" if stream is None else stream.put([token])
                        if token in ends or (stream is not None and stream.stopped is not None):
                            answer.finish_reason = "stop"
                            break
                    if answer.finish_reason == "stop":
                        open_rows.discard(row)
                    answer.text += pieces[row]
                yield pieces
                if not open_rows:
                    break
            passes.close()
            pieces = ["" if stream is None else stream.end() for stream in self.streams]
            for answer, stream, piece in zip(self.answers, self.streams, pieces):
                answer.text += piece
                if stream is not None and stream.stopped is not None:
                    answer.finish_reason = "stop"
            yield pieces


def _is_messages(prompt) -> bool:
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], dict)


def _is_batch(prompt) -> bool:
    if (
        not isinstance(prompt, Sequence)
        or isinstance(prompt, (str, bytes, bytearray))
        or torch.is_tensor(prompt)
        or _is_messages(prompt)
    ):
        return False
    return len(prompt) > 0 and (isinstance(prompt[0], Sequence) or (torch.is_tensor(prompt[0]) and prompt[0].ndim > 0))


def _token_ids(prompt) -> list[int]:
    if torch.is_tensor(prompt):
        if prompt.ndim > 1 and prompt.numel() != prompt.shape[-1]:
            raise ValueError(
                f"one prompt was expected, got ids of shape {list(prompt.shape)}; give a list of prompts."
            )
        prompt = prompt.flatten().tolist()
    ids = list(prompt)
    if any(isinstance(token, (str, Sequence)) for token in ids):
        raise ValueError("one prompt was expected, got several; streams and rows take one prompt each.")
    try:
        return [operator.index(token) for token in ids]
    except TypeError as error:
        raise ValueError(f"token ids are whole numbers, got {ids[:5]}.") from error


def _valid(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the prompt is not valid Unicode (a lone surrogate at character {error.start}); decode its bytes with "
            "errors='replace'."
        ) from error
    return text


def _padding(config: GenerationConfig | None) -> int:
    padding = getattr(config, "pad_token_id", None)
    return min(as_ids(getattr(config, "eos_token_id", None)), default=0) if padding is None else padding


def _unpadded(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[list[int]]:
    if attention_mask is None:
        return input_ids.tolist()
    mask = attention_mask.bool()
    if bool((mask[:, 1:] < mask[:, :-1]).any()) or not bool(mask[:, -1:].all()):
        raise ValueError("rows of different length are padded on the left (padding_side='left'); this mask is not.")
    return [row[own].tolist() for row, own in zip(input_ids, mask)]
