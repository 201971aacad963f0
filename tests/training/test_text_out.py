"""Text in, text out: accents, the end of a document, the join of prompt and continuation, the sample, splits."""

import json
import random

import numpy as np
import pytest

pytest.importorskip("tokenizers", reason="needs the packages of fastattn[train]")
import torch
from training_cases import tiny_config, tiny_model

from fastattn.cli import main
from fastattn.training.config import DataConfig, OptimConfig
from fastattn.training.data.documents import Documents
from fastattn.training.data.split import split_documents
from fastattn.training.data.tokenizer import END, KINDS, SPECIALS, build_tokenizer, end_tokens
from fastattn.training.data.windows import to_tokens
from fastattn.training.inspect.generate import next_token_probabilities, stream_text
from fastattn.training.messages import UsageError
from fastattn.training.runs.train import train
from fastattn.training.tasks.registry import make_task

LANGUAGES = [
    "schön größer façade naïve",
    "ガス パン ぎゅうにゅう",
    "हिन्दी में लिखा",
    "Việt Nam được nhiều",
    "한국어를 배우다",
    "Ελληνικά ώρα",
    "עִבְרִית שָׁלוֹם",
    "ภาษาไทย ผู้ใหญ่",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", LANGUAGES)
def test_marks_on_letters_survive(kind, text):
    tokenizer = build_tokenizer(kind, [text], [text] * 3, 2000, SPECIALS)
    assert tokenizer.decode(tokenizer.encode(text)) == (text if tokenizer.exact else text.lower())


@pytest.mark.parametrize("kind", ["word", "wordpiece"])
def test_accents_are_stripped_on_request(kind):
    texts = ["schön größer", "ガス"]
    tokenizer = build_tokenizer(kind, texts, texts * 3, 2000, SPECIALS, strip_accents=True)
    assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == ["schon großer", "カス"]
    with pytest.raises(UsageError, match=r"data\.strip_accents must be false for the tokenizer bpe"):
        DataConfig(tokenizer="bpe", strip_accents=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_continuation_joins_its_prompt_as_the_tokenizer_writes_both(kind):
    random.seed(1)
    words = ["line", "number", "15", "don't", "it's", "a", "b,", "(c)", "d.", "playing", "ü", "日本", "do not"]
    texts = [" ".join(random.choices(words, k=8)) for _ in range(60)]
    tokenizer = build_tokenizer(kind, texts, texts, 300, SPECIALS)
    for text in texts[:20]:
        numbers = tokenizer.encode(text)
        for cut in range(1, len(numbers)):
            typed = tokenizer.decode(numbers[:cut])
            if "\ufffd" in typed:  # a prompt has whole characters
                continue
            whole = typed + "".join(stream_text(tokenizer, numbers[cut:], prompt=numbers[:cut], typed=typed))
            expected = tokenizer.decode(numbers)
            if not expected.startswith(typed):  # WordPiece closes the gap before an apostrophe that was typed already
                whole, expected = whole.replace(" ", ""), expected.replace(" ", "")
            assert whole == expected


def test_a_space_at_the_end_of_the_prompt_is_not_doubled():
    tokenizer = build_tokenizer("word", ["line number 15"], ["line number 15"], 300, SPECIALS)
    *prompt, last = tokenizer.encode("line number 15")
    assert "".join(stream_text(tokenizer, [last], prompt=prompt, typed="line number ")) == "15"
    assert "".join(stream_text(tokenizer, [last], prompt=prompt, typed="line number")) == " 15"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A run on short packed documents: after a document, its model has only ever seen the end token."""
    folder = tmp_path_factory.mktemp("packed")
    lines = [f"red apple {i % 7}\nblue sky {i % 7}\n" for i in range(200)]
    (folder / "lines.txt").write_text("".join(lines))
    data = DataConfig(source=str(folder / "lines.txt"), packed=True, tokenizer="word")
    config = tiny_config(
        folder / "run", folder / "lines.txt", data=data, steps=60, evaluate_every=60, sample_prompt=None, batch_size=16,
        model=tiny_model(n_layer=1, d_model=32, block_size=16), optim=OptimConfig(learning_rate=2e-2, warmup_steps=5),
    )  # fmt: skip
    assert train(config) == 0
    return folder / "run"


@pytest.mark.parametrize("options", [[], ["--temperature", "0"], ["--beams", "3"], ["--max_new_tokens", "1"]])
def test_generation_stops_at_the_end_of_a_document(packed, capsys, options):
    assert main(["generate", str(packed), "--prompt", "red apple", "--max_new_tokens", "60", *options]) == 0
    written = capsys.readouterr().out.strip("\n")
    assert written.startswith("red apple ")
    assert len(written) <= len("red apple 7")
    assert main(["generate", str(packed), "--prompt", "red apple 3", "--max_new_tokens", "60", *options]) == 0
    assert capsys.readouterr().out == "red apple 3\n"  # nothing follows


def test_the_sample_begins_with_a_token_and_ends_with_the_document(packed):
    assert (packed / "sample.txt").read_text() in {
        f"{thing} {i}" for thing in ("red apple", "blue sky") for i in range(7)
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pack", [False, True])
def test_every_tokenizer_has_a_sample_prompt(tmp_path, kind, pack):
    """Also without a line end in the vocabulary: one of word or WordPiece, or of documents that are lines."""
    (tmp_path / "a.txt").write_text(("\n" if pack else " ").join(f"word{i} of many words" for i in range(200)))
    data = DataConfig(source=str(tmp_path / "a.txt"), packed=pack, tokenizer=kind, vocab_size=400)
    config = tiny_config(tmp_path / "run", tmp_path / "a.txt", data=data, sample_prompt=None)
    task = make_task(config)
    task.check_sample()
    text, numbers = task._sample_prompt()
    assert len(numbers) == 1
    assert text == task.tokenizer.decode(numbers)
    for prompt in ("   \n ", "ж"):
        config.sample_prompt = prompt
        if kind in ("word", "wordpiece"):
            with pytest.raises(UsageError, match="sample_prompt must have a token of the vocabulary"):
                task.check_sample()
        elif kind == "char":
            with pytest.raises(UsageError, match="sample_prompt: the text has characters"):
                task.check_sample()
        else:
            task.check_sample()


def test_a_sample_that_fails_is_a_warning(tmp_path, capsys, monkeypatch):
    (tmp_path / "a.txt").write_text("some text " * 100)

    def fail(*_):
        raise RuntimeError("no luck")

    monkeypatch.setattr("fastattn.training.tasks.language_modelling.LanguageModelling.sample", fail)
    run = tmp_path / "a run 日本"
    assert train(tiny_config(run, tmp_path / "a.txt", steps=1, evaluate_every=1, sample_prompt=None)) == 0
    written = capsys.readouterr()
    assert "no sample was written: RuntimeError: no luck" in written.err
    assert f"next: fastattn evaluate '{run}'; fastattn generate '{run}' --prompt TEXT" in written.out


def test_pieces_of_a_long_text_end_with_lines():
    text = "".join(f"a line of number{i}\n" for i in range(300))
    tokenizer = build_tokenizer("word", [text], text.split("\n"), 1000, SPECIALS)
    whole = to_tokens(tokenizer, text, 10**9)
    for piece in (20, 33, 1000):
        assert torch.equal(to_tokens(tokenizer, text, piece), whole)
    assert torch.equal(to_tokens(build_tokenizer("char", ["a"], [], 0), "a" * 50, 7), torch.zeros(50).int())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rare", [1, 10, 30])
def test_the_training_part_has_each_class(seed, rare):
    """Classes with one document, and classes only in a group whose first document has another class."""
    labels = ["a", "b"] * 60 + [f"r{i}" for i in range(rare)] + ["a", "mixed"] * 3
    groups = [str(i) for i in range(120 + rare)] + ["x"] * 6
    documents = Documents([f"text {i}" for i in range(len(labels))], labels=labels, groups=groups)
    parts = split_documents(documents, 0.1, 0.1, seed)
    assert set(parts["train"].labels) == set(labels)
    assert sorted(text for part in parts.values() for text in part.texts) == sorted(documents.texts)
    for name in ("validation", "test"):
        assert len(parts[name]) == pytest.approx(len(labels) / 10, abs=9)


def test_numbers_to_estimate_are_not_classes(tmp_path):
    generator = np.random.default_rng(0)
    rows = [{"text": f"text {i}", "label": round(float(x), 1)} for i, x in enumerate(generator.uniform(0, 5, 300))]
    (tmp_path / "sts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    split = ["data", "split", str(tmp_path / "sts.jsonl"), "--columns.label", "label"]
    assert main([*split, "--output", str(tmp_path / "split")]) == 0  # drawn as documents without classes
    config = tiny_config(tmp_path / "run", tmp_path / "sts.jsonl", task="classify")
    config.data.columns.label = "label"
    with pytest.raises(UsageError, match=r"labels are \d+ different numbers such as .* \(regression\)"):
        make_task(config)
    stars = [{"text": f"text {i}", "label": i % 11 / 2} for i in range(300)]  # 0 to 5 in halves: classes
    (tmp_path / "sts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in stars))
    assert len(make_task(config).names) == 11


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 1e-3, 1e30])
@pytest.mark.parametrize("penalty", [1e-45, 1.0, 1e300])
def test_no_option_in_range_makes_probabilities_infinite(temperature, penalty):
    logits = torch.tensor([[3.0, -2.0, 0.0, 2.9]])
    p = next_token_probabilities(
        logits, torch.tensor([[0, 1, 2]]), temperature=temperature, repetition_penalty=penalty, top_p=0.9
    )
    torch.testing.assert_close(p.sum(-1), torch.ones(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--beams 2 --top_p .5", "top_p cannot be used with beams, got 0.5"),
        ("--beams 2 --seed 7", "seed cannot be used with beams, got 7"),
        ("--seed 99999999999999999999999", "seed must be at least 0 and below 2**63"),
        ("--top_k 0", "top_k must be at least 1"),
    ],
)
def test_options_of_generate_are_used_or_refused(packed, capsys, options, message):
    assert main(["generate", str(packed), "--prompt", "red", *options.split()]) == 2
    assert message in capsys.readouterr().err


def test_end_tokens_are_those_of_the_vocabulary():
    assert end_tokens(build_tokenizer("byte", [], [], 0, ["<|endoftext|>"])) == (0,)
    assert end_tokens(build_tokenizer("char", ["ab"], [], 0, ["[UNK]", END])) == (1,)
    assert end_tokens(build_tokenizer("char", ["ab"], [], 0)) == ()
