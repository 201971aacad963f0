"""Text sources, splits, tokenizers, batches."""

import re
import sys
import unicodedata

import pytest

pytest.importorskip("tokenizers", reason="needs the packages of fastattn[train]")
import torch

import fastattn
from fastattn.training.config import DataConfig, ModelConfig, TrainConfig
from fastattn.training.data.builtin import hangul_preferences, hangul_styles
from fastattn.training.data.sources import resolve_source
from fastattn.training.data.text import fingerprint, read_text, split_text
from fastattn.training.data.tokenizer import CharTokenizer, LearntTokenizer, build_tokenizer, load_tokenizer
from fastattn.training.data.windows import random_starts, to_tokens, window_starts
from fastattn.training.messages import UsageError
from fastattn.training.tasks.registry import make_task


def test_topics_need_no_file():
    text = read_text("topics")
    assert 400_000 < len(text) < 600_000
    assert text.startswith('assert\nThe "assert" statement\n')
    if sys.version_info[:3] == (3, 11, 7):
        assert (len(text), len(set(text)), fingerprint(text)) == (465_850, 103, "b25a9eaf18663901")


def test_file_loses_byte_order_mark_and_carriage_returns(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthr\xc3\xa9e\n")
    assert read_text(str(path)) == "one\ntwo\nthrée\n"


def test_folder_is_read_in_order_of_names(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.md").write_text("first")
    (tmp_path / "c.bin").write_bytes(b"\0")
    assert read_text(str(tmp_path)) == "first\nsecond"


def test_shakespeare_is_found_in_the_named_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTATTN_DATA", str(tmp_path))
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_text("First Citizen:\n")
    assert read_text("shakespeare") == "First Citizen:\n"


def test_shakespeare_missing_names_every_place(tmp_path, monkeypatch):
    monkeypatch.delenv("FASTATTN_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(fastattn, "__file__", str(tmp_path / "checkout" / "fastattn" / "__init__.py"))
    places = f"{tmp_path}/fastattn, {tmp_path}/shared/data; set FASTATTN_DATA"
    with pytest.raises(UsageError, match=f"tinyshakespeare.* is in none of {re.escape(places)}"):
        read_text("shakespeare")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"abc\0def", r"is a binary file \(zero at byte 3\)"),
        (b"caf\xe9", "is not UTF-8: byte 0xe9 at 3"),
    ],
)
def test_file_that_is_no_text(tmp_path, content, message):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_text(str(path))


def test_unreadable_file_and_wrong_places(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"'.*nothing.txt' is neither .* a file nor a folder"):
        read_text(str(tmp_path / "nothing.txt"))
    with pytest.raises(UsageError, match=r"'.*': the folder has no files ending in \.txt, "):
        read_text(str(tmp_path))
    path = tmp_path / "a.txt"
    path.write_text("abc")

    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)  # root may read a file whatever its mode
    with pytest.raises(UsageError, match=r"a\.txt' cannot be read: Permission denied"):
        read_text(str(path))


def test_a_run_remembers_an_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_source("topics") == "topics"
    assert resolve_source("a.txt") == str(tmp_path.resolve() / "a.txt")


def test_split_by_position():
    text = "".join(map(chr, range(100, 1100)))
    parts = split_text(text, 0.1, 0.05)
    assert [len(parts[name]) for name in ("train", "validation", "test")] == [850, 100, 50]
    assert parts["train"] + parts["validation"] + parts["test"] == text
    assert split_text("x" * 1_115_394, 0.1, 0.0)["test"] == ""
    assert len(split_text("x" * 1_115_394, 0.1, 0.0)["train"]) == 1_003_854  # the split of the published settings


def test_char_tokenizer_round_trip(tmp_path):
    tokenizer = build_tokenizer("char", "hello wörld\n\U0001f600", "", 0)
    assert tokenizer.vocab_size == 11
    assert tokenizer.characters == "\n dehlorwö\U0001f600"
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json())
    loaded = load_tokenizer(path)
    assert isinstance(loaded, CharTokenizer)
    assert loaded.decode(loaded.encode("dröl\U0001f600")) == "dröl\U0001f600"
    with pytest.raises(UsageError, match="of the vocabulary: 'x' 'z'"):
        loaded.encode("hexz")


def test_bpe_tokenizer_round_trip(tmp_path):
    text = read_text("topics")[:60_000]
    tokenizer = build_tokenizer("bpe", [text], text[:50_000].splitlines(keepends=True), 400)
    assert tokenizer.vocab_size == 400
    sample = text[50_000:] + "\U0001f600 never seen ü\n"
    numbers = tokenizer.encode(sample)
    assert tokenizer.decode(numbers) == sample
    assert len(numbers) < 0.6 * len(sample)
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.to_json())
    loaded = load_tokenizer(path)
    assert isinstance(loaded, LearntTokenizer)
    assert loaded.encode(sample) == numbers
    assert LearntTokenizer.train("bpe", text[:50_000].splitlines(keepends=True), 400).to_json() == tokenizer.to_json()


