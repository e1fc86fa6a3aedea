"""
`from_pretrained(..., quantization_config=PGPTQConfig(...))`: loads in full precision, quantizes, and from then on
calls itself what every reader knows, `quant_method: gptq`.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from ...model.prefix_cache import FILE_NAME as PREFIX_FILE
from ..export.checkpoint_files import write_json
from .configuration import PGPTQConfig
from .report import REPORT


class PGPTQHfQuantizer(HfQuantizer):
    """Quantizes once the weights are there; `save_pretrained` then writes GPTQ files, which the stock classes load."""

    quantization_config: PGPTQConfig

    def __init__(self, quantization_config: PGPTQConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        if self.pre_quantized:
            raise ValueError(
                "a checkpoint says quant_method 'p_gptq', which no version of this package writes; checkpoints of "
                "P-GPTQ say 'gptq'"
            )
        if quantization_config.dataset is None:
            raise ValueError("PGPTQConfig has no calibration data; give it dataset= (texts, token rows, a Dataset)")
        self._quantizer = None

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        from ..export.gptq import gptq_config, partial_layers
        from .quantizer import PGPTQQuantizer

        del model.config.quantization_config
        model.is_quantized = False
        config = self.quantization_config
        self._quantizer = PGPTQQuantizer(config)
        if config.tokenizer is None:
            self._quantizer.source = model.name_or_path or None
        self._quantizer.quantize_model(model)
        model.is_quantized = True
        model.config.quantization_config = gptq_config(
            config.bits,
            config.group_size,
            symmetric=config.sym,
            checkpoint_format=config.checkpoint_format,
            damp_percent=config.damp_percent,
            meta=self._quantizer.meta(),
        )
        model.config.quantization_config.update(partial_layers(model, list(self._quantizer.weights)))
        model.save_pretrained = MethodType(_save_pretrained, model)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The tensors of a GPTQ checkpoint."""
        from ..export.gptq import checkpoint_tensors

        self._quantizer.check_unchanged(model)
        form = self.quantization_config.checkpoint_format
        return dict(checkpoint_tensors(model, self._quantizer.weights, form)), {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        # The layers are ordinary ones that hold dequantized weights: adapters train.
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        model.__dict__.pop("save_pretrained", None)
        return model.to(dtype)


def _save_pretrained(model: PreTrainedModel, save_directory: str | Path, **kwargs: Any) -> None:
    """`save_pretrained`, and then the prefix, report, card and `quantize_config.json`, for which it has no hook."""
    if kwargs.pop("push_to_hub", False):
        raise ValueError("push_to_hub would upload before all files are there; save, then upload the folder")
    if not kwargs.get("is_main_process", True):
        return
    if getattr(model, "_hf_peft_config_loaded", False):
        type(model).save_pretrained(model, save_directory, **kwargs)  # adapters alone, as of any model
        return
    target = Path(save_directory)
    if target.is_file():
        raise ValueError(f"{target} is a file; name a folder")
    new = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    try:
        # All is written apart first: after an error (a full disk) what the folder had is still there.
        with tempfile.TemporaryDirectory(dir=target, prefix=".unfinished-") as work:
            _write(model, Path(work), kwargs)
            _move(Path(work), target, kwargs.get("variant"))
    except BaseException:
        if new:
            shutil.rmtree(target, ignore_errors=True)
        raise
    if model.hf_quantizer._quantizer.prefix is None:
        (target / PREFIX_FILE).unlink(missing_ok=True)  # an older save's, which would be taken for this one's


def _write(model: PreTrainedModel, work: Path, kwargs: dict[str, Any]) -> None:
    try:
        type(model).save_pretrained(model, work, **kwargs)
    except SafetensorError as error:
        raise OSError(f"the weights could not be written: {error}") from error
    write_json(work / "quantize_config.json", model.config.quantization_config)
    model.hf_quantizer._quantizer.write_extras(work, model)


def _move(work: Path, target: Path, variant: str | None) -> None:
    made = [path.relative_to(work) for path in work.rglob("*") if path.is_file()]
    card = target / "README.md"
    if card.is_file() and REPORT not in card.read_text(encoding="utf-8", errors="replace"):
        made.remove(Path("README.md"))  # somebody's own
    # Readers would take an older save's weights of another number of files for these.
    infix = f".{variant}" if variant else ""
    weights = re.compile(
        rf"model{re.escape(infix)}(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index{re.escape(infix)}\.json"
    )
    old = [path for path in target.iterdir() if weights.fullmatch(path.name) and Path(path.name) not in made]
    for path in sorted(made, key=lambda path: path.name == "config.json"):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(work / path, target / path)
    for path in old:
        path.unlink()
