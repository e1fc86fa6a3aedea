"""`minicpm4 serve`: an OpenAI-compatible server for one model on this machine."""

import argparse
import ipaddress
import os
import sys
import traceback
from pathlib import Path

from .errors import UserError, one_line
from .generate import at_least, at_least_one


EXAMPLES = """\
examples:
  minicpm4 serve openbmb/MiniCPM4-0.5B
  minicpm4 serve ./my-checkpoint --port 8080 --context 16384 --draft lookup
  minicpm4 serve ./my-checkpoint --host 0.0.0.0 --api-key "$KEY"     for other machines, too

then, from any OpenAI client (its base_url is http://127.0.0.1:8000/v1; MODEL is the folder's name or the Hub id):
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "openbmb/MiniCPM4-0.5B", "messages": [{"role": "user", "content": "Name three rivers."}]}'
  minicpm4 chat openbmb/MiniCPM4-0.5B

One answer is written at a time; other requests wait, at most --queue of them, and one more is refused (429).
docs/server.md says what a request may hold. Ctrl-C stops the server.
"""


def register(subparsers) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="OpenAI-compatible server for one model, over the edge engine",
        description="Answer OpenAI's chat completions over HTTP, with streaming, tools and JSON schemas.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of a checkpoint with a chat template")
    where = parser.add_argument_group("address")
    where.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="default 127.0.0.1: this machine alone; 0.0.0.0: every network it is in, so add --api-key",
    )
    where.add_argument("--port", type=port, default=8000, help="default 8000; 0 takes a free one")
    where.add_argument("--api-key", metavar="KEY", help="what clients must send; default: none is asked for")
    where.add_argument("--queue", type=at_least(0), default=64, metavar="N", help="requests that may wait, default 64")
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--context",
        type=at_least_one,
        metavar="TOKENS",
        help="prompt and answer together; default: what the model is made for and this machine has memory for",
    )
    engine.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), help="default: what suits this machine and the checkpoint"
    )
    engine.add_argument(
        "--draft", choices=("lookup",), help="guess ahead by copying from the prompt: faster where answers quote it"
    )
    engine.add_argument("--no-compile", action="store_true", help="start at once, with slower steps")


def port(text: str) -> int:
    if not 0 <= (number := int(text)) < 1 << 16:
        raise argparse.ArgumentTypeError(f"{number} is given, a port is between 0 and 65535")
    return number


def run(args) -> int:
    try:
        import starlette  # noqa: F401 - asked for here, before a model is loaded
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(
            "`minicpm4 serve` needs packages that are not installed; add them with "
            f"`pip install 'transformers_minicpm4[serve]'` ({one_line(error)})."
        ) from error
    from transformers_minicpm4.edge.server import listen, make_app, make_server

    try:
        sock = listen(args.host, args.port)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"The address {args.host}, port {args.port}, cannot be used ({one_line(error)}); give another --port, or "
            "a --host that this machine has."
        ) from error
    with sock:
        if args.api_key is None and not is_this_machine_alone(args.host):
            print("[anyone who reaches this address can use the server: --api-key]", file=sys.stderr)
        engine = load(args)
        folder = Path(args.model).expanduser()
        name = folder.resolve().name if folder.is_dir() else args.model
        host, bound = sock.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host

        def ready():
            line = f"{name}: http://{host}:{bound}/v1, context {engine.context:,} tokens; Ctrl-C stops"
            print(f"[{line}]", file=sys.stderr, flush=True)

        try:
            app = make_app(engine, name, queue=args.queue, api_key=args.api_key)
        except ValueError as error:
            raise UserError(one_line(error)) from error
        try:
            make_server(app, ready).run(sockets=[sock])
        except Exception:
            if app.state.line.ended:
                raise
            traceback.print_exc()  # nobody else will: see below
        finally:
            if not app.state.line.ended:  # it cannot be interrupted, and Python's own exit would abort
                print("[stopped in the midst of a computation]", file=sys.stderr, flush=True)
                sys.stdout.flush()
                os._exit(130)
    return 0


def load(args):
    from transformers_minicpm4.edge.engine import EdgeEngine
    from transformers_minicpm4.edge.memory_plan import DoesNotFit
    from transformers_minicpm4.generation.drafts import PromptLookupDraft

    from .checkpoint import load_config, read_headers
    from .describe import context_length
    from .generate_edge import COMPILING, plan_line

    config = load_config(args.model)  # says in one sentence what is wrong with a name or a folder
    limit = context_length(config)
    if args.context is not None and args.context > limit:
        raise UserError(f"--context {args.context:,} is given and the model has {limit:,} positions; give fewer.")
    folder = Path(args.model).expanduser()
    if folder.is_dir():
        read_headers(folder)
    try:
        engine = EdgeEngine.from_pretrained(
            str(folder) if folder.is_dir() else args.model,
            context=args.context,
            precision=args.precision,
            draft=PromptLookupDraft() if args.draft else None,
            compile=False if args.no_compile else None,
        )
    except (DoesNotFit, OSError, ValueError) as error:
        raise UserError(one_line(error)) from error
    print(plan_line(engine.plan), file=sys.stderr)
    if engine.compiles:
        print(COMPILING, file=sys.stderr)
    return engine


def is_this_machine_alone(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
