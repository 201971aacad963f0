"""Prediction of the next token, in a text, in tokens on disk, or in documents packed into rows."""

import itertools
import time
from pathlib import Path

import torch

from fastattn.models import CausalLM

from ..data.batches import IGNORED
from ..data.counts import Counts, check_known
from ..data.order import WindowOrder
from ..data.parts import read_parts
from ..data.text import check_summary, fingerprint, read_text
from ..data.token_folder import Shards, is_token_folder, join_folders
from ..data.tokenizer import (
    END,
    END_OF_TEXT,
    UNKNOWN,
    build_tokenizer,
    count_unknown,
    end_tokens,
    needed_specials,
)
from ..data.windows import TextData, to_tokens, window_starts
from ..files import user_path
from ..inspect.attention_maps import attention_maps
from ..inspect.generate import generate_tokens, stream_text
from ..inspect.scores import language_scores
from ..messages import UsageError
from .base import Task, evaluate_part, shape_of


def packed_inputs(tokens, targets, documents):
    """The arguments of a CausalLM for rows with several documents, which do not see each other.

    documents: (rows, block_size), a number for each token that differs between neighbouring documents of a row.
    """
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = first.flatten().nonzero()[:, 0]
    cu_seqlens = torch.cat([starts, torch.tensor([tokens.numel()])]).int()
    return tokens, targets, None, cu_seqlens


