"""
`PGPTQQuantizer`: a causal LM to INT4, one block after the other, each fed by the quantized blocks before it.

Shape letters: `B` sequences, `S` positions, `O` outputs, `I` inputs.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from optimum.quantization_base import OptimumQuantizer
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from ...model.prefix_cache import PrefixCache, refuse_recurrent
from ..adapters import refuse_adapters
from ..export.checkpoint_files import own_tokenizer
from ..export.gptq import save_gptq
from ..packing import pack_unit
from ..quantized_weight import QuantizedWeight
from .blocks import Blocks, feeds, linear_groups, open_checkpoint, run, run_until, slow_in_bfloat16
from .calibration import CalibrationError, batches, calibration_rows, digest
from .configuration import PGPTQConfig
from .hessian import Hessian, position_weights
from .hidden_states import PrefixStream, Spread
from .report import write_report
from .smoothing import search_factors
from .solver import CannotFactor, output_error, round_to_nearest, solve
from .store import STATE, Store


logger = logging.get_logger(__name__)

# What may take a smoothing factor: the layer before, in blocks with Llama's names.
BEFORE = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.o_proj": "self_attn.v_proj",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.down_proj": "mlp.up_proj",
}


class PGPTQQuantizer(OptimumQuantizer):
    """
    Quantizes the linear layers of any causal LM that is built like Llama (SmolLM, Qwen, MiniCPM4, ...).

        quantizer = PGPTQQuantizer(bits=4, group_size=128, dataset=texts)
        quantizer.quantize_model(model, tokenizer)
        quantizer.save(model, "model-int4")

    or, block by block from a checkpoint's files, with less memory than the model has:

        PGPTQQuantizer.from_pretrained("model", dataset=texts).quantize("model-int4")

    Args:
        config: a `PGPTQConfig`, or its fields by name.
    """

    def __init__(self, config: PGPTQConfig | None = None, **options: Any):
        self.config = PGPTQConfig(**options) if config is None else config.changed(**options)
        self.blocks: Blocks | None = None
        self.source: str | None = None
        self.weights: Store | None = None
        self.prefix: PrefixCache | None = None
        self.report: list[dict[str, Any]] = []
        self.left: list[str] = []  # matrices within the blocks that are not quantized
        self.num_rows = 0
        self.tokenizer: Any = None

    @classmethod
    def from_pretrained(
        cls,
        model_or_path: PreTrainedModel | str | Path,
        file_name: str | None = None,
        config: PGPTQConfig | None = None,
        device: torch.device | str = "cpu",
        compute_dtype: torch.dtype | str | None = None,
        **options: Any,
    ) -> PGPTQQuantizer:
        """
        A quantizer for `quantize`. A path or Hub id is read block by block while it is quantized.

        Args:
            file_name: Optimum's argument for ONNX files; there is none here, and anything but `None` is refused.
            compute_dtype: what the blocks of a path compute in while they are quantized, a dtype that holds the
                checkpoint's values. What is not quantized is saved in the checkpoint's dtype all the same. `None`:
                that dtype too, but float32 in the place of bfloat16 on a CPU that is slow in it. A model in memory
                computes in its own dtype.
        """
        if isinstance(compute_dtype, str):
            found = getattr(torch, compute_dtype, None)
            if not isinstance(found, torch.dtype):
                raise ValueError(f"compute_dtype={compute_dtype!r} was given; it is a dtype such as torch.float32")
            compute_dtype = found
        if file_name is not None:
            raise ValueError(f"file_name={file_name!r} was given; a checkpoint is named by its folder or Hub id alone")
        quantizer = cls(config, **options)
        refuse_adapters(model_or_path)
        if isinstance(model_or_path, PreTrainedModel):
            if compute_dtype not in (None, model_or_path.dtype):
                raise ValueError(
                    f"compute_dtype={compute_dtype} was given with a model in {model_or_path.dtype}; a model in "
                    "memory computes in its own dtype: load it in the one you want, or give its path"
                )
            refuse_quantized(model_or_path)
            quantizer.blocks = Blocks(model_or_path)
            return quantizer
        quantizer.source = str(model_or_path)
        quantizer.blocks = open_checkpoint(model_or_path, device, compute_dtype)
        refuse_quantized(quantizer.blocks.model)
        return quantizer

    def quantize(
        self, save_dir: str | Path, file_prefix: str | None = None, resume: bool = True, **save_options: Any
    ) -> Path:
        """
        Quantize what `from_pretrained` was given and write the checkpoint `save_dir`.

        Solved blocks are kept in `save_dir` + ".unfinished" until the checkpoint is written: the same call after a
        kill goes on where it was.

        Args:
            file_prefix: Optimum's argument for ONNX files, refused.
            resume: `False` throws away what an earlier run left.
            save_options: `tokenizer`, `max_shard_size`, `checkpoint_format` of `save_gptq`.
        """
        if file_prefix is not None:
            raise ValueError(f"file_prefix={file_prefix!r} was given; readers look for model.safetensors alone")
        if self.blocks is None:
            raise ValueError("there is no model to quantize; make the quantizer with from_pretrained")
        target = Path(save_dir)
        refuse_filled(target)
        if self.blocks.files is None:
            refuse_quantized(self.blocks.model)
        work = target.with_name(target.name + ".unfinished")
        if not resume and (work / STATE).is_file():
            shutil.rmtree(work)
        tokenizer = save_options.pop("tokenizer", None) or self._tokenizer()
        self._run(self.blocks, tokenizer, work)
        self.save(self.blocks.model, target, tokenizer=tokenizer, **save_options)
        shutil.rmtree(work)
        return target

    def quantize_model(
        self, model: PreTrainedModel, tokenizer: Any = None, dataset: Any = None, work_dir: str | Path | None = None
    ) -> PreTrainedModel:
        """
        Quantize a model in memory. Its linear layers then hold the weights that the checkpoint will have, dequantized,
        in the model's dtype; `save` writes them in 4 bits.

        Args:
            tokenizer: overrides the config's.
            dataset: overrides the config's.
            work_dir: where solved blocks are kept so that a killed run can go on; `None` keeps them in memory.
        """
        if dataset is not None:
            self.config = replace(self.config, dataset=dataset)
        refuse_quantized(model)
        self.blocks = Blocks(model)
        self._run(self.blocks, tokenizer or self._tokenizer(), work_dir)
        return model

    def save(self, model: PreTrainedModel, save_dir: str | Path, tokenizer: Any = None, **options: Any) -> Path:
        """
        Write the checkpoint: stock `quant_method: gptq`, the prefix if there is one, the report with its picture, a
        card.

        Args:
            options: `max_shard_size`, `checkpoint_format` of `save_gptq`.
        """
        if not self.weights:
            raise ValueError("nothing was quantized yet; call quantize_model first")
        config = self.config
        self.check_unchanged(model)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        state = {
            name: self.blocks.as_stored(tensor) if name in parameters else tensor
            for name, tensor in model.state_dict().items()
        }
        if self.blocks.files is not None:  # in memory the model has them, changed since perhaps
            for index in self.weights.finished():
                state.update(self.weights.rest(index))
        save_gptq(
            save_dir,
            model,
            self.weights,
            tokenizer=tokenizer or self.tokenizer,
            meta=self.meta(),
            state_dict=state,
            damp_percent=config.damp_percent,
            extras=lambda folder: self.write_extras(folder, model),
            **{"checkpoint_format": config.checkpoint_format, **options},
        )
        return Path(save_dir)

    def write_extras(self, folder: Path, model: PreTrainedModel) -> None:
        """What a checkpoint has beside its weights: the prefix, the report with its picture, the card."""
        if self.prefix is not None:
            self.prefix.save(folder)
        write_report(folder, self.report, self.config, self._name(model), self.num_rows, self.left)

    def check_unchanged(self, model: PreTrainedModel) -> None:
        """Raise ValueError where the model's layers are not what was quantized: the file would not have the change."""
        for name in self.weights:
            module = model.get_submodule(name)
            if module.weight.is_meta:  # of a path: put away
                continue
            stored = self.weights[name]
            # A cast since then is no change.
            pairs = [(module.weight, stored.dequantize().to(self.solved_dtype)), (module.bias, stored.bias)]
            if any(
                (now is None) != (then is None) or (now is not None and not torch.equal(now, then.to(now)))
                for now, then in pairs
            ):
                raise ValueError(
                    f"{name} was changed after it was quantized, or is another model's; quantize this model, or keep "
                    "the change in an adapter"
                )

    def meta(self) -> dict[str, Any]:
        """Our facts for the checkpoint's `meta`, which readers of the format ignore."""
        config = self.config
        return {
            "method": config.method,
            "skip_first": config.skip_first,
            "prefix_weight": config.prefix_weight,
            "prefix_ids": config.prefix_ids,
            "smoothing": config.smoothing,
            "scale_search": config.scale_search,
            "act_group_aware": config.act_group_aware,
            "column_order": "static_groups" if config.desc_act else "none",
            "num_samples": self.num_rows,
            "max_length": config.max_length,
        }

    # -------------------------------------------------------------------------------------------------------- the work

    @torch.no_grad()
    def _run(self, blocks: Blocks, tokenizer: Any, work_dir: str | Path | None) -> None:
        was_training = blocks.model.training
        blocks.model.eval()
        try:
            self._quantize(blocks, tokenizer, work_dir)
        finally:
            blocks.model.train(was_training)

    def _quantize(self, blocks: Blocks, tokenizer: Any, work_dir: str | Path | None) -> None:
        config, self.tokenizer = self.config, tokenizer
        if config.dataset is None:
            raise CalibrationError(
                "there is no calibration data; give dataset= (texts, token rows, a datasets.Dataset)"
            )
        if config.prefix_ids:
            refuse_recurrent(blocks.model.config)
        if config.skip_first and config.prefix_weight < 1 and not config.prefix_ids:
            logger.warning_once(
                f"the first {config.skip_first} positions count {config.prefix_weight:g} and no prefix is stored: the "
                "quantized model computes them itself, and may do so badly. Give prefix_ids, or prefix_weight=1."
            )
        rows = calibration_rows(
            config.dataset,
            tokenizer,
            num_samples=config.num_samples,
            max_length=config.max_length,
            seed=config.seed,
            text_column=config.text_column,
            prefix_ids=config.prefix_ids,
        )
        vocab = blocks.model.get_input_embeddings().num_embeddings
        rows = self._with_prefix(rows)
        self.num_rows = len(rows)
        for token in (max(int(row.max()) for row in rows), min(int(row.min()) for row in rows)):
            if not 0 <= token < vocab:
                raise CalibrationError(
                    f"calibration rows have token {token} and the model knows {vocab}; wrong tokenizer?"
                )
        parts = batches(rows, config.batch_size)
        counted = [position_weights(part["attention_mask"], config.skip_first, config.prefix_weight) for part in parts]
        if not any(bool(weights.any()) for weights in counted):
            raise CalibrationError(
                f"no calibration position counts: all rows are at most skip_first={config.skip_first} tokens long; "
                "give longer rows, a smaller skip_first, or prefix_weight above 0"
            )
        self._check_widths(blocks)
        dtype = blocks.model.get_input_embeddings().weight.dtype
        self.solved_dtype = dtype
        if dtype == torch.bfloat16 and slow_in_bfloat16(blocks.device):
            logger.warning_once(
                "blocks compute in bfloat16, in which this CPU is slow; float32 is several times faster: "
                + ("compute_dtype=torch.float32" if blocks.files else "load the model with dtype=torch.float32")
            )
        identity = {
            "version": version("transformers_minicpm4"),
            "config": _digest(config.to_dict()),
            "model": _digest({**blocks.model.config.to_dict(), "_name_or_path": None}),
            "weights": _weights_digest(blocks),
            "calibration rows": digest(rows),
            "compute dtype": str(dtype),
        }
        self.weights = Store(work_dir, identity)
        done = len(self.weights.finished())
        if done:
            logger.warning_once(f"going on after {done} of {len(blocks)} blocks found in {work_dir}")

        hidden: list[torch.Tensor] = []
        kwargs: list[list[dict[str, Any]]] = []
        spread = Spread(work_dir)
        for part in parts:
            first, further = blocks.first_inputs(part)
            hidden.append(spread.keep(first))
            kwargs.append(further)
        prefix = PrefixStream(blocks, config.prefix_ids) if config.prefix_ids else None
        if blocks.files is None:
            # From here on the model changes; a second call, or one after an interruption, must not take it for the
            # original.
            blocks.model._p_gptq = True
        for index in logging.tqdm(range(len(blocks)), desc="quantizing blocks", unit="block"):
            with blocks.loaded(index) as block:
                if prefix is not None:
                    prefix.into(hidden)
                    prefix.step(block, index)
                arguments = [further[index] for further in kwargs]
                if index < done:
                    self._put_back(block, blocks.names[index], index)
                else:
                    self._solve_block(block, blocks.names[index], index, hidden, arguments, counted)
                for part, further in zip(hidden, arguments, strict=True):
                    part.copy_(run(block, part, further))
        self.left = self._left()
        if self.left and config.modules_in_block_to_quantize is None:
            logger.warning_once(
                f"{len(self.left)} matrices within the blocks, such as {self.left[0]}, are no nn.Linear and stay as "
                "they are"
            )
        self.prefix = None if prefix is None else prefix.cache(config.prefix_ids, blocks.stored_dtype)
        self.report = self.weights.report()

    def _solve_block(self, block, name, index, hidden, kwargs, counted) -> None:
        config = self.config
        readers = linear_groups(block, hidden[0], kwargs[0])
        groups = config.modules_in_block_to_quantize or readers
        for group in groups:
            if not any(set(group) <= set(together) for together in readers):
                raise ValueError(
                    f"{', '.join(group)} of {name} do not read the same input; put them into lists of their own"
                )
        solved: dict[str, QuantizedWeight] = {}
        report = []
        for group in groups:
            began = time.process_time()
            modules = [self._module(block, name, member) for member in group]
            hessian = Hessian(modules[0].in_features, modules[0].weight.device)
            for part, further, weights in zip(hidden, kwargs, counted, strict=True):
                hessian.add(run_until(block, modules[0], part, further), weights)
            matrix = hessian.finish()
            sizes = [module.out_features for module in modules]
            parts = [slice(sum(sizes[:at]), sum(sizes[: at + 1])) for at in range(len(sizes))]
            stacked = torch.cat([module.weight for module in modules]).float()
            if not bool(torch.isfinite(stacked).all()):
                raise CannotFactor(f"{name}.{group[0]} (or a layer beside it) has weights that are not finite")
            rounded = round_to_nearest(stacked, bits=config.bits, group_size=config.group_size, symmetric=config.sym)
            rounding_errors = [
                output_error(one, _rows(rounded, part), matrix)
                for one, part in zip(stacked.split(sizes), parts, strict=True)
            ]
            alpha = None
            # A layer before may be changed only where everything that reads its output is at hand.
            if config.smoothing and any(set(group) == set(together) for together in readers):
                stacked, matrix, alpha = self._smooth(
                    block, group, modules, stacked, matrix, hessian, solved, hidden[0], kwargs[0]
                )
            try:
                quantized, damp = solve(
                    stacked,
                    matrix,
                    bits=config.bits,
                    group_size=config.group_size,
                    symmetric=config.sym,
                    desc_act=config.desc_act,
                    act_group_aware=config.act_group_aware,
                    scale_search=config.scale_search,
                    damp_percent=config.damp_percent,
                )
            except CannotFactor as error:
                raise CannotFactor(f"{name}.{group[0]}: {error}") from error
            for member, module, part, rounding_error in zip(group, modules, parts, rounding_errors, strict=True):
                mine = _rows(quantized, part)
                mine.bias = module.bias
                solved[member] = mine
                module.weight.copy_(mine.dequantize())
                report.append(
                    {
                        "layer": f"{name}.{member}",
                        "block": index,
                        "error": output_error(stacked[part], mine, matrix),
                        "rounding_error": rounding_error,
                        "damp_percent": damp,
                        "rows": hessian.rows,
                        "alpha": alpha,
                        "seconds": round((time.process_time() - began) / len(group), 3),
                    }
                )
        weights = {}
        for member, weight in solved.items():
            if weight.bias is not None:
                weight.bias = self.blocks.as_stored(weight.bias)
            weights[f"{name}.{member}"] = weight
        rest = {
            f"{name}.{key}": self.blocks.as_stored(parameter.detach())
            for key, parameter in block.named_parameters()
            if key.rpartition(".")[0] not in solved
        }
        self.weights.put(index, weights, rest, report)

    def _smooth(self, block, group, modules, stacked, matrix, hessian, solved, hidden, kwargs):
        """Fold AWQ's factors into the layer before; returns weight and Hessian as they are after it, and alpha."""
        config = self.config
        before = BEFORE.get(group[0])
        if before == "self_attn.v_proj" and config.prefix_ids:
            return stacked, matrix, None  # the stored values are those of the unscaled layer
        try:
            previous = block.get_submodule(before) if before else None
        except AttributeError:
            previous = None
        foldable = isinstance(previous, nn.Linear) or type(previous).__name__.endswith("RMSNorm")
        if not foldable or previous.weight.shape[0] != stacked.shape[1]:
            return stacked, matrix, None
        # A norm behind a layer (OLMo 2, Gemma 2) has a name of Llama's, and what it gives goes elsewhere too.
        if not isinstance(previous, nn.Linear) and not feeds(block, previous, modules[0], hidden, kwargs):
            return stacked, matrix, None
        factors, alpha = search_factors(
            stacked,
            matrix,
            hessian.magnitude / max(hessian.rows, 1e-9),
            bits=config.bits,
            group_size=config.group_size,
            symmetric=config.sym,
        )
        if alpha == 0:
            return stacked, matrix, 0.0
        kept = [parameter.clone() for parameter in previous.parameters()]
        scales, seen = None, run_until(block, modules[0], hidden, kwargs).float()
        if isinstance(previous, nn.Linear):
            if before not in solved:
                return stacked, matrix, None
            # Quantized already: its outputs shrink by their scales, its codes stay.
            weight = solved[before]
            scales = weight.scales
            weight.scales = (weight.scales.float() / factors[:, None]).to(weight.scales.dtype)
            previous.weight.copy_(weight.dequantize())
            if previous.bias is not None:
                previous.bias.copy_(self.blocks.as_stored(previous.bias / factors))
        else:
            old = previous.weight.to(torch.float32, copy=True)
            previous.weight.copy_(self.blocks.as_stored(old / factors))
            # What the norm's dtype, once stored, can hold of the factors is what the weight must undo.
            held = previous.weight.float()
            factors = torch.where(held != 0, old / held, torch.ones_like(factors))
        # Norms that add 1 to their weight, or stand elsewhere than Llama's, are found out here and left alone.
        wanted = seen / factors
        if float((run_until(block, modules[0], hidden, kwargs).float() - wanted).norm()) > 0.02 * float(wanted.norm()):
            for parameter, value in zip(previous.parameters(), kept, strict=True):
                parameter.copy_(value)
            if scales is not None:
                weight.scales = scales
            return stacked, matrix, None
        stacked = stacked * factors
        for module, part in zip(modules, stacked.split([module.out_features for module in modules]), strict=True):
            module.weight.copy_(part)
        return stacked, matrix / (factors[:, None] * factors), alpha

    def _put_back(self, block: nn.Module, name: str, index: int) -> None:
        """A block that an earlier run solved."""
        for full, weight in self.weights.block(index).items():
            module = block.get_submodule(full[len(name) + 1 :])
            module.weight.copy_(weight.dequantize())
            if weight.bias is not None:  # smoothing may have divided it
                module.bias.copy_(weight.bias)
        for full, tensor in self.weights.rest(index).items():
            block.get_parameter(full[len(name) + 1 :]).copy_(tensor)

    # ------------------------------------------------------------------------------------------------- at the door

    def _with_prefix(self, rows: list[torch.Tensor]) -> list[torch.Tensor]:
        prefix = self.config.prefix_ids
        if not prefix:
            return rows
        head = torch.tensor(prefix)
        return [row if torch.equal(row[: len(head)], head) else torch.cat([head, row]) for row in rows]

    def _check_widths(self, blocks: Blocks) -> None:
        config, unit = self.config, pack_unit(self.config.bits)
        wanted = config.modules_in_block_to_quantize
        for block, layer in zip(blocks.names, blocks.layers, strict=True):
            linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
            if wanted is not None:
                unknown = [name for group in wanted for name in group if name not in linears]
                if unknown:
                    raise ValueError(f"{block} has no linear layer {unknown[0]!r}; it has {', '.join(linears)}")
                linears = {name: linears[name] for group in wanted for name in group}
            if not linears:
                raise ValueError(f"{block} has no nn.Linear; is this model quantized already?")
            for name, module in linears.items():
                size = module.in_features if config.group_size == -1 else config.group_size
                if module.in_features % size:
                    raise ValueError(
                        f"{block}.{name} has {module.in_features} inputs, which group_size={size} does not divide; "
                        "use one that does, or -1"
                    )
                if module.in_features % unit or module.out_features % unit:
                    raise ValueError(
                        f"{block}.{name} has {module.in_features} inputs and {module.out_features} outputs; "
                        f"{config.bits}-bit files need multiples of {unit}. Leave it out with "
                        "modules_in_block_to_quantize"
                    )

    def _module(self, block: nn.Module, name: str, member: str) -> nn.Linear:
        try:
            module = block.get_submodule(member)
        except AttributeError:
            module = None
        if not isinstance(module, nn.Linear):
            raise ValueError(f"{name} has no linear layer {member!r}; leave it out of modules_in_block_to_quantize")
        return module

    def _tokenizer(self) -> Any:
        given = self.config.tokenizer
        if given is not None:
            return AutoTokenizer.from_pretrained(given) if isinstance(given, str | Path) else given
        # Where a checkpoint has none, texts for calibration say what is missing.
        return None if self.source is None else own_tokenizer(self.source)

    def _left(self) -> list[str]:
        quantized = set(self.weights)
        return [
            f"{name}.{key}"
            for name, layer in zip(self.blocks.names, self.blocks.layers, strict=True)
            for key, parameter in layer.named_parameters()
            if parameter.dim() > 1 and f"{name}.{key}".removesuffix(".weight") not in quantized
        ]

    def _name(self, model: PreTrainedModel) -> str:
        return self.source or getattr(model.config, "_name_or_path", "") or type(model).__name__


