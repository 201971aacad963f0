"""The texts of a source one after the other, so that a corpus may be larger than memory."""

import gzip
import io
import itertools
import zlib

from ..files import user_path
from ..messages import UsageError
from .parquet import read_parquet
from .reading import SUFFIXES, TABLES, paragraphs_of, read_file, suffix_of, visible_files
from .sources import check_path_settings, read_documents
from .tables import json_row, read_rows, table_documents

_ROWS = 1000  # the number of rows of a table that are checked together


def stream_texts(source, columns, unit="line"):
    """Yield the texts of a source, those of `read_documents` in its order.

    Only a part of a text file, .jsonl or .parquet is in memory at a time. Other tables, and files with the unit file,
    are read whole.

    Args:
        source: as for `read_documents`; of a folder, also its tables .jsonl and .parquet are read.
        columns: Columns.
        unit: "line", "paragraph" or "file".
    Raises:
        UsageError: as read_documents, once the faulty place is read.
    """
    path = user_path(source)
    if not path.exists() or (path / "train.jsonl").is_file():
        for part in read_documents(source, columns, unit=unit).values():
            yield from part.texts
        return
    files = [path]
    if path.is_dir():
        files = [file for file, _ in visible_files(path, (*SUFFIXES, ".jsonl", ".ndjson", ".parquet"))]
    for file in files:
        yield from _file_texts(file, columns, unit)


def up_to(texts, characters):
    """Yield texts until they have this many characters."""
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def _file_texts(path, columns, unit):
    suffix = suffix_of(path)
    check_path_settings(path, columns, unit)
    if suffix in TABLES:
        if suffix == ".parquet":
            rows = read_parquet(path, columns)
        elif suffix in (".jsonl", ".ndjson"):
            lines = enumerate(_lines(path, columns.encoding), 1)
            rows = (json_row(path, number, line) for number, line in lines if line.strip())
        else:
            rows = read_rows(path, read_file(path, columns.encoding), columns)
        while some := list(itertools.islice(rows, _ROWS)):
            yield from table_documents(some, columns).texts
    elif unit == "file":
        yield read_file(path)
    elif unit == "line":
        yield from (line for line in _lines(path) if line.strip())
    else:
        yield from paragraphs_of(_lines(path))


def _lines(path, encoding="utf-8"):
    """Yield the lines of a file without their ends. An error names the line after which it occurred."""
    number = 0
    try:
        with open(path, "rb") as raw:
            content = gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw
            for line in io.TextIOWrapper(content, encoding="utf-8-sig" if encoding == "utf-8" else encoding):
                number += 1
                if "\0" in line:
                    raise UsageError(f"text file {str(path)!r} is a binary file (a zero in line {number})")
                yield line.removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"text file {str(path)!r} is not {encoding.upper()} after line {number}: {error}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"file {str(path)!r} is not valid gzip data after line {number}: {error}") from None
    except OSError as error:
        raise UsageError(f"text file {str(path)!r} cannot be read: {error.strerror}") from None
