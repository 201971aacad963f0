"""Tables: rows of separated values and of JSON objects, and the documents in their columns.

A value is used as it is meant, or refused with its file, line and column. Nothing is guessed silently.
"""

import csv
import json
import math
from typing import NamedTuple

from ..config import Columns
from ..messages import UsageError
from .chat import read_messages
from .documents import Documents
from .reading import JsonObject, kind_of, suffix_of

SEPARATORS = {".csv": ",", ".tsv": "\t"}
_KINDS = {str: "text", bool: "true or false", int: "a whole number", float: "a number with a point"}


class Row(NamedTuple):
    """A row of a table: where it is, for messages, and its values by column."""

    where: str
    names: list
    values: list


def read_rows(path, text, columns):
    """Yield a Row for each row of a table.

    Args:
        path: of the file; its suffix names the format.
        text: its content, lines ended by "\\n".
        columns: Columns; names, delimiter and quoting are for separated values.

    Raises:
        UsageError: the content is not of this format, or a row has too many or too few values.
    """
    suffix = suffix_of(path)
    if suffix in SEPARATORS:
        return _separated_rows(path, text, columns)
    check_format(path, columns, ("names", "delimiter", "quoting"))
    if suffix == ".json" and text.lstrip().startswith("["):
        return _json_array(path, text)
    return _json_rows(path, text)


def check_format(path, columns, names):
    """Raise UsageError if one of these settings of other formats than that of the file is given."""
    for name in names:
        if getattr(columns, name) != getattr(Columns(), name):
            tables = "tables of text" if name == "encoding" else f"{' and '.join(SEPARATORS)} files"
            raise UsageError(f"columns.{name} is for {tables}, but the source is {str(path)!r}")


def _separated_rows(path, text, columns):
    delimiter = columns.delimiter or SEPARATORS[suffix_of(path)]
    quoted = columns.quoting == "csv" or (columns.quoting == "auto" and _is_quoted(path, text, delimiter))
    names, expected = list(columns.names), ""
    for line, values in _split(path, text, delimiter, quoted):
        where = f"{path}, line {line}"
        if not names:
            names = values
            check_columns(Row(where, names, []), columns, hint=True)
        elif len(values) != len(names):  # too many: most likely a text with an unquoted delimiter
            expected = expected or f"{len(names)} values ({', '.join(names)})"
            raise UsageError(f"{where}: the line must have {expected}, got {len(values)}")
        else:
            yield Row(where, names, values)


