"""
`optimum-cli minicpm4 quantize|ternarize|export`: the work. The arguments are beside optimum's commands, in
`optimum/commands/register/register_minicpm4.py`, which optimum reads at each start and which therefore imports nothing
of ours.
"""

import argparse
import sys
import traceback
from pathlib import Path

from .errors import UserError, one_line


def run(action: str, args: argparse.Namespace) -> int:
    """Do the work. Returns 0, 1 for a fault of ours, 2 for unusable input, 130 if stopped."""
    try:
        {"quantize": quantize, "ternarize": ternarize, "export": export}[action](args)
        return 0
    except KeyboardInterrupt:
        print("stopped" + ("; the same command goes on" if action == "quantize" else ""), file=sys.stderr)
        return 130
    except (UserError, ValueError, OSError, ImportError) as error:
        message, code = one_line(error), 2
        found = error
    except Exception as error:
        message, code = f"unexpected {type(error).__name__}: {one_line(error)} (--debug shows where)", 1
        found = error
    if args.debug:
        traceback.print_exception(found)
    print(f"optimum-cli minicpm4 {action}: {message}", file=sys.stderr)
    return code


def quantize(args: argparse.Namespace) -> None:
    from transformers_minicpm4 import PGPTQConfig, PGPTQQuantizer

    names = ("bits", "group_size", "prefix_ids", "skip_first", "prefix_weight", "num_samples", "max_length")
    given = {name: getattr(args, name) for name in (*names, "batch_size", "seed") if getattr(args, name) is not None}
    if args.asymmetric:
        given |= {"sym": False, "checkpoint_format": "gptq_v2"}
    make = PGPTQConfig.minicpm4 if args.preset else PGPTQConfig
    config = make(
        dataset=calibration_data(args.dataset, args.text_column),
        text_column=args.text_column,
        smoothing=args.smoothing,
        act_group_aware=args.act_group_aware,
        **given,
    )
    refuse_missing(args.model)
    quantizer = PGPTQQuantizer.from_pretrained(
        args.model, config=config, device=args.device, compute_dtype=args.compute_dtype
    )
    folder = quantizer.quantize(args.output, resume=not args.fresh, max_shard_size=args.max_shard_size)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    worst = max(quantizer.report, key=lambda row: row["error"])
    print(
        f"{folder}: {size / 1e6:,.1f} MB of weights, {config.bits} bits by {config.method}. Largest error: "
        f"{worst['error']:.1%} of the outputs of {worst['layer']}; {folder / 'quantization_report.json'} has all."
    )


def ternarize(args: argparse.Namespace) -> None:
    refuse_missing(args.model)
    import torch

    from transformers_minicpm4.quantization.bitcpm4.quantizer import (
        BitCPM4Quantizer,
        cast_rest,
        import_fake_quantized,
        save_packed,
    )

    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    names = ("group_size", "modules_to_not_convert")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.fake_quantized:
        for name in options:
            raise UserError(f"--{name.replace('_', '-')} is found from --fake-quantized weights; leave it out")
        from transformers_minicpm4.quantization.export.checkpoint_files import own_tokenizer

        model = import_fake_quantized(args.model)
        if dtype is not None:
            cast_rest(model, dtype)
        folder = save_packed(model, args.output, own_tokenizer(args.model), args.max_shard_size)
    else:
        quantizer = BitCPM4Quantizer.from_pretrained(args.model, **options)
        folder = quantizer.quantize(args.output, max_shard_size=args.max_shard_size, dtype=dtype)
    size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    print(f"{folder}: {size / 1e6:,.1f} MB, packed ternary")


def export(args: argparse.Namespace) -> None:
    refuse_missing(args.model)
    from transformers import AutoConfig, AutoTokenizer

    from transformers_minicpm4.quantization.export.checkpoint_files import quantized_by

    method = quantized_by(AutoConfig.from_pretrained(args.model))
    if args.to != "gguf":
        asked = {"--type": args.type, "--float-type": args.float_type, "--tokenizer-pre": args.tokenizer_pre}
        given = [option for option, value in asked.items() if value not in (None, "auto")]
        if given:
            raise UserError(f"{', '.join(given)}: for --to gguf alone; leave out with --to {args.to}")
    gguf_options = {"float_type": args.float_type, "quantization": args.type, "tokenizer_pre": args.tokenizer_pre}
    if method == "gptq" and args.to == "gguf":
        from transformers_minicpm4.quantization.export.gguf import gptq_to_gguf

        gptq_to_gguf(args.model, args.output, **gguf_options)
    elif method == "gptq" and args.to == "marlin":
        from transformers_minicpm4.quantization.export.marlin import gptq_to_marlin

        gptq_to_marlin(args.model, args.output)
    elif method == "bitcpm4" and args.to in ("gguf", "gptq"):
        from transformers_minicpm4.quantization.bitcpm4.export import export_ternary

        export_ternary(args.model, args.output, args.to, **(gguf_options if args.to == "gguf" else {}))
    elif method is None and args.to == "gguf":
        from transformers import AutoModelForCausalLM

        from transformers_minicpm4.quantization.export.gguf import save_gguf

        model = AutoModelForCausalLM.from_pretrained(args.model)
        save_gguf(args.output, model, tokenizer=AutoTokenizer.from_pretrained(args.model), **gguf_options)
    else:
        raise UserError(
            f"{args.model} is {'not quantized' if method is None else f'quantized by {method}'} and cannot become "
            f"{args.to}; gguf takes plain, gptq and bitcpm4 checkpoints, marlin gptq ones, gptq bitcpm4 ones"
        )
    print(f"{args.output}: written")


def refuse_missing(model: str) -> None:
    """A path that does not exist is not the id of a Hub repository."""
    if not Path(model).exists() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise UserError(
            f"there is no folder {model}; give a checkpoint's folder, or a Hub id such as openbmb/MiniCPM4-0.5B"
        )


def calibration_data(name: str, text_column: str):
    """Texts of a file, or the name of a Hub dataset as it is."""
    path = Path(name)
    if not path.exists():
        if path.suffix in (".txt", ".md", ".jsonl", ".json", ".parquet", ".gz"):
            raise UserError(f"{name} does not exist; give a file of text, or the name of a dataset on the Hub")
        return name
    if path.suffix in (".txt", ".md"):
        return [path.read_text(encoding="utf-8")]
    kinds = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".gz": "json"}
    if path.suffix not in kinds:
        raise UserError(f"{name} is no .txt, .jsonl, .json or .parquet file")
    from datasets import load_dataset

    rows = load_dataset(kinds[path.suffix], data_files=str(path), split="train", streaming=True)
    first = next(iter(rows), None)
    if first is None or text_column not in first:
        raise UserError(
            f"{name} has no column {text_column!r}; its columns are {sorted(first or {})}. Use --text-column"
        )
    return rows
