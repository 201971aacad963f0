"""Files as text: the only place that unpacks, decodes and lists the files of a source."""

import gzip
import itertools
import os
import zlib

from ..messages import UsageError, warn

SUFFIXES = (".txt", ".text", ".md", ".rst")  # the files that are read from a folder, each also with .gz
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")


class JsonObject(list):
    """A JSON object as its pairs, so that a repeated key is not lost."""


def kind_of(value):
    """What a value of JSON is, for messages."""
    return "an object" if isinstance(value, JsonObject) else f"a {type(value).__name__}"


def suffix_of(path):
    """The suffix of a file in lower case, without .gz."""
    suffix = path.suffix.lower()
    return path.with_suffix("").suffix.lower() if suffix == ".gz" else suffix


def read_file(path, encoding="utf-8"):
    """The text of a file, unpacked if its name ends in .gz, lines ended by "\\n", without a byte order mark.

    Raises:
        UsageError: the file is not readable, damaged, not in this encoding, or has only white space.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"text file {str(path)!r} cannot be read: {error.strerror}") from None
    if path.suffix.lower() == ".gz" and content:
        content = _unpack(content, path)
    if not content.strip():
        raise UsageError(f"text file {str(path)!r} is empty")
    return decode_text(content, path, encoding)


def _unpack(content, path):
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"file {str(path)!r} is not valid gzip data: {error}") from None


def decode_text(content, path, encoding="utf-8"):
    """Bytes as text, lines ended by "\\n"; UsageError, which names `path`, unless they are in this encoding."""
    if encoding != "utf-8":
        return _decode_other(content, path, encoding)
    if b"\0" in content:
        raise UsageError(f"text file {str(path)!r} is a binary file (zero at byte {content.index(0)})")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"text file {str(path)!r} is not UTF-8: byte 0x{content[error.start]:02x} at {error.start}, line {line}"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _decode_other(content, path, encoding):
    try:
        text = content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"text file {str(path)!r} is not {encoding}: byte 0x{content[error.start]:02x} at {error.start}"
        ) from None
    if "\0" in text:
        raise UsageError(f"text file {str(path)!r} is a binary file, or not {encoding} (a character is zero)")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def lines_of(text):
    """The lines of a text of `read_file`. Only "\\n" ends a line, not the other separators of str.splitlines."""
    return text.removesuffix("\n").split("\n") if text else []


def paragraphs_of(lines):
    """Yield the paragraphs of an iterable of lines, which end at a line without text."""
    for blank, group in itertools.groupby(lines, lambda line: not line.strip()):
        if not blank:
            yield "\n".join(group)


def visible_files(folder, suffixes=SUFFIXES):
    """[(path, name of the file within the folder)] of the files of a folder and its subfolders with these suffixes.

    Hidden files and folders, whose names begin with a dot, do not count. Empty files are left out with a warning.

    Raises:
        UsageError: there is no such file.
    """
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if suffix_of(path) in suffixes
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    ]
    if not found:
        endings = ", ".join(suffixes)
        raise UsageError(
            f"source {str(folder)!r}: the folder has no files ending in {endings} (hidden ones do not count)"
        )
    files = [path for path in found if not _is_empty(path)]
    if not files:
        raise UsageError(f"source {str(folder)!r}: the folder has only empty files")
    if empty := len(found) - len(files):
        warn(f"folder {str(folder)!r}: left out {empty} of {len(found)} files, which are empty")
    # a name may have bytes that are not UTF-8
    return [(path, os.fsencode(path.relative_to(folder)).decode("utf-8", "backslashreplace")) for path in files]


def _is_empty(path):
    try:
        with open(path, "rb") as file:
            content = file.read(4096)
        size = path.stat().st_size
    except OSError:
        return False  # reading it reports why
    if path.suffix.lower() == ".gz" and content and size < 4096:
        content = _unpack(content, path)
    return size < 4096 and not content.strip()
