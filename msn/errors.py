"""`UserError`, the one exception that means "the person who typed this can fix it"."""


class UserError(ValueError):
    """A wrong key, value, path or file; one line says what is wrong and what is allowed.

    Commands print the message and exit with code 2. It is a `ValueError`, so callers of the Python
    API need not know it.
    """


def brief(error: Exception, most: int = 120) -> str:
    """The message of a library's error in one line of at most so many characters."""
    return " ".join(str(error).split())[:most] or type(error).__name__
