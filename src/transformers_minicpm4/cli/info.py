"""`minicpm4 info`: what a checkpoint is, without loading it; with `--check` also whether its weights are finite."""

import argparse
import json
from pathlib import Path

from .checkpoint import StoredTensor, load_config, locate, read_headers, weight_files
from .describe import FLOAT_BYTES, describe_config, describe_weights, kv_cache_bytes
from .errors import UserError, one_line


# Rows of the memory table, in tokens.
LENGTHS = (4_096, 32_768, 131_072)
# Elements that --check looks at in one go: bounds its memory beyond the tensor itself.
CHECK_CHUNK = 1 << 24

EXAMPLES = """\
examples:
  minicpm4 info openbmb/MiniCPM4-8B
  minicpm4 info ./my-checkpoint --check      also search the weights for NaN and Inf
  minicpm4 info ./my-checkpoint --json | jq .kv_cache
"""


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "info",
        help="what a checkpoint is: sizes, attention, context, memory by length",
        description="Describe a checkpoint without loading it: sizes, attention, context, memory by length.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id")
    parser.add_argument("--check", action="store_true", help="read every weight; NaN or Inf is exit code 1")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args) -> int:
    config = load_config(args.model)
    folder = locate(args.model)
    is_stored = any(file.is_file() for file in weight_files(folder))
    if args.check and not is_stored and not Path(args.model).is_dir():
        raise UserError(
            f"--check reads the weights themselves and those of {args.model!r} are not stored here; fetch them with "
            f"`hf download {args.model}`."
        )
    report = {"model": args.model, **describe_config(config), "weights": None}
    headers = headers_of(args.model, folder)
    if headers is not None:
        report["weights"] = describe_weights(headers)
    if report["dtype"] is None and report["weights"]:
        report["dtype"] = report["weights"]["float_dtype"]
    if report["dtype"] in FLOAT_BYTES:
        report["kv_cache"] = [
            {"tokens": length, **kv_cache_bytes(config, length, report["dtype"])} for length in LENGTHS
        ]
    if args.check:
        report["not_finite"] = find_not_finite(read_headers(folder))

    print(json.dumps(report, indent=2) if args.json else format_report(report))
    return 1 if report.get("not_finite") else 0


def headers_of(model: str, folder: Path) -> dict[str, list[StoredTensor]] | None:
    """Headers of all weights files, from disk or over the network; None if they lie on a Hub that is out of reach."""
    if Path(model).expanduser().is_dir() or any(file.is_file() for file in weight_files(folder)):
        return {file.name: tensors for file, tensors in read_headers(folder).items()}

    from huggingface_hub import constants, errors, get_safetensors_metadata

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        files = get_safetensors_metadata(model).files_metadata
    except (errors.NotASafetensorsRepoError, errors.SafetensorsParsingError) as error:
        raise UserError(f"The weights of {model!r} on the Hub cannot be described: {one_line(error)}") from error
    except OSError:
        return None
    return {
        name: [
            StoredTensor(key, entry.dtype, tuple(entry.shape), entry.data_offsets[1] - entry.data_offsets[0])
            for key, entry in file.tensors.items()
        ]
        for name, file in files.items()
    }


def find_not_finite(headers: dict[Path, list[StoredTensor]]) -> list[dict]:
    """Read every weight once, tensor by tensor, and name the tensors that hold NaN or Inf."""
    from safetensors import SafetensorError, safe_open
    from transformers.utils.logging import tqdm

    found = []
    total = sum(tensor.num_bytes for tensors in headers.values() for tensor in tensors)
    with tqdm(total=total, unit="B", unit_scale=True, desc="Checking weights") as progress:
        for file, tensors in headers.items():
            try:
                with safe_open(file, framework="pt") as weights:
                    for tensor in tensors:
                        values = weights.get_tensor(tensor.name)
                        if values.is_floating_point():
                            counts = count_not_finite(values)
                            if any(counts.values()):
                                found.append({"file": file.name, "tensor": tensor.name, **counts})
                        progress.update(tensor.num_bytes)
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file} cannot be read ({one_line(error)}); copy or download it again.") from error
    return found


def count_not_finite(values) -> dict[str, int]:
    counts = {"nan": 0, "inf": 0}
    for chunk in values.flatten().split(CHECK_CHUNK):
        if chunk.element_size() == 1:
            chunk = chunk.float()  # PyTorch has no isinf for 8-bit floats
        counts["nan"] += int(chunk.isnan().sum())
        counts["inf"] += int(chunk.isinf().sum())
    return counts


