"""Messages to the user: errors and warnings, one line each."""

import difflib
import sys


class UsageError(ValueError):
    """A user's mistake, in one line: what was expected, and what was given."""


def expect(condition, name, expected, got):
    if not condition:
        raise UsageError(f"{name} must be {expected}, got {got!r}")


def did_you_mean(word, known, prefix=""):
    """The end of a message about an unknown word: "; did you mean ...?", or "" if none of the known is like it."""
    close = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def warn(message):
    print(f"fastattn: {message}", file=sys.stderr, flush=True)
