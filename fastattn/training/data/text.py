"""Where text comes from: the standard library's own reference prose, a named set, a file or a folder."""

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
        UsageError: nothing there, not readable, not text, or empty.
    """
    if source == "topics":
        return topics()
    if source == "shakespeare":
        return _read_file(find_data("tinyshakespeare", "input.txt"))
    path = Path(source).expanduser()
    if not path.exists():
        raise UsageError(f"text source: expected 'topics', 'shakespeare', a file or a folder, got no {source!r}")
    if not path.is_dir():
        return _read_file(path)
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise UsageError(f"text source: expected files ending in {', '.join(SUFFIXES)} in folder {source!r}, got none")
    return "\n".join(_read_file(p) for p in files)


def split_text(text, validation_fraction, test_fraction):
    """Cut a text by position into what to learn from, what to choose by and what to report on.

    Args:
        text: the whole text.
        validation_fraction, test_fraction: parts of it, counted in characters.

    Returns:
        {"train": first part, "validation": the part after it, "test": the end}, together the whole text.
    """
    test_start = len(text) - int(len(text) * test_fraction)
    validation_start = int(len(text) * (1 - validation_fraction - test_fraction))
    return {
        "train": text[:validation_start],
        "validation": text[validation_start:test_start],
        "test": text[test_start:],
    }


def fingerprint(text):
    """First 16 hexadecimal digits of the text's sha256, enough to notice another text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def find_data(*name):
    """The path of a file of a named set: in FASTATTN_DATA, the user's cache, or beside a checkout.

    Raises:
        UsageError: it is in none of them.
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
        f"data {name.parts[0]!r}: expected {name} in one of {', '.join(map(str, folders))}, got none; "
        "set FASTATTN_DATA, name the file itself, or use 'topics', which needs no file"
    )


def read_bytes(path):
    """The bytes of a file; UsageError if it is not readable or holds nothing but white space."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"text file {str(path)!r}: expected a readable file, got {error.strerror}") from None
    if not content.strip():
        raise UsageError(f"text file {str(path)!r}: expected text, got an empty file")
    return content


def decode_text(content, path):
    """Bytes of the file `path` as text, lines ended by "\\n"; UsageError if they are not UTF-8."""
    if b"\0" in content:
        raise UsageError(f"text file {str(path)!r}: expected text, got a binary file (zero at byte {content.index(0)})")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"text file {str(path)!r}: expected UTF-8, got byte 0x{content[error.start]:02x} at {error.start}"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_file(path):
    return decode_text(read_bytes(path), path)


def check_summary(summary, expected):
    """Raises UsageError unless the data with this summary are those of the summary `expected`, which may be None."""
    if expected and expected["sha256"] != summary["sha256"]:
        raise UsageError(
            f"text {summary['source']!r}: expected the {expected['characters']} characters this run was trained on "
            f"(sha256 {expected['sha256']}), got {summary['characters']} (sha256 {summary['sha256']})"
        )