def test_long_text_is_encoded_by_pieces():
    text = read_text("topics")[:5000]
    for kind in ("char", "bpe"):
        tokenizer = build_tokenizer(kind, [text], text.splitlines(keepends=True), 300)
        tokens = to_tokens(tokenizer, text, piece=7)
        assert tokens.dtype == torch.int32
        assert tokenizer.decode(tokens.tolist()) == text
        assert to_tokens(tokenizer, text).tolist() == tokenizer.encode(text)
    assert to_tokens(tokenizer, "").shape == (0,)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"type": "characters"}', '{"version": 3}'])
def test_damaged_tokenizer(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"tokenizer\.json is not a readable tokenizer: "):
        load_tokenizer(path)


def task_of(path, block_size=4, expected=None, **data):
    config = TrainConfig(data=DataConfig(source=str(path), **data), model=ModelConfig(block_size=block_size))
    return make_task(config, expected=expected)


def test_data_refuses_another_text_and_short_splits(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abcdefghij" * 20)
    fractions = {"validation_fraction": 0.2, "test_fraction": 0.1}
    task = task_of(path, 19, **fractions)
    assert task.sizes == {"train": "140 tokens", "validation": "40 tokens", "test": "20 tokens"}
    with pytest.raises(UsageError, match="the test split must have more than block_size = 20 tokens, got 20"):
        task_of(path, 20, **fractions)
    with pytest.raises(UsageError, match="the validation split must have more than block_size = 4 tokens, got 1"):
        task_of(path, validation_fraction=0.001)
    path.write_text("abcdefghij" * 21)
    with pytest.raises(UsageError, match=r"has 200 characters .* this one 210"):
        task_of(path, expected=task.summary)


def test_batch_is_a_function_of_seed_and_step():
    starts = random_starts(1000, 1337, 5, 12, 16)
    assert starts.shape == (12,)
    torch.manual_seed(99)
    assert torch.equal(starts, random_starts(1000, 1337, 5, 12, 16))
    assert not torch.equal(starts, random_starts(1000, 1337, 6, 12, 16))
    assert not torch.equal(starts, random_starts(1000, 1338, 5, 12, 16))


def test_batches_reach_both_ends_of_the_text():
    assert set(random_starts(12, 0, 0, 500, 8).tolist()) == {0, 1, 2, 3}


def test_windows_cover_the_split_once():
    batches = list(window_starts(111, 10, windows_a_batch=4))
    assert list(map(len, batches)) == [4, 4, 3]
    assert torch.cat(batches).tolist() == list(range(0, 110, 10))
    assert sum(map(len, window_starts(110, 10))) == 10  # otherwise the last target would be missing
    assert sum(map(len, window_starts(111, 10, limit=5))) == 5
    by_rank = [list(window_starts(111, 10, rank=rank, world_size=2, windows_a_batch=4)) for rank in range(2)]
    assert sorted(torch.cat([starts for part in by_rank for starts in part]).tolist()) == list(range(0, 110, 10))


def test_rows_are_windows_and_what_follows(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(map(chr, range(1000, 1400))))
    task = task_of(path, 16)
    inputs, targets = task.train_rows(3)
    assert inputs.shape == targets.shape == (12, 16)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)  # the tokens of the text are consecutive numbers
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(16))
    assert torch.cat([rows[0] for rows in task.rows("train")]).flatten().tolist() == list(range(352))


def test_characters_known_only_in_parts_are_decomposed():
    """Keyboards write composed characters; a vocabulary of decomposed ones reads them as the same text."""
    parts = unicodedata.normalize("NFD", "한국어é")
    tokenizer = build_tokenizer("char", [parts], [], 0)
    assert tokenizer.encode("한국어é") == tokenizer.encode(parts)
    with pytest.raises(UsageError, match="'ü'"):
        tokenizer.encode("한ü")  # its mark is not known
    both = build_tokenizer("char", [parts, "é"], [], 0, ["[UNK]"])
    assert both.decode(both.encode("é")) == "é"  # known as it is: not changed
    assert both.encode("ü") == [0]


def test_preferences_are_two_spellings_of_words_with_held_out_syllables():
    parts = hangul_preferences()
    train = {c for text in parts["train"].texts for c in unicodedata.normalize("NFC", text)}
    for name in ("validation", "test"):
        part = parts[name]
        assert not train & {c for text in part.texts for c in unicodedata.normalize("NFC", text)}
        assert all("-" in worse and worse.replace("-", "") == better for better, worse in
                   zip(part.targets, part.rejected, strict=True))  # fmt: skip
    styles = hangul_styles()["train"]
    joined = sum("-" not in spelling for spelling, text in zip(styles.targets, styles.texts, strict=True)
                 if len(unicodedata.normalize("NFC", text)) > 1)  # fmt: skip
    assert 0.23 < joined / sum(len(unicodedata.normalize("NFC", text)) > 1 for text in styles.texts) < 0.27
