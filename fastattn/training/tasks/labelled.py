"""The base class of tasks that estimate the label of a document, or of two texts together."""

import torch

from fastattn.models import Classifier

from ..data.batches import by_length, pad
from ..data.tokenizer import BEGIN, END, PAD
from ..data.vectors import initialize_embedding, word2vec
from ..messages import UsageError
from .base import DocumentTask, shape_of


class LabelTask(DocumentTask):
    """Rows (tokens, lengths, targets). Two texts are one row, each ended by the end token.

    A subclass says what the labels are: `learn_labels`, `targets_of`, `label_options`, `predict` and the scores.
    """

    needed = ("labels",)  # of the summary, to build a model
    unit = "document"
    next_command = "fastattn predict {run} TEXT"

    def learn_labels(self, labels):
        """{name: value} for the summary, from the labels of the training part."""
        raise NotImplementedError

    def targets_of(self, labels, part):
        """A tensor with a row for each label of a part."""
        raise NotImplementedError

    @staticmethod
    def label_options(config, summary):
        """The arguments of Classifier that the labels decide."""
        raise NotImplementedError

    def describe(self, row):
        """({name: value}, cells of a line) of a row of `predict`, for its output as JSON and as text."""
        raise NotImplementedError

    def prepare(self):
        source = self.config.data.source
        if any(part.labels is None for part in self.parts.values()):
            raise UsageError(f"source {source!r} has no labels; name their column with --data.columns.label")
        if "train" in self.parts:
            self.summary |= self.learn_labels(self.parts["train"].labels)
        self.targets = {name: self.targets_of(part.labels, name) for name, part in self.parts.items()}
        self.examples = {name: self.encode_part(name) for name in self.parts}

    @property
    def has_pairs(self):
        return self.config.data.columns.pair is not None

    def encode_part(self, name):
        part = self.parts[name]
        if not self.has_pairs:
            return super().encode_part(name)
        if part.pairs is None:
            raise UsageError(f"source {self.config.data.source!r} has no pairs of texts for columns.pair")
        sides = [list(map(self.tokenizer.encode, texts)) for texts in (part.texts, part.pairs)]
        for first, second in zip(*sides, strict=True):
            self.counts[name].add(self.tokenizer, (first + second,), self.longest - 1)
        return list(map(self.frame_pair, *sides))

    def frame_pair(self, first, second):
        """Token numbers of two texts with their marks; the longer one is cut first."""
        room = self.longest - 1
        kept = max(room - len(second), room // 2)
        first = first[:kept]
        return [self.specials[BEGIN], *first, self.specials[END], *second[: room - len(first)], self.specials[END]]

    def lengths(self, part):
        return list(map(len, self.examples[part]))

    def collate(self, part, indices, key):
        tokens, lengths = self._padded([self.examples[part][i] for i in indices])
        return tokens, lengths, self.targets[part][list(indices)]

    def _padded(self, examples):
        return pad(examples, self.specials[PAD]), torch.tensor(list(map(len, examples)))

    @classmethod
    def build_model(cls, config, tokenizer, summary, layers=None):
        if missing := [name for name in cls.needed if name not in summary]:
            raise UsageError(f"the summary of the data of the run lacks {missing[0]}: data.json is damaged")
        shape = shape_of(config, layers)
        del shape["tied"]
        return Classifier(
            tokenizer.vocab_size, body=config.model.body, pooling=config.model.pooling,
            **cls.label_options(config, summary), **shape,
        )  # fmt: skip

    def initialize(self, model):
        if self.config.model.embedding == "word2vec":
            vectors = word2vec(self.parts["train"].texts, self.config.model.d_model, seed=self.config.seed)
            body = getattr(model, "encoder", model)
            initialize_embedding(body.token_embedding, self.tokenizer, vectors)

    def outputs(self, model, texts, pairs=None):
        """The outputs (texts, ...) of the model for texts, with pairs for texts and second texts; fp32 on the CPU."""
        if self.has_pairs != (pairs is not None):
            raise UsageError(f"the model of this run reads {'two texts' if self.has_pairs else 'one text'} at a time")
        if pairs is None:
            return self._outputs(model, list(map(self.encode, texts)))
        sides = (map(self.tokenizer.encode, column) for column in (texts, pairs))
        return self._outputs(model, list(map(self.frame_pair, *sides)))

    @torch.no_grad()
    def _outputs(self, model, examples):
        device, result = next(model.parameters()).device, {}
        for indices in by_length(list(map(len, examples)), 64):
            out = model(*(tensor.to(device) for tensor in self._padded([examples[i] for i in indices])))
            result |= zip(indices, out.float().cpu(), strict=True)
        return torch.stack([result[i] for i in range(len(examples))])
