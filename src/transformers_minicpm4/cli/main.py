"""The `minicpm4` command: finds the asked command, runs it, and turns errors into one sentence and an exit code.

A command is a module of this folder with `register(subparsers)`, which adds its parser, and `run(args)`, which does
the work and may return an exit code. Libraries are imported inside `run`, so that help costs nothing.
"""

import argparse
import os
import sys
import traceback
from importlib import import_module

from .errors import UserError, one_line


COMMANDS = (
    "demo", "generate", "info", "plan", "env", "export", "align",
    "ultraclean", "fr-spec", "chunk-plan", "grpo", "serve", "chat",
)  # fmt: skip
# Their arguments are not parsed here: Transformers' command of the same name does, for `grpo` TRL's parser.
HANDED_OVER = ("grpo", "chat")

EXAMPLES = """\
examples:
  minicpm4 demo                                          a real model reads a long text and answers
  minicpm4 generate MODEL --prompt "Name three rivers."  one answer, streamed
  minicpm4 info openbmb/MiniCPM4-8B                      what a checkpoint is, before it is loaded
  minicpm4 plan openbmb/MiniCPM4-8B --device orin-nx     what fits on a device, before any weight is there
  minicpm4 env                                           what this machine can run
  minicpm4 export MODEL --to gguf -o model.gguf          for llama.cpp (or OpenVINO)
  minicpm4 align MODEL model.gguf --text some.txt        whether that computes the same
  minicpm4 ultraclean filter crawl.parquet --model quality.bin -o kept
  minicpm4 serve MODEL --port 8000                       an OpenAI-compatible server on this machine
  minicpm4 fr-spec build MODEL --text chat.txt -o lists  the tokens that a draft head scores
  minicpm4 chunk-plan lengths.jsonl --max-completion-length 8192 --batch 256 --num-generations 8
  minicpm4 grpo --config recipe.yaml --output_dir out    reinforcement learning with chunk-wise rollouts

MODEL is a folder or a Hub id. `minicpm4 COMMAND --help` has examples for each command.
"""


def _module(command: str):
    return import_module(f".{command.replace('-', '_')}", __package__)


def build_parser() -> argparse.ArgumentParser:
    """The parser with all commands. Each also takes `--debug`, before or after the name of the command."""
    parser = argparse.ArgumentParser(
        prog="minicpm4",
        description="Run and inspect MiniCPM4, with block-sparse attention (InfLLM v2) on any device.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version of this package and exit")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name in COMMANDS:
        _module(name).register(subparsers)
    for name, subparser in subparsers.choices.items():
        if name not in HANDED_OVER:
            # SUPPRESS: an absent flag here must not undo the one given before the command.
            subparser.add_argument(
                "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
            )
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments; for a handed-over command, all that follows its name is kept as `args.arguments`."""
    parser = build_parser()
    # No option before the command takes a value, so the first plain word is the command.
    position = next((index for index, word in enumerate(argv) if not word.startswith("-")), len(argv))
    if position < len(argv) and argv[position] in HANDED_OVER:
        args = parser.parse_args(argv[: position + 1])
        args.arguments = argv[position + 1 :]
        return args
    args = parser.parse_args(argv)
    if args.command is None and not args.version:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    return args


def main(argv: list[str] | None = None) -> int:
    """Run a command. Returns 0, 1 for a finding or a fault of ours, 2 for unusable input, 130 if stopped."""
    args = parse(sys.argv[1:] if argv is None else argv)
    if args.version:
        from transformers_minicpm4 import __version__

        print(__version__)
        return 0
    try:
        return _module(args.command).run(args) or 0
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader went away (`minicpm4 info ... | head`); keep Python from complaining once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UserError as error:
        return report(args, error, str(error), 2)
    except Exception as error:
        return report(args, error, f"unexpected {type(error).__name__}: {one_line(error)} (--debug shows where)", 1)


def report(args: argparse.Namespace, error: Exception, message: str, code: int) -> int:
    if args.debug:
        traceback.print_exception(error)
    print(f"minicpm4 {args.command}: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
