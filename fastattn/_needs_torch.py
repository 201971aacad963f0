"""Imports PyTorch before anything else; where that fails, the error names the command that helps."""

import os
import sys


def _is_the_command():
    """Whether this process is `fastattn ...` or `python -m fastattn ...`."""
    program = os.path.basename(sys.argv[0]) if sys.argv else ""
    return program == "fastattn" or (program == "-m" and "fastattn" in sys.orig_argv)


try:
    import torch  # noqa: F401
except (ImportError, OSError) as error:  # OSError: one of its libraries cannot be loaded
    absent = getattr(error, "name", None) == "torch"
    message = "PyTorch is missing: run pip install torch" if absent else f"PyTorch cannot be imported: {error}"
    if _is_the_command():
        print(f"fastattn: error: {message}", file=sys.stderr)
        raise SystemExit(2) from None
    raise ImportError(f"fastattn: {message}", name="torch") from error
