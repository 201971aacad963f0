"""Documents on their way to tokens: cleaning, splits, tokenizers, vectors, token files, and the data command."""

import argparse
import gzip
import inspect
import json
import math

import pytest

pytest.importorskip("tokenizers", reason="needs the packages of fastattn[train]")
import torch

from fastattn.cli import main
from fastattn.training.config import DataConfig
from fastattn.training.data.clean import CleanConfig, clean
from fastattn.training.data.documents import Documents
from fastattn.training.data.sources import read_documents
from fastattn.training.data.split import shared_texts, split_documents
from fastattn.training.data.token_file import open_tokens, write_tokens
from fastattn.training.data.tokenizer import KINDS, SPECIALS, build_tokenizer, load_tokenizer
from fastattn.training.data.windows import TextData
from fastattn.training.messages import UsageError


@pytest.mark.parametrize(
    ("options", "text", "expected"),
    [
        ({}, "cafe\u0301", "café"),
        ({"normalization": None}, "cafe\u0301", "cafe\u0301"),
        ({"normalization": "NFKC"}, "\ufb01ne", "fine"),
        ({}, "a\x00b\x1b[1m\tc\u200bd\ufeff\u00ade", "ab[1m cde"),
        ({}, "می\u200cخواهم", "می\u200cخواهم"),  # a joiner is part of the spelling
        ({}, "  a \u00a0 b\t\n\n \n\n c  ", "a b\n\nc"),
        ({"whitespace": False}, " a  b ", " a  b "),
        ({"lowercase": True}, "ÄB", "äb"),
        ({"markup": True}, "<p>a &lt; b<br>c</p><script>x < y</script><!-- no --><b>d</b>e", "a < b\nc\n\nde"),
        ({"markup": True}, "a < b &amp; c", "a < b & c"),
        ({}, "<p>a</p>", "<p>a</p>"),
    ],
)
def test_cleaning_of_a_text(options, text, expected):
    result, _ = clean(Documents([text]), CleanConfig(**options))
    assert result.texts == [expected]


def test_cleaning_reports_what_it_removed():
    documents = Documents(["a  b", "a b", "c", "dddd dddd", "a b", ""], labels=list("xxyyyx"))
    result, report = clean(documents, CleanConfig(min_characters=1, max_characters=5))
    assert result == Documents(["a b", "c"], labels=["x", "y"])
    assert documents.texts[0] == "a  b"
    assert report["removed"] == {"too short": 1, "too long": 1, "duplicate": 2}
    assert report["duplicates with another label"] == 1
    assert report["changed by"] == {"normalization": 0, "control": 0, "whitespace": 1}
    assert (report["documents"], report["characters"]) == ({"before": 6, "after": 2}, {"before": 20, "after": 4})


def test_cleaning_of_pairs_looks_at_both_sides():
    documents = Documents(["a", "a", "a", "b"], targets=["x", " x", "y", ""])
    result, report = clean(documents)
    assert result == Documents(["a", "a"], targets=["x", "y"])
    assert report["removed"] == {"too short": 1, "too long": 0, "duplicate": 1}


def test_split_is_seeded_stratified_and_complete():
    texts = [str(i) for i in range(1000)]
    documents = Documents(texts, labels=["rare" if i % 10 == 0 else "common" for i in range(1000)])
    parts = split_documents(documents, 0.1, 0.2, seed=3)
    assert {name: len(part) for name, part in parts.items()} == {"train": 700, "validation": 100, "test": 200}
    assert {name: part.labels.count("rare") for name, part in parts.items()} == {
        "train": 70, "validation": 10, "test": 20
    }  # fmt: skip
    assert sorted((text for part in parts.values() for text in part.texts), key=int) == texts
    assert parts == split_documents(documents, 0.1, 0.2, seed=3)
    assert parts != split_documents(documents, 0.1, 0.2, seed=4)
    assert list(split_documents(documents, 0.1, 0.0, seed=0)) == ["train", "validation"]


