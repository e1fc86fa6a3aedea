"""
`optimum-cli minicpm4 quantize|ternarize|export`.

This folder and its parents have no __init__.py: they are shared with optimum, which reads `REGISTER_COMMANDS` of every
module here, at each start of its command.
"""

import argparse
import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


QUANTIZE = """\
examples:
  optimum-cli minicpm4 quantize ./model -o ./model-int4 --dataset calibration.jsonl
  optimum-cli minicpm4 quantize ./model -o ./model-int4 --dataset corpus.parquet --prefix-ids 1 --group-size 64
  optimum-cli minicpm4 quantize openbmb/MiniCPM4-8B -o ./8b-int4 --dataset text.txt --preset minicpm4

Blocks are read, solved and put away one by one, so the model may be larger than memory. The same command after a kill
goes on where it was. --prefix-ids stores the keys and values of tokens that every prompt begins with (most often the
id of <s>), and leaves these positions out of the calibration: P-GPTQ. Without it the result is GPTQ.
"""
TERNARIZE = """\
examples:
  optimum-cli minicpm4 ternarize ./trained-latents -o ./model-ternary --dtype bfloat16
  optimum-cli minicpm4 ternarize openbmb/BitCPM4-1B -o ./bitcpm4-packed --fake-quantized
  optimum-cli minicpm4 ternarize ./model -o ./ruined --group-size 64

Latents come from training with BitCPM4Config (docs/bitcpm4.md). Dense weights that were never trained to be ternary
are rounded, which ruins a model: a baseline.
"""
EXPORT = """\
examples:
  optimum-cli minicpm4 export ./model-int4 --to gguf -o model.gguf
  optimum-cli minicpm4 export ./model-int4 --to marlin -o ./model-marlin
  optimum-cli minicpm4 export ./model-ternary --to gptq -o ./model-gptq2bit
  optimum-cli minicpm4 export ./model-ternary --to gguf -o model.gguf

docs/quantization_exports.md says which engine reads what; a form that would change a weight is refused.
"""


def quantize_arguments(parser: argparse.ArgumentParser) -> None:
    _common(parser, QUANTIZE, "checkpoint folder or Hub id, unquantized", "folder for the INT4 checkpoint")
    parser.add_argument(
        "--dataset",
        required=True,
        metavar="DATA",
        help="calibration text: .txt, .md, .jsonl, .json (also .gz) or .parquet file, or a Hub dataset with a train "
        "split",
    )
    _option(parser, "--text-column", "NAME", "column of DATA that has the text", default="text")
    parser.add_argument(
        "--preset",
        choices=["minicpm4"],
        help="minicpm4: as the released MiniCPM4 checkpoints, ready for Marlin: 4 bits, groups of 128, 1024 rows of "
        "512 tokens, --prefix-ids 1 --skip-first 4; options given beside it win (default: none)",
    )
    parser.add_argument("--bits", type=int, choices=[2, 3, 4, 8], help="bits a weight (default: 4)")
    _option(parser, "--group-size", "N", "inputs that share a scale; -1: all of an output's", "128", type=int)
    _switch(parser, "--asymmetric", "zero points of their own, in files of version gptq_v2", "symmetric, version gptq")
    parser.add_argument(
        "--prefix-ids",
        type=int,
        nargs="+",
        metavar="ID",
        help="token ids that every prompt begins with; stored in full precision (default: none)",
    )
    _option(
        parser, "--skip-first", "N", "tokens at the start of a row that count --prefix-weight",
        "as many as --prefix-ids, or 4", type=int,
    )  # fmt: skip
    _option(
        parser, "--prefix-weight", "W", "what these count, from 0 (P-GPTQ) to 1 (GPTQ)",
        "0 with --prefix-ids, else 1", type=float,
    )  # fmt: skip
    _switch(parser, "--smoothing", "AWQ's scaling first (S-P-GPTQ)", "off")
    _switch(parser, "--act-group-aware", "columns by importance, within and among groups", "in order")
    _option(parser, "--num-samples", "N", "calibration rows", "128; 1024 with --preset", type=int)
    _option(parser, "--max-length", "N", "tokens of a calibration row", "2048; 512 with --preset", type=int)
    _option(parser, "--batch-size", "N", "rows that run together", "8", type=int)
    _option(parser, "--seed", "N", "which places of the text become rows", "0", type=int)
    _option(parser, "--device", "NAME", "where blocks are solved, such as cuda", default="cpu")
    parser.add_argument(
        "--compute-dtype",
        choices=["float32", "bfloat16", "float16"],
        help="what blocks compute in while they are solved; the checkpoint keeps MODEL's dtype (default: MODEL's, but "
        "float32 for bfloat16 on a CPU that is slow in it)",
    )
    _shards(parser)
    _switch(parser, "--fresh", "throw away what an unfinished run left in FOLDER's place", "go on with it")


