"""Atomic writes of files, and the paths of runs."""

import contextlib
import os
import shutil
from pathlib import Path

from .messages import UsageError


@contextlib.contextmanager
def replacing(path):
    """Open a temporary binary file next to `path`; on success flush it to disk and rename it to `path`."""
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


@contextlib.contextmanager
def new_folder(path):
    """Make a folder to write into, which gets the name `path` when the block ends; after an error nothing is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(path.parent)


def write_atomic(path, content):
    """Write bytes or text; a reader of `path` sees either the old content or all of the new."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync(folder):
    """Flush a folder to disk, so that a rename in it is durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_place(path, what):
    """The resolved path of a folder to write; UsageError unless it can be created or, if it exists, written into.

    what: its name in messages.
    """
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as error:  # a link to itself
        raise UsageError(f"{what} {str(path)!r} cannot be created: {error}") from None
    nearest = next(folder for folder in (real, *real.parents) if folder.exists())
    if not nearest.is_dir():
        if nearest == real:
            raise UsageError(f"{what} {str(path)!r} is a file; name a new folder")
        raise UsageError(f"{what} {str(path)!r} cannot be created: {str(nearest)!r} is a file, not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        if nearest == real:
            raise UsageError(f"{what} {str(path)!r} is not writable; name another folder")
        raise UsageError(f"{what} {str(path)!r} cannot be created: the folder {str(nearest)!r} is not writable")
    return real


def run_path(name):
    """The folder of a run as an absolute path, so that its parent is known even for a bare name.

    Raises:
        UsageError: the name is empty, which would be the current folder, or cannot be a path.
    """
    if not str(name).strip():
        raise UsageError("the name of a folder must not be empty")
    path = user_path(name).absolute()
    return path.resolve() if ".." in path.parts else path  # a folder before the dots may not exist


def user_path(name):
    """A path as a user writes it, with ~ for a home folder; UsageError if it cannot be a path."""
    if "\0" in str(name):
        raise UsageError(f"a path must not have a zero character, got {str(name)!r}")
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise UsageError(f"path {str(name)!r}: there is no such user; write ./~ if a name begins with ~") from None
