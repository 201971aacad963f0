"""Regression: estimates a number for each document."""

import statistics

import torch

from ..inspect.scores import regression_scores
from ..messages import UsageError
from .labelled import LabelTask

_LARGEST = 1e30  # the largest number, which leaves room for calculations in fp32


class Regression(LabelTask):
    """Targets are the numbers. The loss counts them in standard deviations of the training part, squared."""

    loss_in = "squared standard deviations"
    needed = ("mean", "deviation")

    def learn_labels(self, labels):
        source = self.config.data.source
        if len(set(labels)) < 2:
            raise UsageError(f"source {source!r}: all numbers of the training part are {labels[0]!r}")
        if (largest := max(map(abs, labels))) > _LARGEST:
            raise UsageError(f"source {source!r}: numbers must be at most {_LARGEST:g} in size, got {largest!r}")
        mean, deviation = statistics.fmean(labels), statistics.pstdev(labels)
        if deviation < 1 / _LARGEST or deviation < 1e-6 * abs(mean):  # fp32 does not tell them apart
            raise UsageError(f"source {source!r}: the numbers are too close together, {mean:g} ± {deviation:g}")
        return {"labels": [], "mean": mean, "deviation": deviation, "median": statistics.median(labels)}

    def targets_of(self, labels, part):
        return torch.tensor(labels, dtype=torch.float32)

    @staticmethod
    def label_options(config, summary):
        return {"n_classes": 1, "label_kind": "number", "number_range": (summary["mean"], summary["deviation"])}

    def predict(self, model, texts, pairs=None):
        """The estimates (texts,), fp32 on the CPU."""
        return self.outputs(model, texts, pairs)

    def describe(self, row):
        return {"number": row.item()}, [f"{row.item():.6g}"]

    def report(self, model, part):
        scores = regression_scores(self.parts[part].labels, self._outputs(model, self.examples[part]).tolist())
        labels, median = self.parts[part].labels, self.summary["median"]
        error = statistics.fmean(abs(label - median) for label in labels)
        verdict = "better" if scores["mean_absolute_error"] < error else "NO BETTER"
        verdict += " than the median of the training part"
        baseline = f"always {median:g}, the median of the training part"
        return {**scores, "baseline": baseline, "baseline_mean_absolute_error": error, "verdict": verdict}
