"""What the tasks read: batches of documents, masks, packed rows, labels, targets; invalid data."""

import json

import numpy as np
import pytest

pytest.importorskip("lightning_fabric", reason="needs the packages of fastattn[train]")
import torch
from training_cases import WORDS, write_table

from fastattn.training.config import Columns, DataConfig, ModelConfig, TrainConfig
from fastattn.training.data.batches import IGNORED, LengthBatches, by_length, draw_masks, pad
from fastattn.training.data.documents import Documents
from fastattn.training.data.parts import limit_documents
from fastattn.training.messages import UsageError
from fastattn.training.tasks.registry import make_task


@pytest.fixture
def table(tmp_path):
    write_table(tmp_path / "table.jsonl")
    return tmp_path / "table.jsonl"


def config_for(task, source, *, batch_size=8, block_size=32, **data):
    columns = Columns(label="label", target="target")
    data = {"tokenizer": "word", "validation_fraction": 0.2, "test_fraction": 0.2, "columns": columns, **data}
    return TrainConfig(
        task=task, batch_size=batch_size, data=DataConfig(source=str(source), **data),
        model=ModelConfig(block_size=block_size),
    )  # fmt: skip


def test_an_epoch_reads_every_document_once_in_batches_of_like_length():
    lengths = np.random.default_rng(1).integers(1, 100, 103).tolist()
    batches = LengthBatches(lengths, 10, seed=3, batches_a_group=5)
    assert batches.batches_an_epoch == 10
    epochs = [np.concatenate([batches[10 * epoch + i] for i in range(10)]) for epoch in range(2)]
    for epoch in epochs:
        assert len(set(epoch.tolist())) == 100
    assert epochs[0].tolist() != epochs[1].tolist()
    spread = np.mean([np.ptp(np.take(lengths, batches[i])) for i in range(10)])
    assert spread < 35  # of 100: neighbours in a group of 50
    late = LengthBatches(lengths, 10, seed=3, batches_a_group=5)[17]
    assert late.tolist() == batches[17].tolist()  # a function of (seed, step)
    assert LengthBatches(lengths, 10, seed=4, batches_a_group=5)[17].tolist() != late.tolist()
    with pytest.raises(UsageError, match="batch_size must be at most 103, the training documents, got 104"):
        LengthBatches(lengths, 104, 0)


def test_every_document_is_evaluated_once_by_some_process():
    lengths = [5, 1, 4, 1, 3]
    assert list(by_length(lengths, 2)) == [[1, 3], [4, 2], [0]]
    assert [*by_length(lengths, 2, 0, 2), *by_length(lengths, 2, 1, 2)] == [[1, 3], [0], [4, 2]]


def test_masks_follow_the_recipe():
    lengths = torch.randint(3, 60, (300,), generator=torch.Generator().manual_seed(0))
    specials = [0, 1, 2, 3, 4]
    tokens = pad([[2, *range(10, 10 + n - 2), 3] for n in lengths.tolist()], 0)
    hidden, targets = draw_masks(tokens, lengths, specials, 4, 100, (7, 1))
    drawn = targets != IGNORED
    assert torch.equal(targets[drawn], tokens[drawn])
    assert not torch.isin(tokens[drawn], torch.tensor(specials)).any()
    assert (drawn.sum(1) == ((lengths - 2) * 0.15).round().clamp(min=1)).all()
    assert torch.equal(hidden[~drawn], tokens[~drawn])
    masked, same = (hidden[drawn] == 4).float().mean(), (hidden[drawn] == tokens[drawn]).float().mean()
    assert 0.75 < masked < 0.85
    assert 0.06 < same < 0.15
    assert not torch.isin(hidden[drawn], torch.tensor([0, 1, 2, 3])).any()
    again = draw_masks(tokens, lengths, specials, 4, 100, (7, 1))
    assert torch.equal(again[0], hidden)
    assert not torch.equal(draw_masks(tokens, lengths, specials, 4, 100, (7, 2))[0], hidden)


def test_limited_documents_keep_all_classes():
    documents = Documents([str(i) for i in range(90)], labels=["a"] * 60 + ["b"] * 20 + ["c"] * 10)
    chosen = limit_documents(documents, 12)
    assert [chosen.labels.count(label) for label in "abc"] == [4, 4, 4]
    assert limit_documents(documents, 12) == chosen
    assert len(limit_documents(documents, 1000)) == 90
    assert len(limit_documents(Documents(["x", "y"]), 1)) == 1


def test_classification_rows(table):
    task = make_task(config_for("classify", table))
    assert task.names == sorted(WORDS)
    assert task.sizes == {"train": "72 documents", "validation": "24 documents", "test": "24 documents"}
    tokens, lengths, classes = task.train_rows(5)
    assert tokens.shape == (8, lengths.max())
    for row, length, number in zip(tokens, lengths, classes, strict=True):
        text = task.tokenizer.decode(row[1 : length - 1].tolist())
        assert task.names[number] in text.split()
        assert [task.tokenizer.token_of(int(row[i])) for i in (0, length - 1)] == ["[CLS]", "[SEP]"]
        assert (row[length:] == task.specials["[PAD]"]).all()
    seen = [task.tokenizer.decode(row.tolist()) for rows in task.rows("test") for row in rows[0]]
    assert len(seen) == 24
    short = make_task(config_for("classify", table, block_size=5, train_limit=20))
    assert short.train_rows(0)[0].shape[1] == 5
    assert short.sizes["train"] == "20 documents"


