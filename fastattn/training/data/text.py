"""Sources of text: the reference prose of the standard library, a named set, a file or a folder."""

import hashlib
import os
from pathlib import Path

import fastattn

from ..files import user_path
from ..messages import UsageError
from .builtin import topics
from .reading import TABLES, read_file, suffix_of, visible_files


def read_text(source):
    """The text of a source.

    Args:
        source: "topics", "shakespeare", or the path of a UTF-8 text file or of a folder with such files; each may end
            in .gz.

    Returns:
        The text, lines ended by "\\n", without a byte order mark.

    Raises:
        UsageError: the source does not exist, is not readable, is a table, is not text, or is empty.
    """
    if source == "topics":
        return topics()
    if source == "shakespeare":
        return read_file(find_data("tinyshakespeare", "input.txt"))
    path = user_path(source)
    if not path.exists():
        raise UsageError(f"text source {source!r} is neither 'topics', 'shakespeare', a file nor a folder")
    if path.is_dir():
        return "\n".join(read_file(file) for file, _ in visible_files(path))
    if suffix_of(path) in TABLES:
        raise UsageError(f"text source {source!r} is a table, which a run without data.packed does not read")
    return read_file(path)


def split_text(text, validation_fraction, test_fraction):
    """Split a text by position into training, validation and test parts.

    Args:
        text: the whole text.
        validation_fraction, test_fraction: shares of its characters.

    Returns:
        {"train": the start, "validation": the middle, "test": the end}, together the whole text.
    """
    test_start = len(text) - int(len(text) * test_fraction)
    validation_start = int(len(text) * (1 - validation_fraction - test_fraction))
    return {
        "train": text[:validation_start],
        "validation": text[validation_start:test_start],
        "test": text[test_start:],
    }


def fingerprint(text):
    """The first 16 hexadecimal digits of the text's sha256, enough to detect a changed text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def find_data(*name):
    """The path of a file of a named set: in FASTATTN_DATA, the user's cache, or next to a checkout.

    Raises:
        UsageError: the file is in none of them.
    """
    name = Path(*name)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # Path.home() needs a user with a name
    checkout = Path(fastattn.__file__).resolve().parents[1]
    folders = [Path(cache, "fastattn"), checkout.parent / "shared" / "data"]
    if os.environ.get("FASTATTN_DATA"):
        folders.insert(0, Path(os.environ["FASTATTN_DATA"]))
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise UsageError(
        f"data {name.parts[0]!r}: {name} is in none of {', '.join(map(str, folders))}; "
        "set FASTATTN_DATA, name the file itself, or use 'topics', which needs no file"
    )


def check_summary(summary, expected):
    """Raise UsageError unless the summary is of the same data as `expected`, a summary or None."""
    if expected and expected["sha256"] != summary["sha256"]:
        raise UsageError(
            f"text {summary['source']!r} is not the text that this run was trained on: that one has "
            f"{expected['characters']} characters (sha256 {expected['sha256']}), this one {summary['characters']} "
            f"(sha256 {summary['sha256']})"
        )
