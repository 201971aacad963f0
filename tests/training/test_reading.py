"""Files to rows: what Python's csv, json and file iteration read, or one line that says why not; never a guess."""

import csv
import gzip
import io
import json
import random

import pytest

pytest.importorskip("tokenizers", reason="needs the packages of fastattn[train]")
pytest.importorskip("hypothesis", reason="needs the package hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

from fastattn.cli import main
from fastattn.training.config import Columns, DataConfig, TrainConfig
from fastattn.training.data.documents import Documents
from fastattn.training.data.reading import lines_of, read_file
from fastattn.training.data.sources import read_documents
from fastattn.training.data.text import read_text
from fastattn.training.data.windows import TextData
from fastattn.training.messages import UsageError

settings.register_profile("fastattn", max_examples=80, deadline=None, derandomize=True, database=None)
settings.load_profile("fastattn")

# every separator that str.splitlines knows, quotation marks and delimiters are as common as letters
SPECIAL = list("\n\"\t,;'\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\x1f \u00a0\ufeffàガ़😀")
LETTERS = st.one_of(st.sampled_from(SPECIAL), st.characters(exclude_categories=("Cs",), exclude_characters="\0\r"))
TEXTS = st.text(LETTERS, max_size=12)
LABELS = st.text(LETTERS, min_size=1, max_size=6).filter(lambda x: x.strip() and x.strip().lower() != "nan")
TABLES = st.lists(st.tuples(TEXTS, LABELS), min_size=1, max_size=6)
COLUMNS = Columns(label="label")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("reading")


def documents_of(path, columns=None, **options):
    return read_documents(str(path), columns, **options)["all"]


def read_or_reason(path, columns=None):
    """(documents, None), or (None, the message that says why the file is refused)."""
    try:
        return documents_of(path, columns), None
    except UsageError as error:
        return None, str(error)


def expected(rows):
    return Documents([text for text, _ in rows], labels=[label.strip() for _, label in rows])


def write(path, content):
    data = content.encode("utf-8")
    path.write_bytes(gzip.compress(data) if path.suffix.lower() == ".gz" else data)
    return path


@given(rows=TABLES, gz=st.booleans(), end=st.sampled_from(["\n", "\r\n"]), bom=st.booleans())
def test_separated_values_are_those_of_csv(folder, rows, gz, end, bom):
    content = io.StringIO(newline="")
    csv.writer(content, lineterminator=end).writerows([("text", "label"), *rows])
    path = write(folder / ("a.csv.gz" if gz else "a.csv"), "\ufeff" * bom + content.getvalue())
    assert documents_of(path, COLUMNS) == expected(rows)


@given(rows=TABLES, quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]))
def test_tabs_quoted_by_csv_are_read_or_refused(folder, rows, quoting):
    """Quoted as csv and pandas write it; `quoting` decides where the file can be read both ways."""
    content = io.StringIO(newline="")
    csv.writer(content, delimiter="\t", quoting=quoting, lineterminator="\n").writerows([("text", "label"), *rows])
    path = write(folder / "a.tsv", content.getvalue())
    assert documents_of(path, Columns(label="label", quoting="csv")) == expected(rows)
    documents, reason = read_or_reason(path, COLUMNS)
    assert documents == expected(rows) if reason is None else "set columns.quoting to csv or none" in reason


@given(rows=TABLES)
def test_tabs_without_quoting_keep_every_mark(folder, rows):
    rows = [tuple(cell.replace("\t", " ").replace("\n", " ") for cell in row) for row in rows]
    rows = [(text or "x", label if label.strip() else "y") for text, label in rows]
    path = write(folder / "b.tsv", "".join("\t".join(row) + "\n" for row in [("text", "label"), *rows]))
    assert documents_of(path, Columns(label="label", quoting="none")) == expected(rows)
    read, reason = read_or_reason(path, COLUMNS)
    if reason is not None:
        assert "set columns.quoting to csv or none" in reason
    else:  # a file that csv could have written is read as csv does
        quoted = list(csv.reader(io.StringIO(path.read_text("utf-8"), newline=""), delimiter="\t"))[1:]
        assert read in (expected(rows), expected([tuple(row) for row in quoted if row]))


@given(rows=TABLES, ascii=st.booleans(), gz=st.booleans(), suffix=st.sampled_from([".jsonl", ".ndjson", ".json"]))
def test_json_lines_are_those_of_json(folder, rows, ascii, gz, suffix):
    lines = [json.dumps({"id": i, "text": t, "label": c}, ensure_ascii=ascii) for i, (t, c) in enumerate(rows)]
    path = write(folder / f"a{suffix}{'.gz' if gz else ''}", "\n".join(lines))
    assert documents_of(path, COLUMNS) == expected(rows)


