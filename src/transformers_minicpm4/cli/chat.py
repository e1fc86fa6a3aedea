"""`minicpm4 chat`: Transformers' own chat window. It holds no model; it talks to a server such as `minicpm4 serve`."""

from .errors import UserError
from .handover import hand_over


def register(subparsers) -> None:
    subparsers.add_parser("chat", help="chat window for a running `minicpm4 serve`", add_help=False)


def run(args) -> int:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE and not {"-h", "--help"} & set(args.arguments):
        raise UserError(
            "HF_HUB_OFFLINE is set, and the client library then refuses every connection, even to a server on this "
            "machine; unset it for the chat window (the server itself may stay offline)."
        )
    return hand_over("chat", args.arguments)