def refuse_quantized(model: PreTrainedModel) -> None:
    """Raise ValueError for a model that is quantized already, by us or others."""
    if getattr(model, "_p_gptq", False):
        raise ValueError(
            "this model was quantized by P-GPTQ, perhaps in part by a run that was stopped; load the original again"
        )
    found = getattr(model.config, "quantization_config", None)
    if found is None and not getattr(model, "is_quantized", False):
        return
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    raise ValueError(
        f"this model is quantized already (quant_method {getattr(method, 'value', method)!r}); quantize the "
        "checkpoint that it was made from"
    )


def refuse_filled(folder: Path) -> None:
    """Raise ValueError where a checkpoint would be written over something."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already and not empty; name a new folder, or remove it first")


def _rows(weight: QuantizedWeight, part: slice) -> QuantizedWeight:
    return replace(weight, codes=weight.codes[part], scales=weight.scales[part], zeros=weight.zeros[part])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _weights_digest(blocks: Blocks) -> str:
    """Tells one set of weights from another without reading all: some values of each tensor, or the files' dates."""
    if blocks.files is not None:
        stats = [(path.name, path.stat()) for path in sorted(set(blocks.files.values()))]
        return _digest([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    found = hashlib.sha256()
    for name, parameter in blocks.model.named_parameters():
        flat = parameter.detach().reshape(-1)
        found.update(name.encode())
        found.update(flat[:: max(1, len(flat) // 256)].float().cpu().numpy().tobytes())
    return found.hexdigest()[:16]