@given(rows=TABLES)
def test_a_json_array_is_a_table(folder, rows):
    path = write(folder / "array.json", json.dumps([{"text": t, "label": c} for t, c in rows], indent=1))
    assert documents_of(path, COLUMNS) == expected(rows)


@given(text=st.text(st.one_of(LETTERS, st.just("\r")), min_size=1, max_size=40), gz=st.booleans())
def test_lines_are_those_of_a_file(folder, text, gz):
    path = write(folder / ("a.txt.gz" if gz else "a.txt"), "x" + text)
    plain = write(folder / "plain.txt", "x" + text)
    with open(plain, encoding="utf-8") as file:
        lines = [line.removesuffix("\n") for line in file]
    assert lines_of(read_file(path)) == lines
    assert documents_of(path).texts == [line for line in lines if line.strip()]
    assert read_text(str(path)) == plain.read_text("utf-8")
    paragraphs = documents_of(path, unit="paragraph").texts
    assert "\n".join(paragraphs).split() == " ".join(lines).split()
    assert not any(line.strip() == "" for piece in paragraphs for line in piece.split("\n"))


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.just("\ud800")),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=4,
)


@given(rows=st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=4))
def test_any_json_value_is_used_as_it_is_or_refused_with_its_line(folder, rows):
    path = folder / "values.jsonl"
    path.write_text("".join(json.dumps({"text": t, "label": c}) + "\n" for t, c in rows))
    documents, reason = read_or_reason(path, COLUMNS)
    if reason is not None:
        assert reason.startswith(f"{path}, line ")
        assert "column" in reason
    else:
        assert documents.texts == [str(text) for text, _ in rows]
        assert documents.labels == [str(label).strip() for _, label in rows]
        assert len({type(label) for _, label in rows}) == 1
        "".join([*documents.texts, *documents.labels]).encode()  # no lone surrogate


@given(data=st.data())
def test_damaged_archives_and_bytes_end_in_one_line(folder, data):
    content = gzip.compress(b"text,label\n" + b"".join(b"row %d,a\n" % i for i in range(300)))
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 20))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    del damaged[data.draw(st.integers(1, len(damaged))) :]
    path = folder / "damaged.csv.gz"
    path.write_bytes(damaged)
    documents, reason = read_or_reason(path, COLUMNS)
    if reason is not None:
        assert str(path) in reason
    else:  # only the header of the archive was damaged
        assert documents.texts == [f"row {i}" for i in range(300)]


@given(content=st.binary(min_size=1, max_size=60), suffix=st.sampled_from([".csv", ".tsv", ".jsonl", ".json", ".txt"]))
def test_any_bytes_are_read_or_refused(folder, content, suffix):
    path = folder / f"bytes{suffix}"
    path.write_bytes(content)
    documents, reason = read_or_reason(path)
    if reason is not None:
        assert f"bytes{suffix}" in reason
    else:
        "".join(documents.texts).encode()  # no lone surrogate


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        ("a.csv", "text,label,text\na,b,c\n", COLUMNS, "line 1: the column 'text' occurs 2 times"),
        ("a.jsonl", '{"text": "a"}\n{"text": "a", "text": "b"}\n', None, "line 2: the column 'text' occurs 2 times"),
        ("a.json", '[{"text": "a"}, {"text": "a", "text": "b"}]', None, "item 2: the column 'text' occurs 2 times"),
        ("a.jsonl", '{"text": ["a"]}', None, "line 1: column 'text' must be a text or a number, got a list"),
        ("a.jsonl", '{"text": {"a": 1}}', None, "line 1: column 'text' must be a text or a number, got an object"),
        ("a.jsonl", '{"text": NaN}', None, "line 1: column 'text' must be a text or a number, got nan"),
        ("a.jsonl", '{"text": "b\\ud800d"}', None, r"line 1: column 'text' has half of a surrogate pair, '\\ud800'"),
        ("a.jsonl", "[" * 100_000, None, "line 1 is nested too deeply"),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n{"text": "b", "label": "1"}\n',
            COLUMNS,
            "line 2: column 'label' is '1', text, but that of .*line 1 is 1, a whole number",
        ),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": true}\n', COLUMNS, "True, true or false, but"),
        ("a.csv", "text,label\na,NaN\n", COLUMNS, "line 2: column 'label' is 'NaN', which stands for a missing value"),
        ("a.csv", "id,text,label\n1,a,x\n2\n", COLUMNS, r"line 3: .* 3 values \(id, text, label\), got 1"),
        ("a.csv", 'text,label\n"a\nb",x\n"c\n', COLUMNS, "line 4 does not hold ','-separated values"),
        ("a.csv", "good film,pos\nbad,neg\n", None, "line 1: no column 'text' among good film, pos; columns.names"),
        ("a.csv", "text,target\n a,b\n ,c\n", Columns(target="target"), "line 3: column 'text' is empty"),
        ("a.tsv", 'text\tlabel\n"a ""b"\tx\n"c"\ty\n', COLUMNS, "line 3: '\"c\"' may be quoted or begin with"),
    ],
)
def test_what_has_no_single_meaning_is_refused(tmp_path, name, content, columns, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message):
        documents_of(tmp_path / name, columns)


