"""The one exception that means "the person who typed this can fix it"."""


class UserError(ValueError):
    """A wrong key, value, path or file; one line says what is wrong and what is allowed.

    Commands print the message and exit with code 2. It is a `ValueError`, so callers of the Python
    API need not know it.
    """
