"""The subcommands of `fastattn data`, one function each: count, clean, split, tokenize and vectorize documents."""

import collections
import json
import statistics
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from typing import Literal

import numpy as np

from ..config import Columns
from ..files import check_place, new_folder, run_path, user_path, write_atomic
from ..messages import UsageError, expect
from . import vectors
from .clean import CleanConfig, clean
from .documents import PARTS, join_documents, write_documents
from .shards import part_of, write_shards
from .sources import read_documents
from .split import shared_texts, split_documents
from .stream import stream_texts, up_to
from .token_file import SUFFIX, write_tokens
from .tokenizer import END, build_tokenizer, load_tokenizer, needed_specials, smallest_vocabulary
from .unfinished import state_of_source, unfinished_folder

Kind = Literal["char", "byte", "word", "bpe", "wordpiece"]


@dataclass
class SourceConfig:
    """Which documents.

    Args:
        source: a .csv, .tsv or .jsonl file, a text file, a folder of text files, hf:NAME, or the name of a known set
        target_source: a second text file; its lines are the targets of the lines of source
        unit: the document unit of a text file; a paragraph ends at an empty line
        columns: which columns of a table are read
    """

    source: str
    target_source: str | None = None
    unit: Literal["line", "paragraph", "file"] = "line"
    columns: Columns = field(default_factory=Columns)

    def __post_init__(self):
        expect(self.source.strip(), "the source", "the name of a file, a folder or a known set", self.source)

    def read(self, conversations=False):
        """The parts; conversations: whether a text may be the JSON text of a conversation."""
        if not conversations:
            expect(self.columns.messages is None, "columns.messages", "left out, except for stats and split",
                   self.columns.messages)  # fmt: skip
        return read_documents(self.source, self.columns, target_source=self.target_source, unit=self.unit)


def data_stats(documents: SourceConfig):
    """Count the documents, characters, classes and duplicates of a source, and the texts shared by two parts."""
    parts, messages = documents.read(conversations=True), documents.columns.messages
    report = {name: _describe(part, messages) for name, part in parts.items()}
    if shared := shared_texts(parts):
        report["in two parts"] = {f"{a} and {b}": count for (a, b), count in shared.items()}
    return report


def _describe(documents, messages=None):
    texts = documents.texts
    if messages is not None:
        texts = ["".join(content for _, content in json.loads(text)) for text in texts]
    lengths = [len(text) for text in texts]
    facts = {
        "documents": len(documents),
        "characters": sum(lengths),
        "distinct characters": len(set().union(*texts)),
        "median length": statistics.median(lengths) if lengths else 0,
        "longest": max(lengths, default=0),
        "duplicates": len(lengths) - len(set(documents.texts)),
    }
    if documents.labels is not None:
        facts |= _describe_labels(documents.labels)
    return facts


def _describe_labels(labels):
    if labels and isinstance(labels[0], float):
        return {"labels": {"mean": statistics.mean(labels), "least": min(labels), "greatest": max(labels)}}
    names = (name for label in labels for name in (label if isinstance(label, tuple) else (label,)))
    return {"classes": dict(collections.Counter(names).most_common())}


def data_clean(documents: SourceConfig, output: str, cleaning: CleanConfig):
    """Clean the documents of a source and write them as JSON lines, one file for each part."""
    path = _new_path(output)
    parts = documents.read()
    if list(parts) == ["all"]:  # another name would make the rows another format
        expect(path.suffix.lower() in ("", ".jsonl", ".ndjson"), "output", "a name that ends in .jsonl", output)
    cleaned = {name: clean(part, cleaning) for name, part in parts.items()}
    if list(parts) == ["all"]:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_documents(path, cleaned["all"][0])
    else:
        _write_parts(path, {name: part for name, (part, _) in cleaned.items()})
    return {name: report for name, (_, report) in cleaned.items()}


def data_split(
    documents: SourceConfig, output: str, validation_fraction: float = 0.1, test_fraction: float = 0.1, seed: int = 0,
    stratify: bool = True,
):  # fmt: skip
    """Draw training, validation and test documents and write them as JSON lines into a new folder."""
    for name, fraction in (("validation_fraction", validation_fraction), ("test_fraction", test_fraction)):
        expect(0 <= fraction < 1, name, "at least 0 and below 1", fraction)
    held_out = validation_fraction + test_fraction
    expect(held_out < 1, "validation_fraction + test_fraction", "below 1", held_out)
    expect(0 <= seed < 2**63, "seed", "at least 0 and below 2**63", seed)
    path = _new_path(output)
    messages = documents.columns.messages
    whole = join_documents(documents.read(conversations=True).values())  # published parts are drawn again
    drawn = split_documents(whole, validation_fraction, test_fraction, seed, stratify=stratify)
    _write_parts(path, drawn, messages)
    return {name: _describe(part, messages) for name, part in drawn.items()}


