"""What a user is told: mistakes and warnings, one line each."""

import sys


class UsageError(ValueError):
    """A user's mistake, told in one line: what was expected, what came."""


def expect(condition, name, expected, got):
    if not condition:
        raise UsageError(f"{name}: expected {expected}, got {got!r}")


def warn(message):
    print(f"fastattn: {message}", file=sys.stderr, flush=True)
