"""Sources of documents: tables with named columns, text files, folders, parallel files and named sets."""

import json
from dataclasses import fields

from ..config import MIXTURE, Columns
from ..files import user_path
from ..messages import UsageError, warn
from . import builtin
from .documents import PARTS, Documents
from .parquet import as_json, read_parquet
from .reading import TABLES, lines_of, paragraphs_of, read_file, suffix_of, visible_files
from .tables import Row, read_rows, table_documents
from .text import find_data

_OF_HUGGING_FACE = ("text", "pair", "label", "label_kind", "label_separator", "target", "rejected", "messages")


def read_documents(source, columns=None, *, target_source=None, unit="line"):
    """The documents of a source, as one list or in their published parts.

    Args:
        source: a .csv, .tsv, .jsonl or .json file with named columns, a text file, a folder of text files (each may end
            in .gz), a folder with train.jsonl and optionally validation.jsonl and test.jsonl, "hf:NAME" (a data set of
            the `datasets` package), or a name of NAMED_SETS.
        columns: Columns of a table; default: only text.
        target_source: a second text file; its lines are the targets of the lines of source.
        unit: the document unit of a text file: "line", "paragraph" (between empty lines) or "file".

    Returns:
        {"all": Documents}, or the existing ones of "train", "validation" and "test".

    Raises:
        UsageError: the source does not exist, is not of the type that its name says, lacks a column or a value in some
            row, has parallel files of unequal length, or has no documents; an argument has no meaning for this source.
    """
    columns = columns or Columns()
    if target_source is not None:
        _refuse(f"with target_source, the lines of {source!r} are read", columns, unit)
        parts = {"all": _parallel(source, target_source)}
    elif source in NAMED_SETS:
        own = [name for name in ("label", "target", "rejected") if getattr(columns, name) in (None, name)]
        _refuse(f"the set {source!r} has the columns text, label, target and rejected", columns, unit, allowed=own)
        parts = NAMED_SETS[source]()
    elif source.startswith("hf:"):
        _refuse(f"source {source!r} has names of columns", columns, unit, allowed=_OF_HUGGING_FACE)
        parts = _hugging_face(source.removeprefix("hf:"), columns)
    elif (folder := user_path(source)).joinpath("train.jsonl").is_file():
        files = {part: folder / f"{part}.jsonl" for part in PARTS}
        parts = {part: _read_path(file, columns, unit) for part, file in files.items() if file.exists()}
    else:
        parts = {"all": _read_path(folder, columns, unit)}
    if not any(map(len, parts.values())):
        raise UsageError(f"source {source!r} has no documents")
    return parts


def _refuse(reason, columns, unit, allowed=()):
    """Raise UsageError if a setting that this kind of source does not read differs from its default."""
    defaults = Columns()
    for name in (field.name for field in fields(Columns)):
        value = getattr(columns, name)
        if name not in allowed and value != getattr(defaults, name):
            raise UsageError(f"{reason}; columns.{name} has no meaning here, got {value!r}")
    if unit != "line":
        raise UsageError(f"{reason}; unit has no meaning here, got {unit!r}")


def _read_path(path, columns, unit):
    if not path.exists():
        raise UsageError(
            f"source {str(path)!r} is neither a file, a folder, 'hf:NAME' nor one of {', '.join(sorted(NAMED_SETS))}"
        )
    check_path_settings(path, columns, unit)
    if path.is_dir() or suffix_of(path) not in TABLES:
        return _read_folder(path, unit) if path.is_dir() else Documents(_pieces(read_file(path), unit))
    if suffix_of(path) == ".parquet":
        return table_documents(read_parquet(path, columns), columns)
    return table_documents(read_rows(path, read_file(path, columns.encoding), columns), columns)


def check_path_settings(path, columns, unit):
    """Raise UsageError if a setting is given that a file or folder of this kind does not read."""
    if path.is_dir() or suffix_of(path) not in TABLES:
        kind = "a folder of text files" if path.is_dir() else "a text file"
        _refuse(f"source {str(path)!r} is {kind}: named columns need a table ({', '.join(TABLES)})", columns, "line")
    else:
        _refuse(f"source {str(path)!r} is a table", Columns(), unit)


def _read_folder(folder, unit):
    texts, groups = [], []
    for file, name in visible_files(folder):
        pieces = _pieces(read_file(file), unit)
        texts += pieces
        groups += [name] * len(pieces)
    return Documents(texts, groups=groups)


def _pieces(text, unit):
    if unit == "file":
        return [text]
    if unit == "paragraph":
        return list(paragraphs_of(lines_of(text)))
    return [line for line in lines_of(text) if line.strip()]


