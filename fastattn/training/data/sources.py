"""Sources of documents: tables with named columns, text files, folders, parallel files and named sets."""

import csv
import gzip
import json
from pathlib import Path

from ..config import Columns
from ..messages import UsageError
from . import builtin
from .documents import PARTS, Documents
from .text import SUFFIXES, decode_text, find_data, read_bytes

TABLES = {".csv": ",", ".tsv": "\t"}


def read_documents(source, columns=None, *, target_source=None, unit="line"):
    """The documents of a source, as one list or in their published parts.

    Args:
        source: a .csv, .tsv or .jsonl file with named columns, a text file, a folder of text files (each may end in
            .gz), a folder with train.jsonl and optionally validation.jsonl and test.jsonl, "hf:NAME" (a data set of the
            `datasets` package), or a name of NAMED_SETS.
        columns: Columns of a table; default: only text.
        target_source: a second text file; its lines are the targets of the lines of source.
        unit: the document unit of a text file: "line", "paragraph" (between empty lines) or "file".

    Returns:
        {"all": Documents}, or the existing ones of "train", "validation" and "test".

    Raises:
        UsageError: the source does not exist, is not of the type that its name says, lacks a column or a value in some
            row, has parallel files of unequal length, or has no documents.
    """
    columns = columns or Columns()
    if target_source is not None:
        parts = {"all": _parallel(source, target_source)}
    elif source in NAMED_SETS:
        parts = NAMED_SETS[source]()
    elif source.startswith("hf:"):
        parts = _hugging_face(source.removeprefix("hf:"), columns)
    elif (folder := Path(source).expanduser()).joinpath("train.jsonl").is_file():
        files = {part: folder / f"{part}.jsonl" for part in PARTS}
        parts = {part: _read_path(file, columns, unit) for part, file in files.items() if file.exists()}
    else:
        parts = {"all": _read_path(folder, columns, unit)}
    if not any(map(len, parts.values())):
        raise UsageError(f"source {source!r} has no documents")
    return parts


def _content(path):
    """The text of a file, unpacked if its name ends in .gz."""
    content = read_bytes(path)
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError) as error:
            raise UsageError(f"file {str(path)!r} is not valid gzip data: {error}") from None
    return decode_text(content, path)


def _suffix(path):
    return path.with_suffix("").suffix.lower() if path.suffix == ".gz" else path.suffix.lower()


def _read_path(path, columns, unit):
    if not path.exists():
        raise UsageError(
            f"source {str(path)!r} is neither a file, a folder, 'hf:NAME' nor one of {', '.join(sorted(NAMED_SETS))}"
        )
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and _suffix(p) in SUFFIXES)
        if not files:
            raise UsageError(f"source {str(path)!r}: the folder has no files ending in {', '.join(SUFFIXES)}")
        texts, groups = [], []
        for file in files:
            pieces = _pieces(_content(file), unit)
            texts += pieces
            groups += [str(file.relative_to(path))] * len(pieces)
        return Documents(texts, groups=groups)
    if _suffix(path) in TABLES:
        return _table_documents(path, _table_rows(path, columns), columns)
    if _suffix(path) in (".jsonl", ".ndjson"):
        return _table_documents(path, _json_rows(path), columns)
    if columns.label or columns.target:
        wanted = ", ".join([*TABLES, ".jsonl"])
        raise UsageError(f"source {str(path)!r} is a text file: named columns need a table ({wanted})")
    return Documents(_pieces(_content(path), unit))


def _pieces(text, unit):
    if unit == "file":
        return [text]
    if unit == "paragraph":
        return [piece.strip("\n") for piece in text.split("\n\n") if piece.strip()]
    return [line for line in text.splitlines() if line.strip()]