def data_tokenize(
    documents: SourceConfig, output: str, tokenizer: Kind | None = None, vocab_size: int | None = None,
    specials: list[str] | None = None, tokenizer_file: str | None = None, strip_accents: bool = False,
):  # fmt: skip
    """Turn documents into token numbers on disk: tokenizer.json and, for each part, PART.tokens and PART.ends.

    PART.ends holds the end of each document as int64. The tokenizer is learnt from the training part, or is read.

    Args:
        output: new folder
        tokenizer: kind to learn; null = bpe
        vocab_size: largest vocabulary of a word, bpe or wordpiece tokenizer; null = 4096
        specials: tokens that stand for no text
        tokenizer_file: a tokenizer.json to use instead
        strip_accents: a word or wordpiece tokenizer drops accents and other marks on letters
    """
    path = _new_path(output)
    how = Vocabulary(tokenizer, vocab_size, strip_accents, tokenizer_file, specials=specials)
    parts = documents.read()
    texts = [text for part in parts.values() for text in part.texts]
    built = how.build(texts, next(iter(parts.values())).texts)
    report = {"vocabulary": built.vocab_size}
    with new_folder(path) as path:
        write_atomic(path / "tokenizer.json", built.to_json())
        for name, part in parts.items():
            report[name] = _write_tokens(path / name, (built.encode(text) for text in part.texts))
            characters = sum(map(len, part.texts))
            report[name]["characters a token"] = round(characters / max(1, report[name]["tokens"]), 3)
        write_atomic(path / "data.json", json.dumps(report, indent=1))
    return report


@dataclass
class Vocabulary:
    """How to get a tokenizer: it is read from tokenizer_file, which excludes the other options, or learnt. None is the
    default."""

    tokenizer: str | None
    vocab_size: int | None
    strip_accents: bool
    tokenizer_file: str | None
    learn_from: int | None = None
    specials: list | None = None

    def __post_init__(self):
        if self.tokenizer_file is not None:
            for name, value in vars(self).items():
                if name != "tokenizer_file":
                    expect(value in (None, False), name, "left out with tokenizer_file, which decides it", value)
            return
        self.tokenizer = self.tokenizer or "bpe"
        self.vocab_size = 4096 if self.vocab_size is None else self.vocab_size
        self.learn_from = 50_000_000 if self.learn_from is None else self.learn_from
        smallest = smallest_vocabulary(self.tokenizer)
        wanted = f"above {smallest}{' (the bytes)' if smallest else ''}"
        expect(self.vocab_size > smallest, "vocab_size", wanted, self.vocab_size)
        expect(self.learn_from >= 1, "learn_from", "at least 1", self.learn_from)
        strips = not self.strip_accents or self.tokenizer in ("word", "wordpiece")
        expect(strips, "strip_accents", "false unless a word or wordpiece tokenizer is learnt", self.strip_accents)

    def build(self, texts, train_texts, specials=()):
        """The tokenizer; texts, train_texts: as for build_tokenizer; specials: tokens that it needs besides its own."""
        if self.tokenizer_file is not None:
            return load_tokenizer(user_path(self.tokenizer_file))
        specials = self.specials or [*needed_specials(self.tokenizer), *specials]
        return build_tokenizer(self.tokenizer, texts, train_texts, self.vocab_size, specials, self.strip_accents)


def _write_tokens(path, encoded):
    ends, total = [], 0

    def chunks():
        nonlocal total
        for numbers in encoded:
            total += len(numbers)
            ends.append(total)
            yield numbers

    write_tokens(path.with_name(path.name + SUFFIX), chunks())
    write_atomic(path.with_name(path.name + ".ends"), np.asarray(ends, "<i8").tobytes())
    return {"documents": len(ends), "tokens": total}


