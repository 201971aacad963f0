"""Parquet files and other encodings than UTF-8: the same documents as from a table of text, or one line."""

import json

import pytest

from fastattn.training.config import Columns
from fastattn.training.data.sources import read_documents
from fastattn.training.messages import UsageError

ROWS = [{"text": "größer", "label": "a", "target": "bigger"}, {"text": "kleiner ✓"[:7], "label": "b", "target": "less"}]


def test_parquet_is_read_as_json_lines_are(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {**row, "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]} for row in ROWS
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    for columns in (Columns(), Columns(label="label", target="target"), Columns(messages="messages")):
        documents = [read_documents(str(tmp_path / name), columns)["all"] for name in ("x.jsonl", "x.parquet")]
        assert documents[0] == documents[1]
    with pytest.raises(UsageError, match="no column 'body' among text, label"):
        read_documents(str(tmp_path / "x.parquet"), Columns(text="body"))
    parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "null.parquet")
    with pytest.raises(UsageError, match=r"row 2: column 'text' is empty"):
        read_documents(str(tmp_path / "null.parquet"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UsageError, match="is not a readable Parquet file"):
        read_documents(str(tmp_path / "bad.parquet"))
    times = pyarrow.array([2**62], pyarrow.timestamp("ns"))  # more digits than Python's own times have
    parquet.write_table(pyarrow.table({"text": times}), tmp_path / "times.parquet")
    with pytest.raises(UsageError, match=r"times\.parquet"):
        read_documents(str(tmp_path / "times.parquet"))
    for name, value in (("delimiter", ";"), ("names", ["text"]), ("quoting", "csv"), ("encoding", "latin-1")):
        with pytest.raises(UsageError, match=rf"columns\.{name} is for "):
            read_documents(str(tmp_path / "x.parquet"), Columns(**{name: value}))


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match="needs the package pyarrow: run pip install pyarrow"):
        read_documents(str(tmp_path / "x.parquet"))


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "cp1252", "utf-8-sig", "UTF-8"])
def test_a_table_in_another_encoding(tmp_path, encoding):
    text = "text,label\r\ngrößer,a\r\nkleiner,b\r\n"
    (tmp_path / "x.csv").write_bytes(text.encode(encoding))
    documents = read_documents(str(tmp_path / "x.csv"), Columns(label="label", encoding=encoding))["all"]
    assert (documents.texts, documents.labels) == (["größer", "kleiner"], ["a", "b"])


def test_wrong_encodings_are_one_line(tmp_path):
    for name in ("klingon", "base64"):
        with pytest.raises(UsageError, match=f"columns.encoding must be the name of an encoding, .* got '{name}"):
            Columns(encoding=name)
    (tmp_path / "x.csv").write_bytes("text\ngrößer\n".encode("latin-1"))
    with pytest.raises(UsageError, match="is not ascii: byte 0xf6 at 7"):
        read_documents(str(tmp_path / "x.csv"), Columns(encoding="ascii"))
    (tmp_path / "x.txt").write_text("a text")
    with pytest.raises(UsageError, match=r"columns\.encoding|named columns need a table"):
        read_documents(str(tmp_path / "x.txt"), Columns(encoding="latin-1"))
