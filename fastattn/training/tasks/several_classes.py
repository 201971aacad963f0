"""Classification of documents that have any number of classes at once."""

from collections import Counter

import torch
import torch.nn.functional as F

from ..inspect.scores import several_classes_scores
from ..messages import UsageError
from .classification import Classification, numbers_of
from .labelled import LabelTask


class SeveralClasses(LabelTask):
    """Targets (documents, classes) are 1 for the classes that a document has, else 0, float32."""

    unit = "class of a document"

    def learn_labels(self, labels):
        counted = Counter(name for label in labels for name in label)
        if not counted:
            raise UsageError(f"source {self.config.data.source!r}: no document of the training part has a class")
        names = sorted(counted)
        most = Counter(labels).most_common(1)[0][0]
        return {"labels": names, "most_frequent": list(most), "class_counts": [counted[name] for name in names]}

    def targets_of(self, labels, part):
        targets = torch.zeros(len(labels), len(self.names))
        for row, numbers in zip(targets, numbers_of(self.names, labels, part, self.config.data.source), strict=True):
            row[numbers] = 1.0
        return targets

    @staticmethod
    def label_options(config, summary):
        return {"n_classes": len(summary["labels"]), "label_kind": "classes"}

    names = Classification.names
    further_scores = Classification.further_scores

    @property
    def more_sums(self):
        return 3 * len(self.names)

    def sums(self, model, rows, device):
        tokens, lengths, targets = (tensor.to(device) for tensor in rows)
        logits = model(tokens, lengths).float()
        loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum").double().item()
        predicted, truth = logits > 0, targets > 0
        counts = (x.sum(0).tolist() for x in (predicted & truth, predicted, truth))
        return (loss, int((predicted == truth).sum()), targets.numel(), *(n for column in counts for n in column))

    def predict(self, model, texts, pairs=None):
        """The probability (texts, classes) of each class, fp32 on the CPU; they do not sum to 1."""
        return self.outputs(model, texts, pairs).sigmoid()

    def describe(self, row):
        probabilities = dict(zip(self.names, row.tolist(), strict=True))
        chosen = [name for name, chance in probabilities.items() if chance > 0.5]
        cells = [self.config.data.columns.label_separator.join(chosen), f"{row.max().item():.3f}"]
        return {"classes": chosen, "probabilities": probabilities}, cells

    def report(self, model, part):
        truth = self.targets[part].numpy() > 0
        scores = several_classes_scores(truth, self._outputs(model, self.examples[part]).numpy() > 0, self.names)
        most = tuple(self.summary["most_frequent"])
        baseline = sum(label == most for label in self.parts[part].labels) / len(truth)
        verdict = "better" if scores["exact_match"] > baseline else "NO BETTER"
        verdict += " than the most frequent classes of the training part"
        named = f"always {', '.join(most)}" if most else "never a class"
        return {**scores, "baseline": named, "baseline_exact_match": baseline, "verdict": verdict}
