"""Messages to the user: errors and warnings, one line each."""

import sys


class UsageError(ValueError):
    """A user's mistake, in one line: what was expected, and what was given."""


def expect(condition, name, expected, got):
    if not condition:
        raise UsageError(f"{name} must be {expected}, got {got!r}")


def warn(message):
    print(f"fastattn: {message}", file=sys.stderr, flush=True)