def _parallel(source, target_source):
    texts, targets = (lines_of(read_file(user_path(path))) for path in (source, target_source))
    if len(texts) != len(targets):
        raise UsageError(
            f"parallel files: {target_source!r} must have as many lines as {source!r}, got {len(targets)} and"
            f" {len(texts)}"
        )
    kept = [i for i, pair in enumerate(zip(texts, targets, strict=True)) if all(side.strip() for side in pair)]
    if empty := len(texts) - len(kept):
        first = next(i for i, number in enumerate([*kept, None]) if i != number)
        warn(f"{source}: left out {empty} of {len(texts)} pairs with an empty side, the first in line {first + 1}")
    return Documents(texts, targets=targets).select(kept)


def _hugging_face(name, columns):
    try:
        import datasets
    except ImportError:
        raise UsageError(f"source 'hf:{name}' needs the package 'datasets', which is not installed") from None
    try:
        path = user_path(name)
        loaded = datasets.load_from_disk(str(path)) if path.is_dir() else datasets.load_dataset(name)
    except Exception as error:  # the package raises many kinds
        raise UsageError(f"source 'hf:{name}' cannot be loaded: {type(error).__name__}: {error}") from None
    if isinstance(loaded, datasets.Dataset):
        loaded = {"all": loaded}
    return {
        part: table_documents(_hugging_face_rows(name, part, rows, columns), columns) for part, rows in loaded.items()
    }


def _hugging_face_rows(name, part, rows, columns):
    feature = rows.features.get(columns.label) if columns.label else None
    names = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)

    def named(value):  # classes are stored as numbers; -1 stands for a missing one
        if isinstance(value, list):
            return [named(item) for item in value]
        return names[value] if value is not None and value >= 0 else None

    for number, row in enumerate(rows, 1):
        values = [named(value) if names and key == columns.label else as_json(value) for key, value in row.items()]
        yield Row(f"hf:{name} {part}, row {number}", list(row), values)


def _sst2():
    files = {"train": "train.tsv", "validation": "dev.tsv", "test": "test.tsv"}
    columns = Columns(label="label", names=["text", "label"], quoting="none")
    return {part: _read_path(find_data("sst2", file), columns, "line") for part, file in files.items()}


def _sms_spam():
    path = find_data("sms_spam", "SMSSpamCollection")
    rows = (line.partition("\t") for line in read_file(path).split("\n")[1:] if line)
    labels, _, texts = zip(*rows, strict=True)
    return {"all": Documents(list(texts), labels=list(labels))}


def _clinc150():
    parts = json.loads(read_file(find_data("clinc150", "data_full.json")))
    return {
        part: Documents(*map(list, zip(*parts[name], strict=True)))
        for part, name in (("train", "train"), ("validation", "val"), ("test", "test"))
    }


def _clinc150_text():
    """train: unlabelled Wikipedia sentences and the training questions; validation: the validation questions."""
    parts = _clinc150()
    sentences = [line.strip() for line in read_file(find_data("clinc150", "all_wiki_sents.txt")).split("\n")]
    text = [*filter(None, sentences), *parts["train"].texts]
    return {"train": Documents(list(dict.fromkeys(text))), "validation": Documents(parts["validation"].texts)}


def _multi30k():
    files = {"train": "train", "validation": "val", "test": "test_2016_flickr"}
    folder = find_data("multi30k", "train.en.gz").parent
    return {part: _parallel(folder / f"{name}.en.gz", folder / f"{name}.de.gz") for part, name in files.items()}


def _python_docs_es():
    columns = Columns(target="target", names=["text", "target"], quoting="none")
    return {"all": _read_path(find_data("python_docs_es", "en-es.tsv.gz"), columns, "line")}


NAMED_SETS = {  # the first six come from Python's standard library
    "docstrings": builtin.docstrings,
    "docstring_text": builtin.docstring_text,
    "docstring_classes": builtin.docstring_classes,
    "hangul": builtin.hangul,
    "hangul_styles": builtin.hangul_styles,
    "hangul_preferences": builtin.hangul_preferences,
    "sst2": _sst2,
    "sms_spam": _sms_spam,
    "clinc150": _clinc150,
    "clinc150_text": _clinc150_text,
    "multi30k": _multi30k,
    "python_docs_es": _python_docs_es,
}


def resolve_source(source):
    """The source as stored with a run: names are kept, paths become absolute; UsageError if it is empty."""
    if not source.strip():  # as a path it would be the current folder
        raise UsageError("data.source must not be empty")
    is_name = source in ("topics", "shakespeare", MIXTURE, *NAMED_SETS) or source.startswith("hf:")
    return source if is_name else str(user_path(source).resolve())
