"""Classification of documents."""

from collections import Counter

import torch

from fastattn.models import Classifier

from ..data.batches import by_length, pad
from ..data.tables import looks_like_numbers
from ..data.tokenizer import PAD
from ..data.vectors import initialize_embedding, word2vec
from ..inspect.scores import classification_scores
from ..messages import UsageError
from .base import DocumentTask, shape_of, summed_loss_of_logits


def balanced_weights(summary):
    """The weight of each class: documents / (classes * documents of the class), of the training part."""
    counts = summary["class_counts"]
    return [sum(counts) / (len(counts) * count) for count in counts]


class Classification(DocumentTask):
    """Rows (tokens, lengths, classes); the classes are those of the training part, in alphabetical order."""

    unit = "document"
    has_accuracy = True
    next_command = "fastattn predict {run} TEXT"

    def prepare(self):
        source = self.config.data.source
        if any(part.labels is None for part in self.parts.values()):
            raise UsageError(f"source {source!r} has no labels; name their column with --data.columns.label")
        if "train" in self.parts:
            self.summary["labels"], self.summary["most_frequent"] = self._classes(self.parts["train"].labels)
            counted = Counter(self.parts["train"].labels)
            self.summary["class_counts"] = [counted[name] for name in self.summary["labels"]]
        numbers = {name: number for number, name in enumerate(self.names)}
        for name, part in self.parts.items():
            if unknown := sorted(set(part.labels) - numbers.keys()):
                which = f" of the {name} part" if "train" in self.parts else ""
                raise UsageError(
                    f"source {source!r}: class {unknown[0]!r}{which} is not in the training part; "
                    "`fastattn data split` draws new parts, with each class in the training part"
                )
        self.examples = {name: self.encode_part(name) for name in self.parts}
        self.classes = {name: [numbers[label] for label in part.labels] for name, part in self.parts.items()}

    def _classes(self, labels):
        """(names of the classes, the most frequent one) of the training part."""
        counted, source = Counter(labels), self.config.data.source
        names = sorted(counted)
        if len(names) < 2:
            got = f"only {names[0]!r}" if names else "none"
            raise UsageError(f"source {source!r} must have at least two classes, got {got}")
        if looks_like_numbers(labels):
            raise UsageError(
                f"source {source!r}: the labels are {len(names)} different numbers such as {names[0]} and {names[1]}; "
                "task classify needs the names of classes and does not estimate numbers (regression)"
            )
        return names, max(names, key=counted.__getitem__)

    def lengths(self, part):
        return list(map(len, self.examples[part]))

    def collate(self, part, indices, key):
        chosen = [self.examples[part][i] for i in indices]
        lengths = torch.tensor(list(map(len, chosen)))
        return pad(chosen, self.specials[PAD]), lengths, torch.tensor([self.classes[part][i] for i in indices])

    @staticmethod
    def build_model(config, tokenizer, summary, layers=None):
        shape = shape_of(config, layers)
        del shape["tied"]
        return Classifier(
            tokenizer.vocab_size, len(summary["labels"]), body=config.model.body, pooling=config.model.pooling,
            class_weights=balanced_weights(summary) if config.class_weights == "balanced" else None, **shape,
        )  # fmt: skip

    def count(self, rows):
        """What the loss is the mean over: documents, or the sum of their weights."""
        if self.config.class_weights == "none":
            return len(rows[-1])
        return torch.tensor(balanced_weights(self.summary))[rows[-1]].sum().item()

    @property
    def more_sums(self):
        return 3 * len(self.names) if self.config.select == "macro_f1" else 0

    def sums(self, model, rows, device):
        tokens, lengths, classes = (tensor.to(device) for tensor in rows)
        logits = model(tokens, lengths)
        sums = summed_loss_of_logits(logits, classes)
        if not self.more_sums:
            return sums
        predicted, n = logits.argmax(-1), len(self.names)
        hits = predicted[predicted == classes]
        return (*sums, *(count for x in (hits, predicted, classes) for count in x.bincount(minlength=n).tolist()))

    def further_scores(self, sums):
        """{"macro_f1"} if it selects: the mean F1 of the classes that occur in truth or predictions."""
        if not sums:
            return {}
        hits, predicted, truth = torch.tensor(sums, dtype=torch.float64).view(3, -1)
        occurs = predicted + truth > 0
        return {"macro_f1": (2 * hits / (predicted + truth))[occurs].mean().item()}

    def initialize(self, model):
        if self.config.model.embedding == "word2vec":
            vectors = word2vec(self.parts["train"].texts, self.config.model.d_model, seed=self.config.seed)
            body = getattr(model, "encoder", model)
            initialize_embedding(body.token_embedding, self.tokenizer, vectors)

    @property
    def names(self):
        return self.summary["labels"]

    @torch.no_grad()
    def predict(self, model, texts):
        """The probabilities (texts, classes), fp32 on the CPU."""
        device = next(model.parameters()).device
        encoded = list(map(self.encode, texts))
        lengths = list(map(len, encoded))
        result = torch.empty(len(texts), len(self.names))
        for indices in by_length(lengths, 64):
            tokens = pad([encoded[i] for i in indices], self.specials[PAD]).to(device)
            logits = model(tokens, torch.tensor([lengths[i] for i in indices], device=device))
            result[indices] = logits.float().softmax(-1).cpu()
        return result

    def baseline(self, part):
        """The most frequent class of the training part, and its share of a part; None if the run did not keep it."""
        most, labels = self.summary.get("most_frequent"), self.parts[part].labels
        return most and (f"always {most!r}", labels.count(most) / len(labels))

    def report(self, model, part):
        probabilities = self.predict(model, self.parts[part].texts).numpy()
        scores = classification_scores(self.classes[part], probabilities.argmax(-1), probabilities, self.names)
        if (baseline := self.baseline(part)) is None:
            return scores
        baseline, accuracy = baseline
        verdict = "better" if scores["accuracy"] > accuracy else "NO BETTER"
        verdict += " than the most frequent class of the training part"
        return {**scores, "baseline": baseline, "baseline_accuracy": accuracy, "verdict": verdict}