def test_small_classes_keep_the_fractions_together():
    documents = Documents([str(i) for i in range(450)], labels=[str(i // 3) for i in range(450)])
    sizes = {name: len(part) for name, part in split_documents(documents, 0.1, 0.1, seed=0).items()}
    assert sizes == {"train": 360, "validation": 45, "test": 45}


def test_no_text_and_no_group_is_in_two_parts():
    texts = [f"text {i % 120}" for i in range(400)]
    parts = split_documents(Documents(texts), 0.2, 0.2, seed=0)
    assert sum(map(len, parts.values())) == 400
    assert not shared_texts(parts)
    groups = [f"file {i // 7}" for i in range(400)]
    parts = split_documents(Documents([str(i) for i in range(400)], groups=groups), 0.2, 0.2, seed=0)
    files = [set(part.groups) for part in parts.values()]
    assert not files[0] & files[1] | files[0] & files[2] | files[1] & files[2]


def test_split_without_documents_for_a_part():
    with pytest.raises(UsageError, match="2 documents are too few: the validation part would be empty"):
        split_documents(Documents(["a", "b"]), 0.1, 0.1, seed=0)


def test_shared_texts_are_counted():
    parts = {"train": Documents(["a", "b"]), "test": Documents(["b", "b", "c"])}
    assert shared_texts(parts) == {("train", "test"): 2}


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_with_special_tokens(tmp_path, kind):
    texts = ["The cat sat on the mat.", "the dog sat.", "Cats and dogs"] * 3
    tokenizer = build_tokenizer(kind, texts, texts, 300, SPECIALS)
    assert [tokenizer.number_of(name) for name in SPECIALS] == [0, 1, 2, 3, 4]
    assert [tokenizer.token_of(number) for number in range(5)] == list(SPECIALS)
    assert tokenizer.number_of("[NONE]") is None
    numbers = tokenizer.encode("the cat sat.")
    assert 5 <= min(numbers) <= max(numbers) < tokenizer.vocab_size
    plain = "the cat sat ." if kind == "word" else "the cat sat."
    assert tokenizer.decode([2, *numbers, 3, 0]) == plain
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json())
    loaded = load_tokenizer(path)
    assert loaded.encode("the cat sat.") == numbers
    assert loaded.decode([2, *numbers, 3, 0]) == plain
    assert loaded.number_of("[MASK]") == 4
    unseen = tokenizer.encode("ж")
    assert unseen == [1] if kind in ("char", "word", "wordpiece") else tokenizer.decode(unseen) == "ж"


@pytest.mark.parametrize("kind", ["word", "bpe", "wordpiece"])
def test_equal_texts_give_equal_tokens(kind):
    texts = [inspect.getsource(module)[:8000] for module in (argparse, gzip, inspect, json)]
    tokenizers = [build_tokenizer(kind, texts, iter(texts), 400, SPECIALS) for _ in range(3)]
    assert len({tokenizer.to_json() for tokenizer in tokenizers}) == 1
    assert tokenizers[0].vocab_size == 400
    assert set(tokenizers[0].specials) == set(SPECIALS)


@pytest.mark.parametrize("kind", ["word", "wordpiece"])
def test_a_plain_text_may_have_words_for_tokens(tmp_path, kind):
    path = tmp_path / "a.txt"
    path.write_text("the cat sat on the mat\n" * 30 + "a dog\n" * 20)
    data = TextData(DataConfig(source=str(path), tokenizer=kind, vocab_size=300, test_fraction=0.2))
    assert data.tokenizer.decode(data.splits["train"][:6].tolist()) == "the cat sat on the mat"
    assert data.tokenizer.number_of("[UNK]") in data.splits["test"].tolist()  # no text there is refused as unknown


def test_word_vocabularies_need_the_unknown_token():
    with pytest.raises(UsageError, match=r"tokenizer 'word': the special tokens must include \[UNK\], got \[\]"):
        build_tokenizer("word", ["a"], ["a"], 300)


def test_tokens_on_disk(tmp_path):
    path = tmp_path / "a.tokens"
    assert write_tokens(path, [[1, 2], [], [3]]) == 3
    tokens = open_tokens(path)
    assert tokens.dtype == torch.int32
    assert tokens.tolist() == [1, 2, 3]
    tokens[0] = 9  # a private map: the file does not change
    assert open_tokens(path).tolist() == [1, 2, 3]
    assert write_tokens(path, []) == 0
    assert open_tokens(path).shape == (0,)
    path.write_bytes(b"12345")
    with pytest.raises(UsageError, match="must be a multiple of 4 bytes, got 5"):
        open_tokens(path)
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        open_tokens(tmp_path / "none")

    def broken():
        yield [1]
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        write_tokens(tmp_path / "b.tokens", broken())
    assert [p.name for p in tmp_path.iterdir()] == ["a.tokens"]


def test_one_hot():
    from fastattn.training.data.vectors import one_hot

    assert torch.equal(one_hot([[0, 2]], 3), torch.tensor([[[1.0, 0, 0], [0, 0, 1]]]))
    assert one_hot([], 3).shape == (0, 3)
    with pytest.raises(UsageError, match="numbers must be from 0 to 2, got 0 to 3"):
        one_hot([0, 3], 3)


def test_bag_of_words_and_tfidf():
    pytest.importorskip("sklearn", reason="needs the packages of fastattn[eval]")
    from fastattn.training.data.vectors import bag_of_words

    texts = ["red red car", "blue car"]
    vectorizer = bag_of_words()
    assert vectorizer.fit_transform(texts).toarray().tolist() == [[0, 1, 1], [1, 1, 0]]
    assert vectorizer.get_feature_names_out().tolist() == ["blue", "car", "red"]
    weights = bag_of_words(tfidf=True, max_ngram=2).fit_transform(texts).toarray()
    assert weights.shape == (2, 6)  # blue, blue car, car, red, red car, red red
    assert [math.hypot(*row) for row in weights] == pytest.approx([1, 1])


def test_word2vec_and_embedding():
    pytest.importorskip("gensim", reason="needs the packages of fastattn[words]")
    from fastattn.training.data.vectors import initialize_embedding, word2vec

    texts = ["the king rules the land", "the queen rules the land", "a dog eats a bone", "a cat eats a fish"] * 100
    vectors = word2vec(texts, 16, window=2, epochs=20)
    assert vectors.similarity("king", "queen") > vectors.similarity("king", "fish")
    assert (word2vec(texts, 16, window=2, epochs=20)["king"] == vectors["king"]).all()
    tokenizer = build_tokenizer("word", texts, texts, 300, SPECIALS)
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(tokenizer.vocab_size, 16)
    before, spread = embedding.weight[:5].clone(), embedding.weight.std()
    assert initialize_embedding(embedding, tokenizer, vectors) == tokenizer.vocab_size - len(SPECIALS)
    assert torch.equal(embedding.weight[:5], before)
    king = embedding.weight[tokenizer.number_of("king")]
    assert torch.nn.functional.cosine_similarity(king, torch.tensor(vectors["king"]), dim=0) > 0.9999
    assert 0.5 < embedding.weight.std() / spread < 2
    with pytest.raises(UsageError, match="must have dimension 8, got 16"):
        initialize_embedding(torch.nn.Embedding(tokenizer.vocab_size, 8), tokenizer, vectors)
    with pytest.raises(UsageError, match="no word occurs 1000 times in the 400 texts"):
        word2vec(texts, min_count=1000)


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\n" + "".join(f"number {i},{'odd' if i % 2 else 'even'}\n" for i in range(40)))
    return path


def run_data(capsys, *arguments):
    assert main(["data", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


def test_data_command(tmp_path, table, capsys):
    report = run_data(capsys, "stats", table, "--columns.label", "label")
    assert report["all"]["documents"] == 40
    assert report["all"]["classes"] == {"even": 20, "odd": 20}
    cleaned = tmp_path / "new" / "clean.jsonl"
    report = run_data(
        capsys, "clean", table, "--columns.label", "label", "--output", cleaned, "--cleaning.min_characters", 9
    )
    assert report["all"]["removed"]["too short"] == 10
    split = tmp_path / "split"
    report = run_data(capsys, "split", cleaned, "--columns.label", "label", "--output", split, "--test_fraction", "0.2")
    assert {name: part["documents"] for name, part in report.items()} == {"train": 21, "validation": 3, "test": 6}
    tokens = tmp_path / "tokens"
    report = run_data(capsys, "tokenize", split, "--output", tokens, "--tokenizer", "byte")
    assert report["train"] == {"documents": 21, "tokens": 21 * 9, "characters a token": 1.0}
    tokenizer = load_tokenizer(tokens / "tokenizer.json")
    ends = torch.from_file(str(tokens / "train.ends"), size=21, dtype=torch.int64).tolist()
    text = tokenizer.decode(open_tokens(tokens / "train.tokens")[ends[0] : ends[1]].tolist())
    assert text == read_documents(str(split))["train"].texts[1]
    again = tmp_path / "again"
    run_data(capsys, "tokenize", split, "--output", again, "--tokenizer_file", tokens / "tokenizer.json")
    assert (again / "test.tokens").read_bytes() == (tokens / "test.tokens").read_bytes()


def test_data_vectorize(tmp_path, table, capsys):
    pytest.importorskip("sklearn", reason="needs the packages of fastattn[eval]")
    from scipy.sparse import load_npz

    run_data(capsys, "split", table, "--output", tmp_path / "split")
    texts = read_documents(str(tmp_path / "split"))["train"].texts
    report = run_data(capsys, "vectorize", tmp_path / "split", "--output", tmp_path / "vectors")
    matrix = load_npz(tmp_path / "vectors" / "test.npz")
    words = {word for text in texts for word in text.split() if len(word) > 1}
    assert matrix.shape == (report["test"], report["features"]) == (4, len(words))


def test_what_cannot_be_counted(tmp_path, table, capsys):
    pytest.importorskip("sklearn", reason="needs the packages of fastattn[eval]")
    (tmp_path / "letters.txt").write_text("a\nb\n")
    for source, option, message in (
        (table, "--max_ngram=0", "max_ngram must be at least 1, got 0"),
        (table, "--max_features=0", "max_features must be at least 1, got 0"),
        (tmp_path / "letters.txt", "--kind=tfidf", "have no words of two letters or more"),
    ):
        assert main(["data", "vectorize", str(source), option, "--output", str(tmp_path / "vectors")]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "vectors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stats", "nothing.csv"], "is neither a file, a folder"),
        (["clean", "a.csv", "--output", "a.csv"], "already exists; choose a new name"),
        (["clean", "a.csv", "--output", "b", "--cleaning.max_characters", "0"], "max_characters must be null or at"),
        (
            ["split", "a.csv", "--output", "b", "--test_fraction", "1"],
            "test_fraction must be at least 0 and below 1",
        ),
        (["tokenize", "a.csv", "--output", "b", "--tokenizer", "letters"], "letters"),
        (["polish", "a.csv"], "polish"),
    ],
)
def test_data_mistakes(table, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(table.parent)
    assert main(["data", *arguments]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert len(error.splitlines()) == 1
    assert message in error
    assert [p.name for p in table.parent.iterdir()] == ["a.csv"]
