"""The one exception that reaches a user as a single line."""


class JaxsdError(Exception):
    """Something the user can mend: the message says what is wrong and what would be right.

    The command line prints it as one line and exits with 2; from Python it is an exception like
    any other.
    """
