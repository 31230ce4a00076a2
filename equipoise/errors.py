"""The one error that speaks to the user. Invariants use `assert`; everything else is a bug and keeps its traceback."""


class UserError(ValueError):
    """Bad input, in one line: what was given, what was expected, what to do.

    The command line prints the message to standard error and exits with code 2; nothing has been overwritten.
    """


class LoneError(UserError):
    """What one of several processes met while it worked by itself, so that the others do not know of it."""


class NonFiniteError(RuntimeError):
    """A NaN or an infinity where only finite numbers belong; the message names the tensor or document."""


class LostProcess(RuntimeError):
    """Another process of the run has ended, so that this one cannot go on; nothing of what is on the disk is lost."""


LONGEST_NAME = 250
"""Characters that a message shows of a name."""


def brief(name: object) -> str:
    """A name or path for a message: of a very long one its beginning, and what cannot be shown as an escape."""
    shown = repr(str(name))[1:-1]
    return shown if len(shown) <= LONGEST_NAME else shown[: LONGEST_NAME - 1] + "…"
