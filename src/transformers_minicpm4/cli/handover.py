"""Runs a command of Transformers' own command line in this process."""

from .errors import UserError, one_line


def hand_over(command: str, arguments: list[str]) -> int:
    """
    Run `transformers COMMAND ARGUMENTS` here, so that what this process registered is known to it.

    `app` is what Transformers' console script runs, after a look for updates over the network that we leave out.
    """
    from transformers.cli.transformers import app

    try:
        app([command, *arguments], prog_name="minicpm4")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except ImportError as error:
        raise UserError(
            f"`minicpm4 {command}` needs packages that are not installed; add them with "
            f"`pip install 'transformers[serving]'` ({one_line(error)})."
        ) from error
    except ValueError as error:
        if command == "chat" and "No server" in str(error):
            raise UserError(
                "No server answers at the given address (default http://localhost:8000); start one in another "
                "terminal with `minicpm4 serve MODEL`, or give its address: `minicpm4 chat MODEL URL`."
            ) from error
        raise UserError(one_line(error)) from error
    return 0