def format_report(report: dict) -> str:
    """The report as aligned lines."""
    attention = report["attention"]
    rows = [
        ("model", report["model"]),
        ("type", f"{report['model_type']} ({', '.join(report['architectures']) or 'no architecture named'})"),
        ("weights", format_weights(report)),
        ("dtype", report["dtype"] or "not stated"),
        (
            "layers",
            f"{report['num_hidden_layers']}, hidden size {report['hidden_size']:,}, vocabulary "
            f"{report['vocab_size']:,}{' (embeddings tied)' if report['tie_word_embeddings'] else ''}",
        ),
        (
            "heads",
            f"{report['num_attention_heads']} query, {report['num_key_value_heads']} key/value, head size "
            f"{report['head_dim']}",
        ),
        ("context", f"{report['context_length']:,} tokens"),
        ("rope", format_rope(report["rope"])),
        ("quantization", format_fields(report["quantization"]) or "none"),
        ("attention", format_attention(attention)),
    ]
    if attention["sparse_config"]:
        rows.append(("", format_fields(attention["sparse_config"])))
    lines = [f"{name:<13} {value}" for name, value in rows]
    if "kv_cache" in report:
        lines += ["", *format_kv_cache(report)]
    if "not_finite" in report:
        lines += ["", *format_not_finite(report["not_finite"])]
    return "\n".join(lines)


def format_fields(fields: dict | None) -> str:
    return ", ".join(f"{key} {value}" for key, value in (fields or {}).items())


def format_weights(report: dict) -> str:
    weights = report["weights"]
    if weights is None:
        return "not in the local cache, and the Hub is out of reach"
    files = f"{weights['files']} file{'s' if weights['files'] != 1 else ''}"
    kind = "stored elements" if report["quantization"] else "parameters"
    counts = f"{weights['parameters']:,} {kind} in {weights['tensors']} tensors"
    return f"{counts}, {format_bytes(weights['bytes'])} in {files}"


def format_rope(rope: dict | None) -> str:
    if rope is None:
        return "none stated"
    text = f"{rope.get('rope_type', 'default')}, theta {rope.get('rope_theta', 'not stated')}"
    if "factor" in rope:
        text += f", factor {rope['factor']}"
    if "long_factor_range" in rope:
        low, high = rope["long_factor_range"]
        text += f", factors {low:g} to {high:g}"
        text += " for every length" if rope["short_equals_long"] else " beyond the original length"
    if "original_max_position_embeddings" in rope:
        text += f", original length {rope['original_max_position_embeddings']:,} tokens"
    return text


def format_attention(attention: dict) -> str:
    if attention["mode"] == "dense":
        how = '; sparse with attn_implementation="infllm_v2"' if attention["can_be_sparse"] else ""
        return f"dense: a query reads every earlier token{how}"
    sparse = attention["sparse_config"]
    text = (
        f"sparse (infllm_v2): a query reads at most {attention['blocks_per_query']} blocks of {sparse['block_size']} "
        f"tokens = {attention['tokens_per_query']:,} tokens"
    )
    return text + ("" if sparse["dense_len"] == -1 else f"; dense below {sparse['dense_len']:,} tokens")


def format_kv_cache(report: dict) -> list[str]:
    columns = ["keys_and_values"]
    if (sparse := report["attention"]["sparse_config"]) is not None:
        columns += ["compressed_keys"] + ["unrotated_keys"] * sparse["use_nope"]
    lines = ["".join([f"{'tokens':>9}", *(f"{column.replace('_', ' '):>17}" for column in columns)])]
    for entry in report["kv_cache"]:
        line = "".join([f"{entry['tokens']:>9,}", *(f"{format_bytes(entry[column]):>17}" for column in columns)])
        lines.append(line + ("  (beyond the context)" if entry["tokens"] > report["context_length"] else ""))
    return lines


def format_not_finite(found: list[dict]) -> list[str]:
    if not found:
        return ["all weights are finite"]
    lines = [f"{len(found)} tensor{'s hold' if len(found) > 1 else ' holds'} values that are not finite:"]
    return lines + [f"  {each['tensor']}: {each['nan']} NaN, {each['inf']} Inf ({each['file']})" for each in found]


def format_bytes(count: int) -> str:
    """Decimal units, as disks and the Hub count."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"