def test_translation_rows(table):
    task = make_task(config_for("translate", table))
    source, lengths, target_in, target_out = task.train_rows(2)
    assert task.count((source, lengths, target_in, target_out)) == int((target_out != IGNORED).sum())
    for text, length, before, after in zip(source, lengths, target_in, target_out, strict=True):
        count = int((after != IGNORED).sum())
        assert after[:count].tolist() == [*before[1:count].tolist(), task.specials["[SEP]"]]
        assert before[0] == task.specials["[CLS]"]
        assert text[length - 1] == task.specials["[SEP]"]
        words = task.tokenizer.decode(text[: length - 1].tolist()).split()[1:]
        assert task.tokenizer.decode(after[: count - 1].tolist()).split() == words[::-1]


def test_masked_rows_cut_long_documents_and_change_every_epoch(table):
    task = make_task(config_for("masked_lm", table, block_size=6))
    tokens, lengths, targets = task.train_rows(0)
    assert tokens.shape[1] <= 6
    assert (lengths >= 3).all()
    assert (targets != IGNORED).any(1).all()
    words = sum(len(task.tokenizer.encode(text)) for text in task.parts["train"].texts)
    assert sum(len(example) - 2 for example in task.examples["train"]) == words
    first, second = (task.collate("train", [0, 1], (1, step)) for step in (0, 1))
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], second[0]) or not torch.equal(first[2], second[2])


def test_packed_rows_keep_documents_apart(table):
    task = make_task(config_for("lm", table, packed=True, block_size=16))
    rows = task.train_rows(4)
    tokens, targets, documents = rows
    end = task.tokenizer.number_of("[SEP]")
    last = documents[:, 1:] != documents[:, :-1]
    assert torch.equal(last, tokens[:, :-1] == end)
    assert (targets[:, :-1][last] == IGNORED).all()
    assert torch.equal(targets[:, :-1][~last], tokens[:, 1:][~last])
    _, _, _, cu_seqlens = task.inputs(rows)
    starts = set(cu_seqlens.tolist())
    assert {0, 16, 32, tokens.numel()} <= starts
    flat = documents.flatten()
    assert all((flat[i] != flat[i - 1]) == (i in starts) for i in range(1, len(flat)) if i % 16)
    assert task.count(rows) == int((targets != IGNORED).sum()) < targets.numel()


@pytest.mark.parametrize(
    ("task", "queries", "keys"),
    [
        ("lm", ["red", "blue"], ["red", "blue"]),
        ("masked_lm", ["[CLS]", "red", "blue", "[SEP]"], ["[CLS]", "red", "blue", "[SEP]"]),
        ("classify", ["[CLS]", "red", "blue", "[SEP]"], ["[CLS]", "red", "blue", "[SEP]"]),
        ("translate", None, ["red", "blue", "[SEP]"]),
    ],
)
def test_attention_of_a_text(table, task, queries, keys):
    config = config_for(task, table, packed=task == "lm")
    task = make_task(config)
    model = task.build_model(config, task.tokenizer, task.summary)
    weights, rows, columns = task.attention(model, "red blue")
    assert columns == keys
    assert rows == queries or (queries is None and rows[0] == "[CLS]")
    assert weights.shape == (4, len(rows), len(columns))
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))


def test_tokens_on_disk(table, tmp_path):
    from fastattn.training.data.prepare import SourceConfig, data_split, data_tokenize

    data_split(SourceConfig(str(table)), str(tmp_path / "split"))
    data_tokenize(SourceConfig(str(tmp_path / "split")), str(tmp_path / "tokens"), "byte")
    task = make_task(config_for("lm", tmp_path / "tokens", block_size=16))
    inputs, targets = task.train_rows(0)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    packed = make_task(config_for("lm", tmp_path / "tokens", block_size=16, packed=True))
    assert int(packed.ends["train"][-1]) == len(packed.splits["train"])
    (tmp_path / "tokens" / "validation.tokens").unlink()
    with pytest.raises(UsageError, match=r"there is no validation\.tokens next to train\.tokens"):
        make_task(config_for("lm", tmp_path / "tokens"))


@pytest.mark.parametrize(
    ("task", "rows", "expected"),
    [
        ("classify", [{"text": "a b"}], "no column 'label' among text"),
        ("classify", [{"text": f"a {i}", "label": "x"} for i in range(40)], "at least two classes, got only 'x'"),
        ("classify", [{"text": "a", "label": "x"}, {"text": "b", "label": ""}], "line 2: column 'label' is empty"),
        ("translate", [{"text": "a", "target": " "}], "line 1: column 'target' is empty"),
        ("classify", [{"text": f"a {i}", "label": "xy"[i % 2]} for i in range(9)], "batch_size must be at most"),
    ],
)
def test_bad_documents(tmp_path, task, rows, expected):
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = Columns(label="label") if task == "classify" else Columns(target="target")
    with pytest.raises(UsageError, match=expected):
        make_task(config_for(task, tmp_path / "bad.jsonl", columns=columns))


def test_labels_and_targets_must_be_there(table, tmp_path):
    with pytest.raises(UsageError, match="has no labels; name their column"):
        make_task(config_for("classify", table, columns=Columns()))
    with pytest.raises(UsageError, match="has no targets; name their column"):
        make_task(config_for("translate", table, columns=Columns()))
    folder = tmp_path / "parts"
    folder.mkdir()
    for part, labels in (("train", "xyxyxyxyxy"), ("validation", "xz")):
        rows = [{"text": f"{part} {i}", "label": label} for i, label in enumerate(labels)]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UsageError, match="class 'z' of the validation part is not in the training part"):
        make_task(config_for("classify", folder, columns=Columns(label="label")))
