"""
Speculative decoding with trees: a draft guesses, the target checks all guesses in one pass, and what comes out is
what the target alone would have said.

    model.generate(**inputs, custom_generate=speculative_decode, draft=PromptLookupDraft(), max_new_tokens=200)

At each node the target chooses its own next token, by argmax or by drawing from its processed distribution; where the
choice is a drafted child, the walk goes on there, otherwise the choice is the first token that was not guessed. Every
token is thus drawn from the target given the text before it, whatever the draft says, and no acceptance probabilities
are needed. Shape letters: T drafted nodes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import Cache, DynamicLayer
from transformers.generation import GenerateDecoderOnlyOutput

from ..infllm_v2 import ATTN_IMPLEMENTATION
from ..infllm_v2.cache import InfLLMv2CacheLayer
from .draft_tree import NO_TREE, ROOT, DraftTree
from .drafts import Draft


@torch.no_grad()
def speculative_decode(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    generation_config: GenerationConfig | None = None,
    draft: Draft | None = None,
    text_streamer=None,
    generator: torch.Generator | None = None,
    **model_kwargs,
) -> torch.Tensor | GenerateDecoderOnlyOutput:
    """
    Decode one sequence. To be given to `model.generate` as `custom_generate`, which prepares all arguments but
    `draft`, `text_streamer` (a Transformers streamer; `generate` keeps the name `streamer` to itself), `generator`.

    Returns:
        Token ids `[1, prompt + new]`, or `GenerateDecoderOnlyOutput` with `return_dict_in_generate`.

    Raises:
        ValueError: no draft, more than one sequence, padding, or a cache that cannot be cropped.
    """
    if draft is None:
        raise ValueError("speculative_decode needs a draft, e.g. draft=PromptLookupDraft().")
    if input_ids.shape[0] != 1:
        raise ValueError(
            f"speculative decoding takes one sequence, got {input_ids.shape[0]}; call generate once for each."
        )
    mask = model_kwargs.get("attention_mask")
    if mask is not None and not bool(mask.bool().all()):
        raise ValueError("speculative decoding takes one sequence without padding; the attention_mask has zeros.")
    target = _Target(model, model_kwargs["past_key_values"], draft.hidden_layers)
    draft.begin(model)
    target.prefill(input_ids[0].tolist(), getattr(generation_config, "prefill_chunk_size", None), draft)
    ids = input_ids
    if text_streamer is not None:
        text_streamer.put(input_ids.cpu())  # as generate does: a streamer may skip it
    for emitted in decode_passes(
        target, draft, input_ids, logits_processor, stopping_criteria, generation_config, generator
    ):
        new = torch.tensor([emitted], device=ids.device, dtype=ids.dtype)
        ids = torch.cat([ids, new], dim=-1)
        if text_streamer is not None:
            for token in new[0].cpu():
                text_streamer.put(token[None])
    if text_streamer is not None:
        text_streamer.end()
    if generation_config is not None and generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=ids, past_key_values=target.cache)
    return ids


def decode_passes(
    target,
    draft: Draft | None,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    generation_config: GenerationConfig | None = None,
    generator: torch.Generator | None = None,
    limit: int | None = None,
) -> Iterator[list[int]]:
    """
    The tokens that each pass of the target makes certain, until the criteria or `max_length` end it.

    Args:
        target: holds the text but for its last token. `verify(root, tree)` gives the logits after the root and each
            node, `[T + 1, V]`; `keep(rows)` keeps what the accepted rows left in the cache and gives their hidden
            states.
        draft: `None` for one token a pass.
        input_ids: `[1, S]`.
        limit: most tokens of text; by default `generation_config.max_length`.
    """
    processors = logits_processor if logits_processor is not None else LogitsProcessorList()
    criteria = stopping_criteria if stopping_criteria is not None else StoppingCriteriaList()
    limit = getattr(generation_config, "max_length", None) if limit is None else limit
    sampled = generation_config is not None and generation_config.do_sample
    token_ids, ids, finished = input_ids[0].tolist(), input_ids, False
    while not finished:
        # The token after the deepest node comes for nothing, so the tree stays one level below what is left.
        room = None if limit is None else limit - len(token_ids) - 1
        drafting = draft is not None and (room is None or room >= 1)
        tree = draft.propose(token_ids, room or 1 << 30) if drafting else NO_TREE
        logits = target.verify(token_ids[-1], tree)
        node, rows, emitted = ROOT, [0], []
        while not finished:
            scores = logits[rows[-1]][None]
            if sampled or len(processors):
                scores = processors(ids, scores.to(torch.float32))
            if sampled:
                token = torch.multinomial(scores.softmax(-1), 1, generator=generator)
            else:
                token = scores.argmax(-1, keepdim=True)
            ids = torch.cat([ids, token.to(ids.device)], dim=-1)
            emitted.append(int(token))
            finished = bool(criteria(ids, scores).all()) if len(criteria) else False
            finished = finished or (limit is not None and ids.shape[1] >= limit)
            child = tree.children(node).get(emitted[-1])
            if child is None or finished:
                break
            node = child
            rows.append(child + 1)
        hidden = target.keep(rows)
        if draft is not None:
            draft.observe([token_ids[-1], *emitted[: len(rows) - 1]], hidden)
            draft.passes += 1
            draft.proposed += len(tree)
            draft.accepted += len(emitted) - 1
        token_ids += emitted
        yield emitted


class _Target:
    """The target and its cache, which after every step covers the text but for its last token."""

    def __init__(self, model: PreTrainedModel, cache: Cache, hidden_layers: tuple[int, ...]):
        kinds = {type(layer) for layer in cache.layers} or {cache.layer_class_to_replicate}
        if not all(isinstance(kind, type) and issubclass(kind, DynamicLayer) for kind in kinds) or any(
            kind.is_sliding for kind in kinds
        ):
            raise ValueError(
                f"speculative decoding takes back rejected tokens, which {type(cache).__name__} with layers of type "
                f"{', '.join(sorted(str(getattr(kind, '__name__', kind)) for kind in kinds))} cannot; use a "
                "DynamicCache and full attention."
            )
        self.model, self.cache, self.hidden_layers = model, cache, hidden_layers
        self.sparse = model.config._attn_implementation == ATTN_IMPLEMENTATION

    def prefill(self, token_ids: list[int], chunk: int | None, draft: Draft) -> None:
        begin, end = self.cache.get_seq_length(), len(token_ids) - 1
        if draft.hidden_layers and begin:
            raise ValueError(
                f"the cache holds {begin} tokens that this draft has not seen the hidden states of; start from an "
                "empty cache."
            )
        for start in range(begin, end, chunk or max(end - begin, 1)):
            piece = token_ids[start : min(start + (chunk or end), end)]
            output = self._forward(torch.tensor([piece], device=self.model.device), logits_to_keep=1)
            draft.observe(piece, self._hidden(output, range(len(piece))))

    def verify(self, root: int, tree: DraftTree) -> torch.Tensor:
        """The target's logits after each row, `[T + 1, V]`."""
        past = self.cache.get_seq_length()
        device = self.model.device
        ids = torch.tensor([[root, *tree.tokens]], device=device)
        options = {}
        if len(tree):
            options["position_ids"] = torch.tensor([tree.depths()], device=device) + past
            if self.sparse:
                options["draft_paths"] = tree.paths()
            else:
                options["attention_mask"] = tree.mask(past, self.model.dtype, device)
        self._past, self._drafted = past, len(tree) > 0
        self._output = self._forward(ids, **options)
        return self._output.logits[0]

    def keep(self, rows: list[int]) -> list[torch.Tensor]:
        """Keep the cache of the accepted rows; returns their hidden states."""
        for layer in self.cache.layers:
            if self._drafted and isinstance(layer, InfLLMv2CacheLayer) and layer.drafted is not None:
                layer.keep_drafted(rows)
            elif self._drafted:
                chosen = torch.tensor(rows, device=layer.keys.device) + self._past
                for tensor in (layer.keys, layer.values):
                    tensor[:, :, self._past : self._past + len(rows)] = tensor.index_select(2, chosen)
                layer.crop(self._past + len(rows) - layer.get_seq_length())
        return self._hidden(self._output, rows)

    def _forward(self, ids: torch.Tensor, **options):
        if self.hidden_layers:
            options["output_hidden_states"] = True
        return self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, **options)

    def _hidden(self, output, rows) -> list[torch.Tensor]:
        return [output.hidden_states[layer][0, list(rows)] for layer in self.hidden_layers]
