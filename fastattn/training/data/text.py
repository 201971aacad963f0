"""Sources of text: the reference prose of the standard library, a named set, a file or a folder."""

import hashlib
import os
from pathlib import Path

import fastattn

from ..messages import UsageError
from .builtin import topics

SUFFIXES = (".txt", ".text", ".md", ".rst")  # of the files that are read from a folder


def read_text(source):
    """The text of a source.

    Args:
        source: "topics", "shakespeare", or the path of a UTF-8 text file or of a folder with such files.

    Returns:
        The text, lines ended by "\\n", without a byte order mark.

    Raises:
        UsageError: the source does not exist, is not readable, is not text, or is empty.
    """
    if source == "topics":
        return topics()
    if source == "shakespeare":
        return _read_file(find_data("tinyshakespeare", "input.txt"))
    path = Path(source).expanduser()
    if not path.exists():
        raise UsageError(f"text source {source!r} is neither 'topics', 'shakespeare', a file nor a folder")
    if not path.is_dir():
        return _read_file(path)
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise UsageError(f"text source {source!r}: the folder has no files ending in {', '.join(SUFFIXES)}")
    return "\n".join(_read_file(p) for p in files)


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
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
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


def read_bytes(path):
    """The bytes of a file; UsageError if it is not readable or has only white space."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"text file {str(path)!r} cannot be read: {error.strerror}") from None
    if not content.strip():
        raise UsageError(f"text file {str(path)!r} is empty")
    return content


def decode_text(content, path):
    """The bytes of the file `path` as text, lines ended by "\\n"; UsageError if they are not UTF-8."""
    if b"\0" in content:
        raise UsageError(f"text file {str(path)!r} is a binary file (zero at byte {content.index(0)})")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"text file {str(path)!r} is not UTF-8: byte 0x{content[error.start]:02x} at {error.start}"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_file(path):
    return decode_text(read_bytes(path), path)


def check_summary(summary, expected):
    """Raise UsageError unless the summary is of the same data as `expected`, a summary or None."""
    if expected and expected["sha256"] != summary["sha256"]:
        raise UsageError(
            f"text {summary['source']!r} is not the text that this run was trained on: that one has "
            f"{expected['characters']} characters (sha256 {expected['sha256']}), this one {summary['characters']} "
            f"(sha256 {summary['sha256']})"
        )