def _table_rows(path, columns):
    delimiter = TABLES[_suffix(path)]
    # tab-separated files do not quote values: a quotation mark is an ordinary character there
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    lines = (line + "\n" for line in _content(path).split("\n"))
    limit = csv.field_size_limit(2**31 - 1)
    try:
        reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
        names = list(columns.names) or next(reader, [])
        for row in filter(None, reader):
            if len(row) > len(names):  # most likely a text with an unquoted delimiter
                raise UsageError(
                    f"{path}, line {reader.line_num}: the line must have {len(names)} values"
                    f" ({', '.join(names)}), got {len(row)}"
                )
            yield reader.line_num, dict(zip(names, row, strict=False))
    except csv.Error as error:
        raise UsageError(f"table {str(path)!r} does not hold {delimiter!r}-separated values: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _json_rows(path):
    for number, line in enumerate(_content(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{path}, line {number} is not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise UsageError(f"{path}, line {number} must be a JSON object, got {type(row).__name__}")
        yield number, row


def _table_documents(path, rows, columns):
    """rows: (line number, {column: value})."""
    wanted = {"texts": columns.text, "labels": columns.label, "targets": columns.target}
    wanted = {key: name for key, name in wanted.items() if name}
    collected = {key: [] for key in wanted}
    for number, row in rows:
        for key, name in wanted.items():
            value = row.get(name)
            if name not in row:
                raise UsageError(f"{path}, line {number}: no column {name!r} among {', '.join(map(str, row))}")
            if value is None or (key != "texts" and not str(value).strip()):
                raise UsageError(f"{path}, line {number}: column {name!r} is empty")
            collected[key].append(str(value))
    return Documents(**collected) if collected["texts"] else Documents([])


def _parallel(source, target_source):
    texts, targets = (_content(Path(path).expanduser()).split("\n") for path in (source, target_source))
    for lines in (texts, targets):
        if lines and not lines[-1]:
            lines.pop()
    if len(texts) != len(targets):
        raise UsageError(
            f"parallel files: {target_source!r} must have as many lines as {source!r}, got {len(targets)} and"
            f" {len(texts)}"
        )
    return Documents(texts, targets=targets)


def _hugging_face(name, columns):
    try:
        import datasets
    except ImportError:
        raise UsageError(f"source 'hf:{name}' needs the package 'datasets', which is not installed") from None
    try:
        path = Path(name).expanduser()
        loaded = datasets.load_from_disk(str(path)) if path.is_dir() else datasets.load_dataset(name)
    except Exception as error:  # the package raises many kinds
        raise UsageError(f"source 'hf:{name}' cannot be loaded: {type(error).__name__}: {error}") from None
    if isinstance(loaded, datasets.Dataset):
        loaded = {"all": loaded}
    parts = {}
    for part, rows in loaded.items():
        feature = rows.features.get(columns.label) if columns.label else None
        if names := getattr(feature, "names", None):  # classes are stored as numbers
            rows = ({**row, columns.label: names[row[columns.label]]} for row in rows)
        parts[part] = _table_documents(f"hf:{name} {part}", enumerate(rows, 1), columns)
    return parts


def _sst2():
    files = {"train": "train.tsv", "validation": "dev.tsv", "test": "test.tsv"}
    columns = Columns(label="label", names=["text", "label"])
    return {part: _read_path(find_data("sst2", file), columns, "line") for part, file in files.items()}


def _sms_spam():
    path = find_data("sms_spam", "SMSSpamCollection")
    rows = (line.partition("\t") for line in _content(path).split("\n")[1:] if line)
    labels, _, texts = zip(*rows, strict=True)
    return {"all": Documents(list(texts), labels=list(labels))}


def _clinc150():
    parts = json.loads(_content(find_data("clinc150", "data_full.json")))
    return {
        part: Documents(*map(list, zip(*parts[name], strict=True)))
        for part, name in (("train", "train"), ("validation", "val"), ("test", "test"))
    }


def _clinc150_text():
    """train: unlabelled Wikipedia sentences and the training questions; validation: the validation questions."""
    parts = _clinc150()
    sentences = [line.strip() for line in _content(find_data("clinc150", "all_wiki_sents.txt")).split("\n")]
    text = [*filter(None, sentences), *parts["train"].texts]
    return {"train": Documents(list(dict.fromkeys(text))), "validation": Documents(parts["validation"].texts)}


def _multi30k():
    files = {"train": "train", "validation": "val", "test": "test_2016_flickr"}
    folder = find_data("multi30k", "train.en.gz").parent
    return {part: _parallel(folder / f"{name}.en.gz", folder / f"{name}.de.gz") for part, name in files.items()}


def _python_docs_es():
    columns = Columns(target="target", names=["text", "target"])
    return {"all": _read_path(find_data("python_docs_es", "en-es.tsv.gz"), columns, "line")}


NAMED_SETS = {  # the first four come from Python's standard library
    "docstrings": builtin.docstrings,
    "docstring_text": builtin.docstring_text,
    "docstring_classes": builtin.docstring_classes,
    "hangul": builtin.hangul,
    "sst2": _sst2,
    "sms_spam": _sms_spam,
    "clinc150": _clinc150,
    "clinc150_text": _clinc150_text,
    "multi30k": _multi30k,
    "python_docs_es": _python_docs_es,
}


def resolve_source(source):
    """The source as stored with a run: names are kept, paths become absolute."""
    is_name = source in ("topics", "shakespeare", *NAMED_SETS) or source.startswith("hf:")
    return source if is_name else str(Path(source).expanduser().resolve())