def _split(path, text, delimiter, quoted):
    """(number of the first line, values) of each row that is not blank."""
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    limit = csv.field_size_limit(2**31 - 1)
    try:
        reader, end = csv.reader(_lines(text), delimiter=delimiter, quoting=quoting, strict=True), 0
        for values in reader:
            if values:
                yield end + 1, values
            end = reader.line_num
    except csv.Error as error:
        raise UsageError(f"{path}, line {end + 1} does not hold {delimiter!r}-separated values: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _lines(text):
    return (line + "\n" for line in text.split("\n"))


def _is_quoted(path, text, delimiter):
    """Whether quotation marks enclose values, as in files of csv and pandas, or are part of them.

    Comma-separated values are always quoted. In others, a value that begins with a quotation mark decides.

    Raises:
        UsageError: the file can be read both ways.
    """
    if delimiter != "\t":
        return True
    if '"' not in text:
        return False
    raw = [(line, values) for line, values in _split(path, text, delimiter, False)]
    marked = [(line, value) for line, values in raw for value in values if value.startswith('"')]
    if not marked:
        return False
    try:
        quoted = [values for _, values in _split(path, text, delimiter, True)]
    except UsageError:
        return False
    if not _is_even(quoted):
        return False
    if not _is_even([values for _, values in raw]):
        return True
    # A writer that quotes only where it must doubles the marks inside. A writer that quotes all texts leaves none out.
    needed = [value == '""' or '""' in value[1:-1] for _, value in marked]
    if all(needed) or all(value.startswith('"') or _is_number(value) for _, values in raw for value in values):
        return True
    if not any(needed):
        return False
    line, value = marked[needed.index(False)]
    raise UsageError(
        f"{path}, line {line}: {value[:40]!r} may be quoted or begin with a quotation mark; "
        "set columns.quoting to csv or none"
    )


def _is_even(rows):
    return len(set(map(len, rows))) == 1


def _is_number(value):
    try:
        float(value or "0")
    except ValueError:
        return False
    return True


def _json_rows(path, text):
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield json_row(path, number, line)


def json_row(path, number, line):
    """The Row of a line of JSON; UsageError if the line is not valid JSON or not an object."""
    where = f"{path}, line {number}"
    return _object_row(where, _parse(where, line))


def _json_array(path, text):
    for number, value in enumerate(_parse(str(path), text), 1):
        yield _object_row(f"{path}, item {number}", value)


def _parse(where, text):
    try:
        return json.loads(text, object_pairs_hook=JsonObject)
    except RecursionError:
        raise UsageError(f"{where} is nested too deeply") from None
    except ValueError as error:
        raise UsageError(f"{where} is not valid JSON: {error}") from None


def _object_row(where, value):
    if not isinstance(value, JsonObject):
        raise UsageError(f"{where} must be a JSON object, got {type(value).__name__}")
    return Row(where, [name for name, _ in value], [item for _, item in value])


def columns_read(columns):
    """{field of Documents: name of the column} of what Columns reads."""
    if columns.messages is not None:
        return {"texts": columns.messages}
    read = {"texts": columns.text, "labels": columns.label, "targets": columns.target}
    read |= {"rejected": columns.rejected, "pairs": columns.pair}
    return {field: name for field, name in read.items() if name}


def check_columns(row, columns, hint=False):
    """Raise UsageError unless the row has each of the columns that are read exactly once."""
    for name in columns_read(columns).values():
        count = row.names.count(name)
        if count > 1:
            raise UsageError(f"{row.where}: the column {name!r} occurs {count} times")
        if not count:
            way_out = "; columns.names names those of a file without a header, columns.delimiter its delimiter"
            raise UsageError(
                f"{row.where}: no column {name!r} among {', '.join(map(str, row.names))}{way_out if hint else ''}"
            )


def table_documents(rows, columns):
    """The Documents of an iterable of Row, with the texts, labels and targets of Columns.

    Labels lose the white space at their ends.

    Raises:
        UsageError: a column is missing or occurs twice; a value is missing, not a single text or number, or half of a
            surrogate pair; labels have different types; a pair has an empty side.
    """
    wanted, first_label = columns_read(columns), None
    collected = {key: [] for key in wanted}
    for row in rows:
        check_columns(row, columns)
        for key, name in wanted.items():
            value, where = row.values[row.names.index(name)], f"{row.where}: column {name!r}"
            if key == "labels" and columns.label_kind == "classes":
                collected[key].append(_classes_of(value, columns.label_separator, where))
                continue
            text = _text_of(value if columns.messages is None else read_messages(value, where), where)
            if not text.strip() and (key != "texts" or "targets" in wanted):
                raise UsageError(f"{where} is empty")
            if key == "labels" and columns.label_kind == "number":
                text = _number_of(text, value, where)
            elif key == "labels":
                first_label = first_label or (value, row.where)
                text = _label_of(text, value, where, *first_label)
            collected[key].append(text)
    return Documents(**collected) if collected["texts"] else Documents([])


def _text_of(value, where):
    if value is None:
        raise UsageError(f"{where} is empty")
    if type(value) not in _KINDS:
        raise UsageError(f"{where} must be a text or a number, got {kind_of(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{where} must be a text or a number, got {value}")
    text = str(value)
    if not text.isascii() and (half := next((c for c in text if "\ud800" <= c <= "\udfff"), None)):
        raise UsageError(f"{where} has half of a surrogate pair, {half!a}, which is not text")
    return text


def _label_of(text, value, where, first, first_where):
    if type(value) is not type(first):
        kind, first_kind = _KINDS[type(value)], _KINDS[type(first)]
        raise UsageError(f"{where} is {value!r}, {kind}, but that of {first_where} is {first!r}, {first_kind}")
    if text.strip().lower() == "nan":
        raise UsageError(f"{where} is {text!r}, which stands for a missing value")
    return text.strip()


def _classes_of(value, separator, where):
    """The classes of a document as a sorted tuple, which may be empty: a list of JSON, or a text with separators."""
    items = value if isinstance(value, list) and not isinstance(value, JsonObject) else None
    if items is None:
        items = [part for part in _text_of(value, where).split(separator) if part.strip()]
    names = [_text_of(item, where).strip() for item in items]
    if not all(names):
        raise UsageError(f"{where} has an empty class")
    return tuple(sorted(set(names)))


def _number_of(text, value, where):
    try:
        number = float("nan" if isinstance(value, bool) or "_" in text else text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{where} must be a finite number, got {text!r}")
    return number


def looks_like_numbers(labels):
    """Whether labels are numbers to estimate (regression) rather than names of classes."""
    distinct = set(labels)
    try:
        numbers = [float(label) for label in distinct]
    except (ValueError, TypeError):  # a tuple of classes
        return False
    fractions = any(not number.is_integer() for number in numbers)
    return fractions and (len(distinct) > 11 or 4 * len(distinct) > len(labels))  # half-star ratings have 11 values
