"""What quantization cost, layer by layer: `quantization_report.json`, a picture, and the checkpoint's card."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from .configuration import PGPTQConfig


REPORT = "quantization_report.json"
PICTURE = "quantization_error.png"

CARD = """\
---
{header}---

# {title}

{bits}-bit weights of `{source}`, made by {method} with
[transformers_minicpm4](https://pypi.org/project/transformers-minicpm4/). The files are stock `quant_method: gptq`;
engines that read GPTQ need nothing of ours.

| | |
|---|---|
{facts}
{prefix}
Error of each kind of layer: the share of its outputs' energy on the calibration rows that became error (geometric mean
over blocks), beside plain rounding.

| layer | this checkpoint | plain rounding |
|---|---|---|
{layers}

`{report}` has every layer{picture}.
"""

PREFIX = """
Every prompt must begin with the tokens {ids}. Their keys and values in full precision are in
`prefix_cache/` (`transformers_minicpm4.model.prefix_cache`); without that file the checkpoint works too,
with larger error at those positions.
"""


def write_report(
    folder: Path, rows: list[dict[str, Any]], config: PGPTQConfig, source: str, num_rows: int, left: list[str]
) -> None:
    """
    Write report, picture (where matplotlib is installed) and `README.md` into a checkpoint's folder.

    Args:
        left: matrices within blocks that were not quantized.
    """
    (folder / REPORT).write_text(json.dumps({"config": config.to_dict(), "layers": rows}, indent=1), encoding="utf-8")
    drawn = draw_errors(folder / PICTURE, rows)
    (folder / "README.md").write_text(card(rows, config, source, drawn, num_rows, left), encoding="utf-8")


def by_kind(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of like-named layers ("down_proj") together, in order of their blocks."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(row["layer"].rpartition(".")[2], []).append(row)
    return kinds


def card(
    rows: list[dict[str, Any]], config: PGPTQConfig, source: str, picture: bool, num_rows: int, left: list[str]
) -> str:
    """The model card as text."""
    from huggingface_hub import ModelCardData

    named = "/" in source and not Path(source).is_absolute() and not Path(source).exists()
    header = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["gptq", "p-gptq", f"{config.bits}-bit"],
        **({"base_model": source, "base_model_relation": "quantized"} if named else {}),
    )
    left_out = {}
    if "P-GPTQ" in config.method:
        left_out["left out of the Hessian"] = f"the first {config.skip_first} positions of each calibration row"
        if config.prefix_weight:
            left_out["left out of the Hessian"] += f" (they count {config.prefix_weight:g})"
    facts = {
        "group size": "one scale an output" if config.group_size == -1 else config.group_size,
        "symmetric": "yes" if config.sym else "no",
        **left_out,
        "calibration": f"{num_rows} rows of up to {config.max_length} tokens, seed {config.seed}",
        "columns": "by activation, static groups"
        if config.desc_act
        else "group-aware order"
        if config.act_group_aware
        else "in order",
        "not quantized": "embeddings, head, norms, biases"
        + (f", and {len(left)} matrices within the blocks, such as `{left[0]}`" if left else ""),
    }
    kinds = by_kind(rows)
    if config.modules_in_block_to_quantize is not None:
        facts["quantized"] = ", ".join(name for group in config.modules_in_block_to_quantize for name in group)
        facts["not quantized"] = "everything else"
    return CARD.format(
        header=header.to_yaml() + "\n",
        title=f"{Path(source).name} ({config.bits}-bit {config.method})",
        bits=config.bits,
        source=source if named else Path(source).name,
        method=config.method,
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        prefix=PREFIX.format(ids=config.prefix_ids) if config.prefix_ids else "",
        layers="\n".join(
            f"| {kind} | {_mean(found, 'error'):.2e} | {_mean(found, 'rounding_error'):.2e} |"
            for kind, found in kinds.items()
        ),
        report=REPORT,
        picture=f", `{PICTURE}` draws it" if picture else "",
    )


def draw_errors(path: Path, rows: list[dict[str, Any]]) -> bool:
    """Error over blocks, one panel for each kind of layer; `False` without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    kinds = by_kind(rows)
    columns = min(4, len(kinds))
    lines = -(-len(kinds) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flat)
    for panel, (kind, found) in zip(panels, kinds.items(), strict=False):
        blocks = [row["block"] for row in found]
        panel.semilogy(blocks, [row["rounding_error"] for row in found], ".-", color="0.6", label="plain rounding")
        panel.semilogy(blocks, [row["error"] for row in found], ".-", color="tab:blue", label="this checkpoint")
        panel.set_title(kind, fontsize=9)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3)
    for panel in panels[len(kinds) :]:
        panel.set_visible(False)
    figure.supxlabel("block", fontsize=9)
    figure.supylabel("share of the outputs' energy that is error", fontsize=9)
    figure.axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    return True


def _mean(rows: list[dict[str, Any]], key: str) -> float:
    found = [row[key] for row in rows if row[key] > 0]
    return geometric_mean(found) if found else 0.0
