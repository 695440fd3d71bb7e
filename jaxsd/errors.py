"""What reaches a user as a single line: one exception, and a warning."""


class JaxsdError(Exception):
    """Something the user can mend: the message says what is wrong and what would be right.

    The command line prints it as one line and exits with 2; from Python it is an exception like
    any other.
    """


class ReadFailed(JaxsdError):
    """A read that may succeed another time: the disk or the network failed, not the file."""


class Diverged(JaxsdError):
    """A model gives what is not finite: there is nothing to measure."""


class GuidanceClipped(UserWarning):
    """A guidance scale was beyond what the model was taught; the message says what was taken."""
