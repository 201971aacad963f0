"""Writes a corpus as token files of limited size, with several processes; see `token_folder` for reading them."""

import hashlib
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from ..files import write_atomic
from ..messages import UsageError, warn
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
    """Write data.json and PART-00000.tokens, PART-00000.ends, PART-00001.tokens, ... into a folder.

    The files are the same for any number of processes and interruptions. A document ends with the end token of the
    vocabulary, if it has one, and is whole in one file.

    Args:
        folder: Path of a folder, which is empty or where an interrupted call has written with the same arguments.
        texts: iterable of str, of which a few are in memory at a time.
        tokenizer: as from build_tokenizer.
        fractions: as for `part_of`.
        shard_tokens: a file ends with the document that reaches this number.
        processes: number of processes that tokenize; 1 means this process.
    Returns: {part: {"documents", "tokens", "unknown", "shards"}}.
    Raises:
        UsageError: a part has no document, or the texts are fewer than at an interruption.
        BrokenProcessPool: a process has died.
    """
    present = [name for name in PARTS if name == "train" or fractions.get(name)]
    writers = {name: _Writer(folder, name, shard_tokens, tokenizer.number_of(UNKNOWN)) for name in present}
    written = {name: writer.facts["documents"] for name, writer in writers.items()}
    if any(written.values()):
        warn(f"continuing after {sum(written.values()):,} documents")
    batches = _batches(_without(texts, written, fractions))
    for parts, lengths, numbers in _encode_all(batches, tokenizer.to_json(), fractions, processes):
        pieces = np.split(numbers, np.cumsum(lengths)[:-1])
        for part, piece in zip(parts, pieces, strict=True):
            writers[part].add(piece)
    report = {name: writer.close() for name, writer in writers.items()}
    if empty := [name for name, facts in report.items() if not facts["documents"]]:
        raise UsageError(f"the {empty[0]} part has no documents: the source has too few for these fractions")
    write_atomic(folder / "data.json", json.dumps(report, indent=1))
    for writer in writers.values():
        writer.progress.unlink(missing_ok=True)
    return report


def _without(texts, written, fractions):
    """Yield the texts but the first written[part] of each part, which an interrupted call has written."""
    left = dict(written)
    for text in texts:
        if any(left.values()) and left.get(part := part_of(text, fractions)):
            left[part] -= 1
        else:
            yield text
    if any(left.values()):
        raise UsageError("the source has fewer documents than before the interruption")


class _Writer:
    """The files of a part; the content of the next one is held in memory. It continues after the last complete file."""

    def __init__(self, folder, name, shard_tokens, unknown):
        self.folder, self.name, self.shard_tokens, self.unknown = folder, name, shard_tokens, unknown
        self.pieces, self.held = [], 0
        self.progress = folder / f"{name}.progress"
        self.facts = {"documents": 0, "tokens": 0, "unknown": 0, "shards": 0}
        if self.progress.exists():
            self.facts = json.loads(self.progress.read_text(encoding="utf-8"))

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
        write_atomic(self.progress, json.dumps(self.facts))
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
    waiting = deque()  # enough batches to occupy all processes; more would fill the memory
    try:
        with pool:
            for batch in itertools.chain(batches, itertools.repeat(None)):
                if batch is not None:
                    waiting.append(pool.submit(_encode, batch))
                elif not waiting:
                    return
                if batch is None or len(waiting) > 2 * processes:
                    yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start(tokenizer, fractions):
    """Set up a process. A worker of a pool ends with the process that started it, and leaves Ctrl-C to that process."""
    global _tokenizer, _fractions, _ends
    if parent := multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    _tokenizer, _fractions = read_tokenizer(tokenizer), fractions
    _ends = end_tokens(_tokenizer)[:1]


def _end_with(sentinel):
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _encode(texts):
    """(part of each text, tokens of each, all tokens int32)."""
    encoded = [np.asarray([*_tokenizer.encode(text), *_ends], dtype=np.int32) for text in texts]
    return [part_of(text, _fractions) for text in texts], list(map(len, encoded)), np.concatenate(encoded)
