"""Rows of a Parquet file, with the package pyarrow."""

from ..messages import UsageError
from .reading import JsonObject
from .tables import Row, check_columns, check_format, columns_read


def read_parquet(path, columns):
    """Yield a Row for each row of a Parquet file; only the columns that are read are loaded.

    Raises:
        UsageError: the package is missing, the file is not Parquet, or a setting of other tables is given.
    """
    check_format(path, columns, ("names", "delimiter", "quoting", "encoding"))
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UsageError(f"source {str(path)!r} needs the package pyarrow: run pip install pyarrow") from None
    wanted = list(columns_read(columns).values())
    try:
        file = parquet.ParquetFile(path)
        check_columns(Row(str(path), list(file.schema_arrow.names), []), columns)
        number = 0
        for batch in file.iter_batches(columns=wanted):
            for values in batch.to_pylist():
                number += 1
                yield Row(f"{path}, row {number}", list(values), [as_json(value) for value in values.values()])
    except UsageError:
        raise
    except (ArrowException, OSError, ValueError) as error:  # ValueError: a time that Python cannot hold
        raise UsageError(f"source {str(path)!r} is not a readable Parquet file: {error}") from None


def as_json(value):
    """A value in the form of the JSON reader."""
    if isinstance(value, dict):
        return JsonObject((name, as_json(item)) for name, item in value.items())
    return [as_json(item) for item in value] if isinstance(value, list) else value
