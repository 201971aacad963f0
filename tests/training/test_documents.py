"""Sources of documents: tables, text files, folders, parallel files and named sets."""

import gzip
import sys
import types
import unicodedata

import pytest

pytest.importorskip("tokenizers", reason="needs the packages of fastattn[train]")
from fastattn.training.config import Columns
from fastattn.training.data.builtin import DOCSTRING_CLASSES
from fastattn.training.data.documents import Documents, write_documents
from fastattn.training.data.sources import read_documents
from fastattn.training.data.split import shared_texts
from fastattn.training.messages import UsageError

LABELLED = Columns(label="label")


def read_one(path, columns=None, **options):
    parts = read_documents(str(path), columns, **options)
    assert list(parts) == ["all"]
    return parts["all"]


def available(name):
    try:
        return read_documents(name)
    except UsageError as error:
        pytest.skip(str(error))


def test_tables_with_named_columns(tmp_path):
    (tmp_path / "a.csv").write_text('id,label,text\n1,good,"one, ""two""\nthree"\n2,bad,four\n')
    (tmp_path / "a.tsv").write_text('say "hi\tgood\nfour\tbad\n')
    (tmp_path / "a.jsonl").write_text('{"text": "one", "label": 1}\n\n{"label": 0, "text": "two"}\n')
    documents = read_one(tmp_path / "a.csv", LABELLED)
    assert documents == Documents(['one, "two"\nthree', "four"], labels=["good", "bad"])
    documents = read_one(tmp_path / "a.tsv", Columns(label="label", names=["text", "label"]))
    assert documents == Documents(['say "hi', "four"], labels=["good", "bad"])
    assert read_one(tmp_path / "a.jsonl", LABELLED) == Documents(["one", "two"], labels=["1", "0"])
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write((tmp_path / "a.jsonl").read_text())
    assert read_one(tmp_path / "b.jsonl.gz").texts == ["one", "two"]


def test_text_files_and_folders(tmp_path):
    (tmp_path / "b.txt").write_text("one\n\ntwo\nthree\n")
    assert read_one(tmp_path / "b.txt").texts == ["one", "two", "three"]
    assert read_one(tmp_path / "b.txt", unit="paragraph").texts == ["one", "two\nthree"]
    assert read_one(tmp_path / "b.txt", unit="file").texts == ["one\n\ntwo\nthree\n"]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.md").write_text("zero")
    assert read_one(tmp_path) == Documents(
        ["zero", "one", "two", "three"], groups=["a/z.md", "b.txt", "b.txt", "b.txt"]
    )


def test_parallel_files(tmp_path, capsys):
    (tmp_path / "a.en").write_text("one\n\nthree\n\nfive\n")
    (tmp_path / "a.de").write_text("eins\nzwei\ndrei\n\nfünf")
    documents = read_one(tmp_path / "a.en", target_source=str(tmp_path / "a.de"))
    assert documents == Documents(["one", "three", "five"], targets=["eins", "drei", "fünf"])
    assert "left out 2 of 5 pairs with an empty side, the first in line 2" in capsys.readouterr().err
    (tmp_path / "a.de").write_text("eins\nzwei\n")
    with pytest.raises(UsageError, match=r"a\.de' must have as many lines as '.*a\.en', got 2 and 5"):
        read_documents(str(tmp_path / "a.en"), target_source=str(tmp_path / "a.de"))


def test_what_is_written_is_read_again(tmp_path):
    documents = Documents(["ä\u2028", "b"], labels=["x", "y"], targets=["1", "2"])
    write_documents(tmp_path / "train.jsonl", documents)
    write_documents(tmp_path / "test.jsonl", documents.select([1]))
    columns = Columns(label="label", target="target")
    assert read_documents(str(tmp_path), columns) == {"train": documents, "test": documents.select([1])}