def ternarize_arguments(parser: argparse.ArgumentParser) -> None:
    _common(
        parser, TERNARIZE, "latents, fake-quantized or dense weights: folder or Hub id",
        "folder for the packed checkpoint",
    )  # fmt: skip
    _switch(
        parser, "--fake-quantized", "MODEL's values are ternary already; packs them exactly",
        "they are latents or dense",
    )  # fmt: skip
    _option(
        parser, "--group-size", "N", "for dense weights alone: inputs that share a scale; -1: all of an output's",
        "64", type=int,
    )  # fmt: skip
    parser.add_argument(
        "--modules-to-not-convert",
        nargs="+",
        metavar="NAME",
        help="for dense weights alone: linear layers that stay as they are, such as down_proj (default: none but the "
        "head)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of what is not ternary: embeddings, head, norms, biases. bfloat16 halves these in a checkpoint trained "
        "in float32; codes and scales stay (default: MODEL's own)",
    )
    _shards(parser)


def export_arguments(parser: argparse.ArgumentParser) -> None:
    _common(
        parser, EXPORT, "quantized (GPTQ or packed ternary) or plain checkpoint: folder", "file (gguf) or folder",
        "PATH",
    )  # fmt: skip
    parser.add_argument("--to", required=True, choices=["gguf", "gptq", "marlin"], help="what to write")
    _option(
        parser, "--type", "TYPE", "gguf: type of quantized layers, such as Q4_0, TQ2_0, F16; auto: the smallest exact "
        "one", default="auto",
    )  # fmt: skip
    _option(
        parser, "--float-type", "TYPE", "gguf: type of all else, such as F16, BF16, F32; auto: as in MODEL",
        default="auto",
    )  # fmt: skip
    _option(
        parser, "--tokenizer-pre", "NAME", "gguf: llama.cpp's name of the pre-tokenizer",
        "recognized from tokenizer.json",
    )  # fmt: skip


def _common(parser: argparse.ArgumentParser, epilog: str, model: str, output: str, metavar: str = "FOLDER") -> None:
    parser.epilog = epilog
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", metavar="MODEL", help=model)
    parser.add_argument("-o", "--output", required=True, metavar=metavar, help=f"new {output}")
    _switch(parser, "--debug", "show the traceback of an error", "one line")


def _option(parser: argparse.ArgumentParser, name: str, metavar: str, text: str, shown: str = "", **fields) -> None:
    """An option with its default: `default=` is passed on, `shown` tells what stands for one that was not given."""
    parser.add_argument(name, metavar=metavar, help=f"{text} (default: {shown or fields['default']})", **fields)


def _switch(parser: argparse.ArgumentParser, name: str, text: str, shown: str) -> None:
    parser.add_argument(name, action="store_true", help=f"{text} (default: {shown})")


def _shards(parser: argparse.ArgumentParser) -> None:
    _option(parser, "--max-shard-size", "SIZE", "of a weight file, in bytes or such as 300MB", default="5GB")


class _Command(BaseOptimumCLICommand):
    def run(self):
        # Only now: the package imports Transformers.
        from transformers_minicpm4.cli.quantization import run

        code = run(self.COMMAND.name, self.args)
        if code:
            sys.exit(code)


class QuantizeCommand(_Command):
    parse_args = staticmethod(quantize_arguments)


class TernarizeCommand(_Command):
    parse_args = staticmethod(ternarize_arguments)


class ExportCommand(_Command):
    parse_args = staticmethod(export_arguments)


class MiniCPM4Command(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="minicpm4", help="quantize, ternarize and export any Llama-like checkpoint")
    SUBCOMMANDS = (
        CommandInfo(
            name="quantize", help="INT4 by P-GPTQ, in files that other engines read", subcommand_class=QuantizeCommand
        ),
        CommandInfo(
            name="ternarize", help="pack ternary weights (BitCPM4) to 2 bits", subcommand_class=TernarizeCommand
        ),
        CommandInfo(
            name="export", help="write a quantized checkpoint for another engine", subcommand_class=ExportCommand
        ),
    )


REGISTER_COMMANDS = [MiniCPM4Command]
