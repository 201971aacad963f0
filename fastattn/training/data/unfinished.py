"""A folder that takes long to write: after an interruption, writing continues where it stopped."""

import contextlib
import fcntl
import json
import os
import shutil

from ..files import sync, user_path, write_atomic
from ..messages import UsageError

SUFFIX, SETTINGS = ".unfinished", "settings.json"


@contextlib.contextmanager
def unfinished_folder(path, settings):
    """Open a folder to write into, which gets the name `path` when the block ends.

    Until then its name is `path` with SUFFIX. After an interruption it stays, and the next call with the same settings
    opens it again. After a UsageError, which a repetition would raise again, it is removed.

    Args:
        path: Path that does not exist.
        settings: dict of everything that decides the content, in types that JSON can hold.
    Yields: Path of the folder.
    Raises:
        UsageError: the folder was begun with other settings, or another process writes into it.
    """
    folder = path.with_name(path.name + SUFFIX)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"another process writes into {str(folder)!r}") from None
        _open(folder, json.loads(json.dumps(settings)))
        try:
            yield folder
        except UsageError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        os.replace(folder, path)
        (path / SETTINGS).unlink()
        sync(path.parent)
    finally:
        os.close(lock)


def _open(folder, settings):
    """Write the settings into a new folder, or compare them with those of the folder."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()
    file = folder / SETTINGS
    if not file.is_file():
        if found := sorted(path.name for path in folder.iterdir()):
            raise UsageError(f"{str(folder)!r} must be empty or an unfinished output, but it holds {found[0]!r}")
        write_atomic(file, json.dumps(settings))
        return
    try:
        begun = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UsageError(f"{str(file)!r} is damaged: remove the folder") from None
    if other := [name for name, value in settings.items() if begun.get(name) != value]:
        raise UsageError(
            f"{str(folder)!r} was begun with other settings ({other[0]}): repeat the first command or remove the folder"
        )


def state_of_source(source):
    """[[path, bytes, time of change]] of the files of a source, to notice changes; [] if it is None or not a path."""
    if source is None:
        return []
    path = user_path(source)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path] * path.is_file()
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
