"""Writes a corpus as token files of limited size, with several processes; see `token_folder` for reading them."""

import hashlib
import itertools
import json
import multiprocessing
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from ..files import write_atomic
from ..messages import UsageError
from .documents import PARTS
from .token_file import SUFFIX, write_tokens
from .tokenizer import UNKNOWN, end_tokens, read_tokenizer

_BATCH = 2**20  # characters that a process gets at a time


def part_of(text, fractions):
    """The part of a document, which its text alone decides: equal texts are in one part.

    fractions: {"validation": share, "test": share}.
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    place = int.from_bytes(digest, "little") / 2**64
    for name, fraction in fractions.items():
        if place < fraction:
            return name
        place -= fraction
    return "train"


def write_shards(folder, texts, tokenizer, *, fractions, shard_tokens, processes):
    """Write tokenizer.json, data.json and PART-00000.tokens, PART-00000.ends, PART-00001.tokens, ... into a folder.

    The files are the same for any number of processes. A document ends with the end token of the vocabulary, if it has
    one, and is whole in one file.

    Args:
        folder: Path of an empty folder.
        texts: iterable of str, of which a few are in memory at a time.
        tokenizer: as from build_tokenizer.
        fractions: as for `part_of`.
        shard_tokens: a file ends with the document that reaches this number.
        processes: that tokenize; with 1 it is this one.
    Returns: {part: {"documents", "tokens", "unknown", "shards"}}.
    Raises:
        UsageError: a part has no document, or a process has died.
    """
    content = tokenizer.to_json()
    write_atomic(folder / "tokenizer.json", content)
    present = [name for name in PARTS if name == "train" or fractions.get(name)]
    writers = {name: _Writer(folder, name, shard_tokens, tokenizer.number_of(UNKNOWN)) for name in present}
    for parts, lengths, numbers in _encode_all(_batches(texts), content, fractions, processes):
        pieces = np.split(numbers, np.cumsum(lengths)[:-1])
        for part, piece in zip(parts, pieces, strict=True):
            writers[part].add(piece)
    report = {name: writer.close() for name, writer in writers.items()}
    if empty := [name for name, facts in report.items() if not facts["documents"]]:
        raise UsageError(f"the {empty[0]} part has no documents: the source has too few for these fractions")
    write_atomic(folder / "data.json", json.dumps(report, indent=1))
    return report


class _Writer:
    """The files of a part; the content of the next one is held in memory."""

    def __init__(self, folder, name, shard_tokens, unknown):
        self.folder, self.name, self.shard_tokens, self.unknown = folder, name, shard_tokens, unknown
        self.pieces, self.held = [], 0
        self.facts = {"documents": 0, "tokens": 0, "unknown": 0, "shards": 0}

    def add(self, numbers):
        self.pieces.append(numbers.copy())  # a view would keep the other documents of its batch in memory
        self.held += len(numbers)
        if self.held >= self.shard_tokens:
            self.flush()

    def flush(self):
        if not self.pieces:
            return
        path = self.folder / f"{self.name}-{self.facts['shards']:05d}{SUFFIX}"
        write_tokens(path, self.pieces)
        ends = np.cumsum([len(piece) for piece in self.pieces])
        write_atomic(path.with_suffix(".ends"), ends.astype("<i8").tobytes())
        unknown = 0 if self.unknown is None else sum(int((piece == self.unknown).sum()) for piece in self.pieces)
        new = {"documents": len(self.pieces), "tokens": self.held, "unknown": unknown, "shards": 1}
        self.facts = {name: value + new[name] for name, value in self.facts.items()}
        self.pieces, self.held = [], 0

    def close(self):
        self.flush()
        return self.facts


def _batches(texts):
    """Lists of texts of about _BATCH characters."""
    texts = iter(texts)
    for text in texts:
        batch, size = [text], len(text)
        while size < _BATCH and (more := next(texts, None)) is not None:
            batch.append(more)
            size += len(more)
        yield batch


def _encode_all(batches, tokenizer, fractions, processes):
    """Yield the result of `_encode` of each batch, in their order."""
    if processes == 1:
        _start(tokenizer, fractions)
        yield from map(_encode, batches)
        return
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_start, initargs=(tokenizer, fractions)
    )
    waiting = deque()  # as many batches as keep all processes at work; more would fill the memory
    try:
        with pool:
            for batch in itertools.chain(batches, itertools.repeat(None)):
                if batch is not None:
                    waiting.append(pool.submit(_encode, batch))
                elif not waiting:
                    return
                if batch is None or len(waiting) > 2 * processes:
                    yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UsageError("a process that tokenizes has died, perhaps for want of memory") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start(tokenizer, fractions):
    """What a process keeps."""
    global _tokenizer, _fractions, _ends
    _tokenizer, _fractions = read_tokenizer(tokenizer), fractions
    _ends = end_tokens(_tokenizer)[:1]


def _encode(texts):
    """(part of each text, tokens of each, all tokens int32)."""
    encoded = [np.asarray([*_tokenizer.encode(text), *_ends], dtype=np.int32) for text in texts]
    return [part_of(text, _fractions) for text in texts], list(map(len, encoded)), np.concatenate(encoded)