def test_hidden_and_empty_files_are_no_documents(tmp_path, capsys):
    for name in ("a.txt", ".b.txt", ".git/c.md", "d/e.txt", "d/.f/g.txt", "d/.h.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "d" / "empty.txt").write_text(" \n")
    write(tmp_path / "d" / "empty.txt.gz", "\n")
    write(tmp_path / "z.TXT.GZ", "packed")
    assert documents_of(tmp_path).texts == ["a.txt", "d/e.txt", "packed"]
    assert "left out 2 of 5 files, which are empty" in capsys.readouterr().err
    assert read_text(str(tmp_path)) == "a.txt\nd/e.txt\npacked"
    assert documents_of(tmp_path / ".git").texts == [".git/c.md"]  # named by the user


def test_pairs_with_an_empty_side_are_left_out(tmp_path):
    random.seed(3)
    pairs = [tuple(random.choice(["", " ", "a", "b\u2028c"]) for _ in range(2)) for _ in range(60)]
    for name, side in zip(("a.en", "a.de"), zip(*pairs, strict=True), strict=True):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in side))
    documents = documents_of(tmp_path / "a.en", target_source=str(tmp_path / "a.de"))
    kept = list(zip(documents.texts, documents.targets, strict=True))
    assert kept == [pair for pair in pairs if all(side.strip() for side in pair)]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.txt", {"columns": Columns(text="body")}, "is a text file: .*columns.text has no meaning here, got 'body'"),
        (".", {"columns": Columns(label="label")}, "is a folder of text files: .*columns.label has no meaning"),
        ("a.jsonl", {"unit": "paragraph"}, "is a table; unit has no meaning here, got 'paragraph'"),
        ("a.jsonl", {"columns": Columns(names=["text"])}, r"columns.names is for \.csv and \.tsv files"),
        ("a.txt", {"target_source": "b.txt", "unit": "file"}, "the lines of .* are read; unit has no meaning"),
        ("sst2", {"columns": Columns(text="body")}, "the set 'sst2' has .*columns.text has no meaning here"),
    ],
)
def test_settings_without_a_meaning_are_refused(tmp_path, name, options, message):
    (tmp_path / "a.txt").write_text("a\n")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UsageError, match=message):
        read_documents(name if name == "sst2" else str(tmp_path / name), **options)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": "classify", "validation_windows": 3}, "validation_windows must be null for the task classify"),
        ({"task": "classify", "data": DataConfig(packed=True)}, "data.packed must be false for the task classify"),
    ],
)
def test_options_that_a_task_does_not_read_are_refused(values, message):
    with pytest.raises(UsageError, match=message):
        TrainConfig(**values)
    with pytest.raises(UsageError, match=r"columns\.names must be without repeated names"):
        Columns(names=["text", "label", "text"])


@pytest.mark.parametrize(
    "data", [{"columns": Columns(text="body")}, {"columns": Columns(label="label")}, {"unit": "paragraph"}]
)
def test_settings_of_documents_are_refused_for_a_text(data):
    with pytest.raises(
        UsageError, match=r"data\.[\w.]+ must be left out for a text; --data\.packed true reads documents"
    ):
        TextData(DataConfig(**data))


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl.gz", "t.json"])
def test_a_table_is_no_plain_text(tmp_path, name):
    write(tmp_path / name, "text,label\na,b\n")
    with pytest.raises(UsageError, match=r"is a table, which a run without data\.packed does not read"):
        read_text(str(tmp_path / name))


def test_nothing_is_left_of_a_failed_command(tmp_path, capsys, monkeypatch):
    write(tmp_path / "a.jsonl", "".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(40)))
    split = ["data", "split", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "out" / "split")]

    def refuse(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fastattn.training.data.prepare.write_documents", refuse)
        assert main(split) == 2
    assert list((tmp_path / "out").iterdir()) == []
    assert main(split) == 0
    capsys.readouterr()
    assert main(["data", "stats", "bad \udcff"]) == 2
    assert "argument 3 is not UTF-8 text" in capsys.readouterr().err
