"""Files that are whole or not there, and paths as a user writes them."""

import contextlib
import os
from pathlib import Path


@contextlib.contextmanager
def replacing(path):
    """Gives a binary file beside `path`, flushed to the disk and renamed at the end: the old one stays until then."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_atomic(path, content):
    """Write bytes or text; a reader of `path` finds the old content or all of the new."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync(folder):
    """The rename itself must reach the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def run_path(name):
    """The folder of a run as an absolute path, so that its parent is known even for a bare name."""
    return Path(name).expanduser().absolute()