class LanguageModelling(Task):
    """Rows of block_size tokens: random windows for training, consecutive ones for evaluation.

    A row is (tokens, next tokens), and with config.data.packed also the document number of each token: attention stays
    within a document, and its last token has no target. In an evaluation of a mixture the number of the source follows;
    no window lies in two sources.
    """

    labels = ()  # of the sources of a mixture

    def __init__(self, config, tokenizer=None, expected=None):
        self.config, data = config, config.data
        self.ends = {}
        folder = user_path(data.source)
        if data.mixture is not None or is_token_folder(folder):
            self._open_folders(data.mixture or {str(folder): 1.0}, tokenizer)
            check_summary(self.summary, expected)
        elif data.packed:
            self._pack_documents(data, tokenizer, expected)
        else:
            text = TextData(data, tokenizer, expected)
            self.tokenizer, self.summary = text.tokenizer, text.summary
            self.splits = {name: Shards([tokens]) for name, tokens in text.splits.items()}
        block_size = config.model.block_size
        for name, tokens in self.splits.items():
            if len(tokens) <= block_size:
                raise UsageError(
                    f"text {data.source!r}: the {name} split must have more than block_size = {block_size} tokens, "
                    f"got {len(tokens)}"
                )
        self.sizes = {name: f"{len(tokens):,} tokens" for name, tokens in self.splits.items()}
        self.counts = {name: self._count(name) for name in self.splits}
        check_known(data.source, self.counts)
        weights = list((data.mixture or {"": 1.0}).values())
        sizes = self._sources("train")
        how = (config.seed, config.batch_size, block_size, data.order == "shuffle")
        self.windows = WindowOrder(sizes, weights, *how)
        self.tokens_a_step = config.batch_size * block_size
        self.steps_an_epoch = max(1, len(self.splits["train"]) // self.tokens_a_step)

    def _open_folders(self, weights, tokenizer):
        folder, sizes = join_folders(weights, self.config.data.packed)
        self.tokenizer, self.splits, self.ends = folder.tokenizer, folder.splits, folder.ends
        if tokenizer is not None and tokenizer.to_json() != self.tokenizer.to_json():
            raise UsageError(f"tokens {', '.join(map(repr, weights))} were not made by the tokenizer of the model")
        self.summary = {
            "source": ", ".join(weights),
            "characters": sum(map(len, self.splits.values())),
            "sha256": folder.sha256,
        }
        block_size = self.config.model.block_size
        if len(weights) > 1:
            self.labels, self.sizes_of_sources = labels_of(weights), sizes
        for path, size in zip(weights, sizes["train"], strict=True):
            if size <= block_size:
                raise UsageError(
                    f"tokens {path!r}: the train split must have more than block_size = {block_size}, got {size}"
                )

    def _pack_documents(self, data, tokenizer, expected):
        parts = read_parts(data)
        texts = [text for part in parts.values() for text in part.texts]
        self.summary = {
            "source": data.source,
            "characters": sum(map(len, texts)),
            "sha256": fingerprint("\0".join(texts)),
        }
        check_summary(self.summary, expected)
        specials = [*needed_specials(data.tokenizer), END]
        self.tokenizer = tokenizer or build_tokenizer(
            data.tokenizer, texts, parts["train"].texts, data.vocab_size, specials, data.strip_accents
        )
        end = self.tokenizer.number_of(END)
        if end is None:
            end = self.tokenizer.number_of(END_OF_TEXT)
        if end is None:
            raise UsageError(f"tokenizer: packed documents need the token {END} or {END_OF_TEXT}, but both are missing")
        self.splits = {}
        for name, part in parts.items():
            numbers = [torch.tensor([*self.tokenizer.encode(text), end], dtype=torch.int32) for text in part.texts]
            self.splits[name] = Shards([torch.cat(numbers)])
            self.ends[name] = torch.tensor([len(n) for n in numbers]).cumsum(0)

    @property
    def more_sums(self):
        """For each source of a mixture its loss and its predictions."""
        return 2 * len(self.labels)

    @property
    def log_columns(self):
        return [f"validation_loss_{label}" for label in self.labels]

    def _sources(self, part):
        """The tokens of each source of a part, which lie one after the other."""
        return self.sizes_of_sources[part] if self.labels else [len(self.splits[part])]

    def _count(self, part):
        tokens, number = self.splits[part], self.tokenizer.number_of(UNKNOWN)
        unknown = 0 if number is None else tokens.count(number)
        ends = self.ends.get(part)
        if ends is None:
            return Counts(tokens=len(tokens), unknown=unknown)
        return Counts(documents=len(ends), tokens=len(tokens), unknown=unknown)

    def _windows(self, part, starts):
        positions = starts[:, None] + torch.arange(self.config.model.block_size + 1)
        tokens = self.splits[part][positions].long()
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < self.tokenizer.vocab_size:
            raise UsageError(f"tokens {self.summary['source']!r}: a number is not in the vocabulary: a file is damaged")
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        if not self.config.data.packed:
            return inputs, targets
        documents = torch.searchsorted(self.ends[part], positions, right=True)
        inside = documents[:, 1:] == documents[:, :-1]
        return inputs, targets.masked_fill(~inside, IGNORED), documents[:, :-1]

    def train_rows(self, step):
        return self._windows("train", self.windows.starts(step))

    def rows(self, part, limit=None, rank=0, world_size=1):
        for source, starts in itertools.islice(self._batches(part, limit), rank, None, world_size):
            rows = self._windows(part, starts)
            yield (*rows, torch.full_like(starts, source)) if self.labels else rows

    def _batches(self, part, limit):
        """Yield (source, starts of its windows); limit: None or the windows of all sources, at least one of each."""
        first, sizes = 0, self._sources(part)
        for source, size in enumerate(sizes):
            share = None if limit is None else max(1, limit * size // sum(sizes))
            for starts in window_starts(size, self.config.model.block_size, share):
                yield source, first + starts
            first += size

    def count(self, rows):
        return int((rows[1] != IGNORED).sum()) if self.config.data.packed else rows[1].numel()

    def inputs(self, rows):
        return packed_inputs(*rows[:3]) if self.config.data.packed else rows[:2]

    def sums(self, model, rows, device):
        total, right, count = super().sums(model, rows, device)
        others = [0.0] * self.more_sums
        if self.labels:
            place = 2 * int(rows[-1][0])
            others[place : place + 2] = total, count
        return (total, right, count, *others)

    def further_scores(self, sums):
        pairs = zip(self.labels, sums[::2], sums[1::2], strict=True)
        return {f"loss_{label}": total / count for label, total, count in pairs if count}

    @staticmethod
    def build_model(config, tokenizer, summary, layers=None):
        return CausalLM(tokenizer.vocab_size, **shape_of(config, layers))

    def check_sample(self):
        if self.config.sample_tokens:
            self._sample_prompt()

    def _sample_prompt(self):
        """(text, tokens) of the prompt of the sample, with at least one token that the vocabulary knows."""
        given = self.config.sample_prompt
        for text in ("\n",) if given is None else (given,):
            try:
                numbers = self.tokenizer.encode(text)
            except UsageError as error:  # characters that are not in the vocabulary
                if given is not None:
                    raise UsageError(f"sample_prompt: {error}") from None
                continue
            if count_unknown(self.tokenizer, numbers) < len(numbers):
                return text, numbers
        if given is not None:
            raise UsageError(f"sample_prompt must have a token of the vocabulary, got {given!r}")
        unknown = self.tokenizer.number_of(UNKNOWN)
        numbers = self.splits["validation"][:100].tolist()
        first = next((n for n in numbers if n != unknown and self.tokenizer.decode([n]).strip()), numbers[0])
        return self.tokenizer.decode([first]), [first]

    def sample(self, model):
        if not self.config.sample_tokens:
            return ""
        text, prompt = self._sample_prompt()
        new = generate_tokens(
            model, prompt, self.config.sample_tokens, seed=self.config.seed, stop=end_tokens(self.tokenizer)
        )
        return text + "".join(stream_text(self.tokenizer, new, prompt=prompt, typed=text))

    def attention(self, model, text):
        numbers = self.tokenizer.encode(text)[: self.config.model.block_size]
        if not numbers:
            raise UsageError("attention: the text must have at least one token, got an empty text")
        maps = attention_maps(model, torch.tensor([numbers], device=next(model.parameters()).device))
        return maps[-1], self.token_texts(numbers), self.token_texts(numbers)

    def report(self, model, part, *, text=None):
        """Scores of a whole part, or of another whole text, in windows of block_size tokens."""
        if text is not None:
            block_size, tokens = self.config.model.block_size, to_tokens(self.tokenizer, read_text(text))
            if len(tokens) <= block_size:
                raise UsageError(
                    f"text {text!r} must have more than block_size = {block_size} tokens, got {len(tokens)}"
                )
            self.splits, part, self.ends = {"all": Shards([tokens])}, "all", {"all": torch.tensor([len(tokens)])}
            self.counts = {"all": self._count("all")}
        start = time.perf_counter()
        total, _, count, *others = evaluate_part(model, self, part)
        seconds = time.perf_counter() - start
        read, characters = self._read(part)
        report = scores_of_text(total, count, sum(characters))
        report["tokens_per_second"] = sum(read) / seconds if seconds else None
        if self.labels:
            rows = zip(self.labels, others[::2], others[1::2], characters, strict=True)
            report["sources"] = {label: scores_of_text(*row) for label, *row in rows if row[1]}
        return report

    def _read(self, part):
        """(tokens, characters) of each source that windows predict; 0 characters if the tokens have lost some."""
        read, characters, first = [], [], 0
        exact = self.tokenizer.exact and not self.counts[part].unknown
        for size in self._sources(part):
            read.append(max(0, size - 1) // self.config.model.block_size * self.config.model.block_size)
            tokens = self.splits[part][first + 1 : first + read[-1] + 1] if exact else torch.empty(0)
            characters.append(len(self.tokenizer.decode(tokens.tolist())))
            first += size
        return read, characters


def scores_of_text(total, count, characters):
    """The scores of a text from the sum of its losses, the number of predictions, and of characters (0 = unknown)."""
    known = {"characters": characters} if characters else {}
    return {"tokens": int(count), **known, **language_scores(total, count, characters or None)}


def labels_of(paths):
    """Short names of folders: the last part of each path, or the whole path where these are equal."""
    names = [Path(path).name for path in paths]
    return names if len(set(names)) == len(names) else list(paths)