def data_shard(
    documents: SourceConfig, output: str, tokenizer: Kind | None = None, vocab_size: int | None = None,
    tokenizer_file: str | None = None, strip_accents: bool = False, learn_from: int | None = None,
    shard_tokens: int = 10_000_000, processes: int = 1, validation_fraction: float = 0.01, test_fraction: float = 0.0,
):  # fmt: skip
    """Turn a corpus that may be larger than memory into shards of tokens, for task lm, with several processes.

    After an interruption the same command continues where it stopped.

    Args:
        output: new folder; until it is complete its name ends in .unfinished
        tokenizer: kind to learn; char reads the whole corpus; null = bpe
        vocab_size: largest vocabulary of a word, bpe or wordpiece tokenizer; null = 4096
        tokenizer_file: a tokenizer.json to use instead
        strip_accents: a word or wordpiece tokenizer drops accents and other marks on letters
        learn_from: characters of the training part that the vocabulary is learnt from; null = 50,000,000
        shard_tokens: a file ends with the document that reaches this number
        processes: number of processes that tokenize; it does not change the result
        validation_fraction: share of the documents for validation; equal documents are in one part
        test_fraction: share of the documents for the test
    """
    path = _new_path(output)
    how = Vocabulary(tokenizer, vocab_size, strip_accents, tokenizer_file, learn_from)
    for name, value in (("shard_tokens", shard_tokens), ("processes", processes)):
        expect(value >= 1, name, "at least 1", value)
    for name, value in (("target_source", documents.target_source), ("columns.messages", documents.columns.messages)):
        expect(value is None, name, "left out for shards", value)
    expect(0 < validation_fraction < 1, "validation_fraction", "above 0 and below 1", validation_fraction)
    held_out = validation_fraction + test_fraction
    expect(test_fraction >= 0 and held_out < 1, "validation_fraction + test_fraction", "below 1", held_out)
    fractions = {"validation": validation_fraction, "test": test_fraction}

    def texts():
        return stream_texts(documents.source, documents.columns, documents.unit)

    settings = {**asdict(documents), **asdict(how), "shard_tokens": shard_tokens, "fractions": fractions}
    settings |= {f"state of the {name}": state_of_source(settings[name]) for name in ("source", "tokenizer_file")}
    try:
        with unfinished_folder(path, settings) as folder:
            file = folder / "tokenizer.json"
            if not file.exists():
                train = (text for text in texts() if part_of(text, fractions) == "train")
                built = how.build(texts(), up_to(train, how.learn_from or 0), [END])
                write_atomic(file, built.to_json())
            built = load_tokenizer(file)
            return {"vocabulary": built.vocab_size} | write_shards(
                folder, texts(), built, fractions=fractions, shard_tokens=shard_tokens, processes=processes
            )
    except BrokenProcessPool:
        raise UsageError(
            "a worker process died, perhaps because memory ran out; the same command continues where it stopped"
        ) from None


def data_vectorize(
    documents: SourceConfig, output: str, kind: Literal["bag_of_words", "tfidf", "word2vec"] = "tfidf",
    dimension: int = 100, max_ngram: int = 1, max_features: int | None = None, seed: int = 0,
):  # fmt: skip
    """Turn documents into vectors: sparse .npz files with a list of the features, or word vectors as text.

    The features are learnt from the training part; the other parts are only transformed.
    """
    expect(dimension >= 1, "dimension", "at least 1", dimension)
    expect(0 <= seed < 2**32, "seed", "at least 0 and below 2**32", seed)
    path = _new_path(output)
    parts = documents.read()
    train = next(iter(parts.values()))
    if kind == "word2vec":
        learnt = vectors.word2vec(train.texts, dimension, seed=seed)
        with new_folder(path) as folder:
            learnt.save_word2vec_format(str(folder / "vectors.txt"))
        return {"words": len(learnt), "dimension": learnt.vector_size}
    from scipy.sparse import save_npz

    vectorizer = vectors.bag_of_words(tfidf=kind == "tfidf", max_ngram=max_ngram, max_features=max_features)
    vectors.count_words(vectorizer, train.texts)
    with new_folder(path) as folder:
        for name, part in parts.items():
            save_npz(folder / f"{name}.npz", vectorizer.transform(part.texts))
        write_atomic(folder / "features.txt", "".join(f"{word}\n" for word in vectorizer.get_feature_names_out()))
    return {"features": len(vectorizer.vocabulary_)} | {name: len(part) for name, part in parts.items()}


def _new_path(output):
    path = run_path(output)
    if path.exists() or path.is_symlink():
        raise UsageError(f"output {str(path)!r} already exists; choose a new name")
    check_place(path, "output")
    return path


def _write_parts(path, parts, messages=None):
    with new_folder(path) as folder:
        for name in PARTS:
            if name in parts:
                write_documents(folder / f"{name}.jsonl", parts[name], messages)