@pytest.mark.parametrize(
    ("name", "content", "columns", "message"),
    [
        ("a.csv", b"text\n", None, "has no documents"),
        ("a.csv", b"", None, "is empty"),
        ("a.csv", b"text,label\none,1\n", Columns(label="class"), "line 1: no column 'class' among text, label"),
        ("a.csv", b"text,label\none,1\ntwo,\n", LABELLED, "line 3: column 'label' is empty"),
        ("a.csv", b"text,label\none\n", LABELLED, r"line 2: the line must have 2 values \(text, label\), got 1"),
        ("a.csv", b"text,label\none, two,1\n", LABELLED, r"line 2: the line must have 2 values \(text, label\), got 3"),
        ("a.csv", b'text\n"one\n', None, "does not hold ','-separated values: unexpected end of data"),
        ("a.csv", b"text\ncaf\xe9\n", None, "is not UTF-8: byte 0xe9 at 8"),
        ("a.jsonl", b'{"text": "one"}\n{"text": \n', None, "line 2 is not valid JSON: Expecting value"),
        ("a.jsonl", b"[1]\n", None, "line 1 must be a JSON object, got list"),
        ("a.jsonl", b'{"text": null}\n', None, "line 1: column 'text' is empty"),
        ("a.txt", b"one\n", LABELLED, "is a text file: named columns need a table"),
        ("a.txt.gz", b"one\n", None, "is not valid gzip data: Not a gzipped file"),
    ],
)
def test_unusable_files(tmp_path, name, content, columns, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_documents(str(tmp_path / name), columns)


def test_unknown_source_lists_the_known_sets(tmp_path):
    with pytest.raises(UsageError, match=r"a folder, 'hf:NAME' nor one of clinc150, .*sst2"):
        read_documents(str(tmp_path / "nothing"))


def test_hugging_face_data_set(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "set")
    parts = read_documents(f"hf:{tmp_path / 'set'}", LABELLED)
    assert parts == {"train": Documents(["a", "b"], labels=["yes", "no"])}


class Rows(list):
    """A stand-in for a data set of the package `datasets`: a list of rows that can have an attribute `features`."""


def test_classes_and_messages_of_a_hugging_face_data_set(monkeypatch):
    names = types.SimpleNamespace(names=["no", "yes"])
    rows = Rows([{"text": "a", "label": [1, 0], "chat": [{"role": "assistant", "content": "x"}]}])
    package = types.SimpleNamespace(Dataset=Rows, load_dataset=lambda name: rows)
    monkeypatch.setitem(sys.modules, "datasets", package)
    for feature, kind, value, expected in (
        (names, "class", 1, "yes"),
        (types.SimpleNamespace(feature=names), "classes", [1, 0], ("no", "yes")),
        (None, "classes", ["b", "a"], ("a", "b")),
        (None, "number", 2.5, 2.5),
    ):
        rows.features, rows[0]["label"] = {"label": feature}, value
        documents = read_documents("hf:any", Columns(label="label", label_kind=kind))["all"]
        assert documents == Documents(["a"], labels=[expected])
    rows[0]["label"] = -1
    rows.features = {"label": names}
    with pytest.raises(UsageError, match="hf:any all, row 1: column 'label' is empty"):
        read_documents("hf:any", LABELLED)
    chats = read_documents("hf:any", Columns(messages="chat"))["all"].texts
    assert chats == ['[["assistant", "x"]]']


def test_hugging_face_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="needs the package 'datasets', which is not installed"):
        read_documents("hf:anything")


@pytest.mark.parametrize(
    ("name", "sizes", "classes"),
    [
        ("sst2", (6920, 872, 1821), 2),
        ("clinc150", (15000, 3000, 4500), 150),
        ("multi30k", (29000, 1014, 1000), 0),
        ("sms_spam", (5574,), 2),
        ("python_docs_es", (10545,), 0),
    ],
)
def test_named_sets(name, sizes, classes):
    parts = available(name)
    assert tuple(map(len, parts.values())) == sizes
    for documents in parts.values():
        assert len(set(documents.labels or ())) == classes
        assert (documents.targets is not None) == (classes == 0)


def test_docstrings_by_package():
    parts = read_documents("docstring_classes")
    assert not shared_texts(parts)
    assert all(set(part.labels) == set(DOCSTRING_CLASSES) for part in parts.values())
    texts = [text for part in parts.values() for text in part.texts]
    assert len(set(texts)) == len(texts) > 1000
    assert min(map(len, texts)) > 20
    assert set(texts) <= set(read_one("docstrings").texts)
    pretraining = set(read_one("docstring_text").texts)
    assert pretraining >= set(parts["train"].texts)
    assert not pretraining & {*parts["validation"].texts, *parts["test"].texts}


def test_hangul_holds_out_syllables():
    parts = read_documents("hangul")
    assert [len(part) for part in parts.values()] == [20000, 1000, 1000]
    assert not shared_texts(parts)
    syllables = {
        name: set("".join(unicodedata.normalize("NFC", text) for text in part.texts)) for name, part in parts.items()
    }
    assert not syllables["train"] & (syllables["validation"] | syllables["test"])
    assert len(set("".join(parts["train"].texts))) == 67
    texts, targets = parts["train"].texts, parts["train"].targets
    i = next(i for i, target in enumerate(targets) if "-" not in target)
    assert unicodedata.name(unicodedata.normalize("NFC", texts[i])) == f"HANGUL SYLLABLE {targets[i].upper()}"
