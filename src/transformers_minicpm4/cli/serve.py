"""`minicpm4 serve`: Transformers' own server, in a process that knows MiniCPM4."""

from .handover import hand_over


def register(subparsers) -> None:
    subparsers.add_parser(
        "serve", help="OpenAI-compatible server: `transformers serve` that knows MiniCPM4", add_help=False
    )


def run(args) -> int:
    make_architectures_known()
    return hand_over("serve", args.arguments)


def make_architectures_known() -> None:
    """
    Let the server find our classes.

    It loads a model by looking up the configuration's `architectures` entry as an attribute of the `transformers`
    module, not through the Auto classes. The Hub's older name is already translated by then, but not what else an
    older config.json says; the Auto class does that.
    """
    import transformers

    import transformers_minicpm4  # noqa: F401 - registers the architecture

    transformers.MiniCPM4ForCausalLM = transformers.AutoModelForCausalLM
