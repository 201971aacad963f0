"""Classification of documents: each has one class."""

from collections import Counter

import torch

from ..data.tables import looks_like_numbers
from ..inspect.scores import classification_scores
from ..messages import UsageError
from .base import summed_loss_of_logits
from .labelled import LabelTask


def balanced_weights(summary):
    """The weight of each class: documents / (classes * documents of the class), of the training part."""
    counts = summary["class_counts"]
    return [sum(counts) / (len(counts) * count) for count in counts]


def numbers_of(names, labels, part, source):
    """The numbers of the classes in tuples of classes.

    Raises:
        UsageError: a class is not in `names`, those of the training part.
    """
    numbers = {name: number for number, name in enumerate(names)}
    if unknown := sorted({name for label in labels for name in label} - numbers.keys()):
        which = "" if part == "all" else f" of the {part} part"
        raise UsageError(
            f"source {source!r}: class {unknown[0]!r}{which} is not in the training part; "
            "`fastattn data split` draws new parts, with each class in the training part"
        )
    return [[numbers[name] for name in label] for label in labels]


class Classification(LabelTask):
    """Targets are the numbers of classes: those of the training part, in alphabetical order."""

    has_accuracy = True

    def learn_labels(self, labels):
        counted, source = Counter(labels), self.config.data.source
        names = sorted(counted)
        if len(names) < 2:
            got = f"only {names[0]!r}" if names else "none"
            raise UsageError(f"source {source!r} must have at least two classes, got {got}")
        if looks_like_numbers(labels):
            raise UsageError(
                f"source {source!r}: the labels are {len(names)} different numbers such as {names[0]} and {names[1]}; "
                "to estimate numbers (regression), set --data.columns.label_kind number"
            )
        most = max(names, key=counted.__getitem__)
        return {"labels": names, "most_frequent": most, "class_counts": [counted[name] for name in names]}

    def targets_of(self, labels, part):
        numbers = numbers_of(self.names, [(label,) for label in labels], part, self.config.data.source)
        return torch.tensor(numbers, dtype=torch.int64).view(-1)

    @staticmethod
    def label_options(config, summary):
        balanced = config.class_weights == "balanced"
        return {"n_classes": len(summary["labels"]), "class_weights": balanced_weights(summary) if balanced else None}

    @property
    def names(self):
        return self.summary["labels"]

    def count(self, rows):
        """What the summed loss is divided by to get the mean: the documents, or the sum of their weights."""
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

    def predict(self, model, texts, pairs=None):
        """The probabilities (texts, classes), fp32 on the CPU."""
        return self.outputs(model, texts, pairs).softmax(-1)

    def describe(self, row):
        chance, name = max(zip(row.tolist(), self.names, strict=True))
        probabilities = dict(zip(self.names, row.tolist(), strict=True))
        return {"class": name, "probability": chance, "probabilities": probabilities}, [name, f"{chance:.3f}"]

    def baseline(self, part):
        """The most frequent class of the training part, and its share of a part; None if the run did not keep it."""
        most, labels = self.summary.get("most_frequent"), self.parts[part].labels
        return most and (f"always {most!r}", labels.count(most) / len(labels))

    def report(self, model, part):
        probabilities = self._outputs(model, self.examples[part]).softmax(-1).numpy()
        scores = classification_scores(
            self.targets[part].tolist(), probabilities.argmax(-1), probabilities, self.names
        )  # fmt: skip
        if (baseline := self.baseline(part)) is None:
            return scores
        baseline, accuracy = baseline
        verdict = "better" if scores["accuracy"] > accuracy else "NO BETTER"
        verdict += " than the most frequent class of the training part"
        return {**scores, "baseline": baseline, "baseline_accuracy": accuracy, "verdict": verdict}
