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
  optimum-cli minicpm4 ternarize ./trained-latents -o ./model-ternary
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
    _common(parser, QUANTIZE, "checkpoint folder or Hub id, unquantized")
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="new folder for the INT4 checkpoint")
    parser.add_argument(
        "--dataset",
        required=True,
        metavar="DATA",
        help="calibration text: .txt, .jsonl, .json or .parquet file, or a Hub dataset with a train split",
    )
    parser.add_argument("--text-column", default="text", metavar="NAME", help="default text")
    parser.add_argument("--preset", choices=["minicpm4"], help="the settings of the released MiniCPM4 checkpoints")
    parser.add_argument("--bits", type=int, choices=[2, 3, 4, 8], help="default 4")
    parser.add_argument("--group-size", type=int, metavar="N", help="inputs that share a scale, default 128; -1: all")
    parser.add_argument("--asymmetric", action="store_true", help="own zero points (files of version gptq_v2)")
    parser.add_argument("--prefix-ids", type=int, nargs="+", metavar="ID", help="tokens that every prompt begins with")
    parser.add_argument("--skip-first", type=int, metavar="N", help="positions left out; default: the prefix")
    parser.add_argument("--prefix-weight", type=float, metavar="W", help="what they count instead of 0; 1 is GPTQ")
    parser.add_argument("--smoothing", action="store_true", help="AWQ's scaling first (S-P-GPTQ)")
    parser.add_argument("--act-group-aware", action="store_true", help="columns by importance within groups")
    parser.add_argument("--num-samples", type=int, metavar="N", help="calibration rows, default 128")
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens of a row, default 2048")
    parser.add_argument("--batch-size", type=int, metavar="N", help="rows that run together, default 8")
    parser.add_argument("--seed", type=int, metavar="N", help="which places of the text, default 0")
    parser.add_argument("--device", default="cpu", help="where blocks are solved, default cpu")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="default 5GB")
    parser.add_argument("--fresh", action="store_true", help="throw away what an unfinished run left")


def ternarize_arguments(parser: argparse.ArgumentParser) -> None:
    _common(parser, TERNARIZE, "latents, fake-quantized or dense weights: folder or Hub id")
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="new folder for the packed checkpoint")
    parser.add_argument("--fake-quantized", action="store_true", help="MODEL's values are ternary already: exact")
    parser.add_argument("--group-size", type=int, metavar="N", help="for dense weights: inputs that share a scale")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="default 5GB")


def export_arguments(parser: argparse.ArgumentParser) -> None:
    _common(parser, EXPORT, "quantized (GPTQ or packed ternary) or plain checkpoint: folder")
    parser.add_argument("--to", required=True, choices=["gguf", "gptq", "marlin"], help="what to write")
    parser.add_argument("-o", "--output", required=True, metavar="PATH", help="new file (gguf) or folder")
    parser.add_argument("--type", default="auto", metavar="TYPE", help="gguf: type of quantized layers, default auto")
    parser.add_argument("--float-type", default="auto", metavar="TYPE", help="gguf: type of all else, default auto")
    parser.add_argument("--tokenizer-pre", metavar="NAME", help="gguf: llama.cpp's name of the pre-tokenizer")


def _common(parser: argparse.ArgumentParser, epilog: str, model: str) -> None:
    parser.epilog = epilog
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", metavar="MODEL", help=model)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


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
