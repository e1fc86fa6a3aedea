"""
One model and its memory of fixed size: prefill in chunks, and steps of a few tokens that can be compiled and captured.

A step's program depends on how many tokens it has and on which form of attention it takes; how long the text is comes
in tensors. Where steps are captured, there is a graph for each power of two of slots that may be read.

Shape letters: `B` rows, `S` tokens of a prompt, `T` tokens of a step, `N` slots that a step may read, `V` vocabulary.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import types
from collections.abc import Callable, Sequence

import torch
from packaging import version
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.utils import logging

from ..generation.draft_tree import DraftTree
from ..generation.drafts import Draft
from ..infllm_v2 import ATTN_IMPLEMENTATION
from ..infllm_v2.slots import SLOT_ATTENTION, SlotCache, SlotStep, gather_pays, slot_multiple


logger = logging.get_logger(__name__)

# Slots of the smallest graph that is captured.
SMALLEST_GRAPH = 1024


def compiler_missing(device: torch.device) -> str | None:
    """Why steps cannot be compiled on `device`; `None` where they can."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    if not any(shutil.which(name.split()[0]) for name in names):
        return f"no C++ compiler was found ({', '.join(names)})"
    if device.type == "cuda":
        try:
            import triton  # noqa: F401
        except ImportError:
            return "Triton is not installed"
    elif device.type != "cpu":
        return f"compiling for {device.type} is not tested"
    return None


def check_model(model: PreTrainedModel) -> None:
    """
    Raises:
        ValueError: the model's attention needs more than one key and one value a token and head.
    """
    config = model.config.get_text_config()
    layers = DynamicCache(config=config).layers
    others = sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer})
    if others:
        raise ValueError(
            f"this {config.model_type!r} model has cache layers of type {', '.join(others)}; an engine keeps the keys "
            "and values of every token (full attention). Use model.generate."
        )
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "dynamic":
        raise ValueError(
            "rope_type='dynamic' changes its factors with the length of a call, which steps of fixed shape do not "
            "know. Use model.generate."
        )
    if config._attn_implementation == ATTN_IMPLEMENTATION and not hasattr(config, "infllm_v2"):
        raise ValueError(
            f"attn_implementation='infllm_v2' with a {config.model_type!r} model: only MiniCPM4 keeps compressed keys "
            "in its cache. Convert it (llama_to_minicpm4), or load it with attn_implementation='sdpa'."
        )
    if config._attn_implementation == ATTN_IMPLEMENTATION and config.infllm_v2.dense_switch == "call":
        raise ValueError(
            "dense_switch='call' lets what a token reads depend on the length of the call, which steps of fixed shape "
            "do not know; set it to 'position' in sparse_config."
        )


def _compiled_once(step):
    """
    The step as a program that does not look at the model again: before each call Dynamo would compare some hundred
    attributes of model, configuration and cache, which takes as long as a step of a tiny model. They stay what they
    are; the number of tokens, the slots and the form of attention are still looked at.
    """
    options = {}
    if version.parse(torch.__version__) >= version.parse("2.8"):
        options["options"] = {
            "guard_filter_fn": lambda guards: [
                not re.match(r"(L\['self'\]|self)($|\.|\[)", guard.name) for guard in guards
            ]
        }
    # Dynamo keeps programs by code object: with one of its own a runner is not given another model's, and none of its
    # shapes is one too many (Dynamo gives up after eight).
    own = types.FunctionType(step.__func__.__code__.replace(), step.__func__.__globals__, step.__func__.__name__)
    return torch.compile(types.MethodType(own, step.__self__), dynamic=False, **options)


