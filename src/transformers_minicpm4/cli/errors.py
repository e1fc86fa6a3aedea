"""What a command raises when its input, not its code, is at fault."""


class UserError(Exception):
    """One sentence for the person at the terminal: what was given, what is allowed, what to do."""


def one_line(error: BaseException) -> str:
    """The message of an error of another library, put on one line."""
    return " ".join(str(error).split()) or type(error).__name__