class SlotRunner:
    """
    Args:
        model: a causal language model, in evaluation mode.
        slots: tokens a row, drafted ones included; rounded up to whole blocks.
        batch: rows.
        tree: drafted nodes of the largest tree, 0 without a draft.
        hidden_layers: indices into `hidden_states` that `prefill` and `keep` give (`Draft.hidden_layers`).
        compile: whether steps are compiled.
        capture: whether steps are captured as CUDA graphs.

    Raises:
        ValueError: a model that `check_model` refuses.
    """

    @torch.inference_mode(False)  # what is made here and below is written in any mode
    def __init__(
        self,
        model: PreTrainedModel,
        slots: int,
        batch: int = 1,
        tree: int = 0,
        hidden_layers: Sequence[int] = (),
        compile: bool = False,
        capture: bool = False,
    ):
        check_model(model)
        config = model.config.get_text_config()
        self.settings = config.infllm_v2 if config._attn_implementation == ATTN_IMPLEMENTATION else None
        self.multiple = slot_multiple(self.settings)
        slots = -(-slots // self.multiple) * self.multiple
        self.model, self.device = model, model.get_input_embeddings().weight.device
        try:
            self.cache = SlotCache(config, batch, slots, model.dtype, self.device, self.settings)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            raise ValueError(
                f"no memory for a cache of {batch} x {slots:,} tokens on {self.device}; take a shorter context, or "
                "fewer rows (minicpm4 plan says what fits)."
            ) from error
        self.slots, self.batch, self.tree, self.hidden_layers = slots, batch, tree, tuple(hidden_layers)
        self.lengths = [0] * batch
        self.compile, self.capture = compile, capture
        self._config = config
        self._first_sparse = None if self.settings is None else self.settings.first_sparse_position(0)
        self._programs: dict[tuple, Callable] = {}
        self._graphs: dict[tuple, tuple] = {}
        self._pool = None
        # What a step reads: the same tensors always, as a captured one wants it.
        self._past = torch.zeros(batch, dtype=torch.long, device=self.device)
        self._reach = torch.empty(slots, dtype=torch.bool, device=self.device)
        self._inputs: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    # ----------------------------------------------------------------------------------------------------- prefill

    @torch.no_grad()
    def prefill(
        self,
        token_ids: Sequence[int],
        chunk: int,
        begin: int = 0,
        row: int = 0,
        draft: Draft | None = None,
        on_chunk: Callable[[], None] | None = None,
    ) -> None:
        """
        Fill a row's slots from `begin` on with `token_ids[begin:]`, `chunk` tokens a call; those before are there.
        `draft` observes the new ones. `on_chunk` is called before each chunk.
        """
        self.lengths[row] = min(begin, len(token_ids))
        cache = self.cache.row(row, begin)
        options = {"output_hidden_states": True} if self.hidden_layers else {}
        for start in range(begin, len(token_ids), chunk):
            if on_chunk is not None:
                on_chunk()
            piece = token_ids[start : start + chunk]
            output = self.model(
                input_ids=torch.tensor([piece], device=self.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                **options,
            )
            self.lengths[row] = start + len(piece)
            if draft is not None:
                draft.observe(list(piece), [output.hidden_states[layer][0] for layer in self.hidden_layers])

    # ------------------------------------------------------------------------------------------------------- steps

    @torch.no_grad()
    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """
        One more token in each of the first rows: `tokens` (`[B]`) to logits `[B, V]`. With graphs the next step
        overwrites them.
        """
        rows = len(tokens)
        self._input(1, rows)[0].copy_(tokens[:, None])
        logits, _ = self._launch(1, rows)
        self.lengths[:rows] = [length + 1 for length in self.lengths[:rows]]
        return logits[:, 0]

    @torch.no_grad()
    def verify(self, root: int, tree: DraftTree) -> torch.Tensor:
        """The logits after the root and each node of a tree, `[T + 1, V]`; for one row. `keep` must follow."""
        tokens = len(tree) + 1
        if len(tree) > self.tree:
            raise ValueError(
                f"the draft gave a tree of {len(tree)} nodes, and this engine was made for {self.tree}; give it a"
                " larger tree_size, or draft fewer."
            )
        vocabulary = self._config.vocab_size
        if len(tree) and not 0 <= min(tree.tokens) <= max(tree.tokens) < vocabulary:
            raise ValueError(
                f"the draft gave tokens from {min(tree.tokens)} to {max(tree.tokens)}; the model's lie between 0 and "
                f"{vocabulary - 1}."
            )
        # Programs and graphs know one size of tree; eager steps take what comes.
        width = tokens if tokens == 1 or not (self.compile or self.capture) else self.tree + 1
        ids, depths, ancestors = self._input(width, 1)
        ids.copy_(torch.tensor([[root, *tree.tokens, *[0] * (width - tokens)]]))
        if width > 1:
            depths.copy_(torch.tensor([*tree.depths(), *[0] * (width - tokens)]))
            paths = [tree.path(node) for node in range(-1, len(tree))] + [[row] for row in range(tokens, width)]
            ancestors.copy_(torch.tensor([[*path, *[0] * (width - len(path))] for path in paths]))
        self._width = width
        logits, self._hidden = self._launch(width, 1)
        return logits[0, :tokens]

    @torch.no_grad()
    def keep(self, rows: list[int]) -> list[torch.Tensor]:
        """Keep what the accepted rows of the last `verify` left; returns their hidden states."""
        begin = self._past[:1]
        if self._width > 1:  # a step of one token compresses by itself
            if rows != list(range(len(rows))):
                self.cache.move(0, begin + torch.tensor(rows, device=self.device), begin)
            self.cache.compress(begin, len(rows))
        self.lengths[0] += len(rows)
        return [states[0, rows] for states in self._hidden]

    @torch.inference_mode(False)
    def _input(self, tokens: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if (tokens, rows) not in self._inputs:
            shapes = ((rows, tokens), (tokens,), (tokens, tokens))
            self._inputs[tokens, rows] = tuple(
                torch.zeros(shape, dtype=torch.long, device=self.device) for shape in shapes
            )
        return self._inputs[tokens, rows]

    def _launch(self, tokens: int, rows: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        lengths = self.lengths[:rows]
        needed = max(lengths) + tokens
        if needed > self.slots:
            raise ValueError(f"{needed} slots are needed for {tokens} more tokens, and there are {self.slots}.")
        self._past[:rows].copy_(torch.tensor(lengths))
        if self.capture:
            reach = max(SMALLEST_GRAPH, 1 << (needed - 1).bit_length())
        else:
            reach = needed
        reach = min(-(-reach // self.multiple) * self.multiple, self.slots)
        form = self._form(lengths, tokens, reach)
        arguments = (*self._input(tokens, rows), self._past[:rows], self._reach[:reach], form)
        with self._slot_attention():
            if self.capture:
                with torch.cuda.device(self.device):  # streams and graphs are those of the current device
                    return self._replay(arguments)
            return self._call(arguments)

    def _call(self, arguments):
        return self._compiled(arguments) if self.compile else self._step(*arguments)

    def _form(self, lengths: list[int], tokens: int, reach: int) -> str:
        """The form of attention that every row of the step can take (`SlotStep`)."""
        if self.settings is None:
            return "dense"
        if max(lengths) + tokens <= self._first_sparse:
            return "dense"
        if min(lengths) >= self._first_sparse and gather_pays(self.settings, tokens, reach):
            return "gathered"
        return "masked"

    def _step(self, ids, depths, ancestors, past, reach, form):
        step = SlotStep(self.cache, past, depths, ancestors, reach, form)
        options = {} if self.settings is None else {"infllm_v2_config": self.settings}
        if self.hidden_layers:
            options["output_hidden_states"] = True
        output = self.model(
            input_ids=ids,
            position_ids=step.positions,
            past_key_values=self.cache,
            use_cache=True,
            slot_step=step,
            **options,
        )
        return output.logits, tuple(output.hidden_states[layer] for layer in self.hidden_layers)

    def _compiled(self, arguments):
        torch._dynamo.maybe_mark_dynamic(arguments[4], 0)
        key = (*arguments[0].shape, arguments[5])
        if key not in self._programs:
            self._programs[key] = _compiled_once(self._step)
        try:
            return self._programs[key](*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            # A compiler that is there and does not work: the answer matters more than its speed.
            logger.warning_once(f"Steps could not be compiled and run eagerly: {str(error).strip().splitlines()[0]}")
            self.compile = False
            return self._step(*arguments)

    def _replay(self, arguments):
        ids, *_, reach, form = arguments
        key = (*ids.shape, len(reach), form)
        if key not in self._graphs:
            # Twice outside: libraries set up their workspaces, and programs are compiled. Steps repeat harmlessly.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._call(arguments)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # One pool for all graphs: the results of a step are read before the next one.
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            with torch.cuda.graph(graph, pool=self._pool):
                output = self._call(arguments)
            self._graphs[key] = (graph, output)
        graph, output = self._graphs[key]
        graph.replay()
        return output

    @contextlib.contextmanager
    def _slot_attention(self):
        # Not by the property: a step of a tiny model takes a millisecond, and setting it a tenth of that.
        fields = vars(self._config)
        before = fields["_attn_implementation_internal"]
        fields["_attn_implementation_internal"] = SLOT_ATTENTION
        try:
            yield
        finally:
            fields["_attn_implementation_internal"] = before
