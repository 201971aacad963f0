"""Scores of predicted classes, of translations and of language models.

Counts of class predictions add up: each process counts its share, and the sum gives the same scores for any number of
processes. scikit-learn computes precision, recall and F1 from the counts; sacrebleu computes BLEU and chrF.
"""

import math

import numpy as np

from ..messages import UsageError, expect

N_BINS = 15  # bins of the reliability diagram, equally wide


def classification_scores(truth, predicted, probabilities, names):
    """Scores of predicted classes; arguments as for `count_predictions`, result as from `scores_from_counts`.

    Example:
        >>> from fastattn.training.inspect.scores import classification_scores
        >>> scores = classification_scores([0, 0, 1], [0, 1, 1], None, ["ham", "spam"])
        >>> round(scores["accuracy"], 2), scores["confusion"]
        (0.67, [[1, 1], [0, 1]])
    """
    return scores_from_counts(count_predictions(truth, predicted, probabilities, len(names)), names)


def count_predictions(truth, predicted, probabilities, n_classes):
    """The counts that `scores_from_counts` needs; the counts of several processes may be added, key by key.

    Args:
        truth, predicted: (examples,) int, true and predicted classes.
        probabilities: None or (examples, n_classes) float, rows summing to 1.
        n_classes: number of classes.

    Returns:
        {"confusion": (n_classes, n_classes) int64, true classes by row}, and with probabilities also {"bins": (N_BINS,
        3) float64, per bin of the predicted class's probability: examples, sum of that probability, correct examples;
        "log_loss" and "brier": () float64, sums over the examples}.

    Raises:
        UsageError: shapes differ, a number is not a class, or rows are not probabilities.
    """
    truth, predicted = np.asarray(truth, dtype=np.int64), np.asarray(predicted, dtype=np.int64)
    expect(truth.ndim == 1, "truth", "of shape (examples,)", truth.shape)
    expect(predicted.shape == truth.shape, "predicted", f"of shape {truth.shape} like truth", predicted.shape)
    for name, numbers in (("truth", truth), ("predicted", predicted)):
        wrong = numbers[(numbers < 0) | (numbers >= n_classes)]
        expect(not len(wrong), name, f"classes from 0 to {n_classes - 1}", int(wrong[0]) if len(wrong) else None)
    pairs = np.bincount(truth * n_classes + predicted, minlength=n_classes**2)
    counts = {"confusion": pairs.reshape(n_classes, n_classes)}
    if probabilities is None:
        return counts
    p = np.asarray(probabilities, dtype=np.float64)
    expect(p.shape == (len(truth), n_classes), "probabilities", f"of shape {(len(truth), n_classes)}", p.shape)
    if not ((p >= 0).all() and np.allclose(p.sum(1), 1, rtol=0, atol=1e-3)):  # also false for NaN
        raise UsageError("probabilities must be from 0 to 1 and sum to 1 in every row")
    rows = np.arange(len(truth))
    confidence = p[rows, predicted]
    bins = (np.ceil(confidence * N_BINS) - 1).clip(0, N_BINS - 1).astype(np.int64)  # a bin holds its upper end
    columns = (None, confidence, predicted == truth)
    counts["bins"] = np.stack([np.bincount(bins, column, N_BINS).astype(np.float64) for column in columns], 1)
    # clipped at the resolution of float64, as in scikit-learn
    counts["log_loss"] = -np.log(p[rows, truth].clip(np.finfo(np.float64).eps)).sum()
    counts["brier"] = (p**2).sum() - 2 * p[rows, truth].sum() + len(truth)
    return counts


def scores_from_counts(counts, names):
    """The scores of counted predictions.

    Args:
        counts: from `count_predictions`, or a sum of several.
        names: list of str, of the classes.

    Returns:
        dict: examples; accuracy; averages: {"micro", "macro", "weighted": {precision, recall, f1}}, macro and weighted
        over the classes that occur in truth or predictions; classes: [{name, precision, recall, f1, support,
        predicted}], 0 instead of 0 / 0; confusion: true classes by row. With probabilities also log_loss (nats per
        example); brier (squared distance to the true class, summed over the classes, 0 to 2);
        expected_calibration_error; calibration: [{low, high, examples, confidence, accuracy}], None in an empty bin.

    Raises:
        UsageError: there are no examples.
    Source: Guo et al., "On calibration of modern neural networks", 2017; Brier, "Verification of forecasts expressed in
        terms of probability", 1950.
    """
    from sklearn.metrics import precision_recall_fscore_support

    confusion = np.asarray(counts["confusion"]).astype(np.int64)
    total = int(confusion.sum())
    if not total:
        raise UsageError("classification scores need at least one example")
    truth, predicted = confusion.nonzero()  # each pair of classes once, weighted by its count

    def evaluate(**options):
        weights = confusion[truth, predicted]
        return precision_recall_fscore_support(truth, predicted, sample_weight=weights, zero_division=0, **options)[:3]

    averages = ("micro", "macro", "weighted")
    measures = ("precision", "recall", "f1")
    columns = evaluate(labels=np.arange(len(names)))
    scores = {
        "examples": total,
        "accuracy": float(confusion.trace() / total),
        "averages": {
            average: dict(zip(measures, map(float, evaluate(average=average)), strict=True)) for average in averages
        },
        "classes": [
            {
                "name": str(name),
                **{measure: float(column[i]) for measure, column in zip(measures, columns, strict=True)},
                "support": int(confusion[i].sum()),
                "predicted": int(confusion[:, i].sum()),
            }
            for i, name in enumerate(names)
        ],
        "confusion": confusion.tolist(),
    }
    if "bins" in counts:
        bins = np.asarray(counts["bins"])
        scores["log_loss"] = float(counts["log_loss"]) / total
        scores["brier"] = float(counts["brier"]) / total
        scores["expected_calibration_error"] = float(np.abs(bins[:, 1] - bins[:, 2]).sum() / total)
        scores["calibration"] = [
            {
                "low": i / N_BINS,
                "high": (i + 1) / N_BINS,
                "examples": int(examples),
                "confidence": float(confidence / examples) if examples else None,
                "accuracy": float(right / examples) if examples else None,
            }
            for i, (examples, confidence, right) in enumerate(bins)
        ]
    return scores


def several_classes_scores(truth, predicted, names):
    """Scores of predicted classes, of which each example has any number.

    Args:
        truth, predicted: (examples, classes) bool.
        names: list of str, of the classes.
    Returns: dict: examples; exact_match: share with exactly the true classes; averages: {"micro", "macro", "weighted":
        {precision, recall, f1}} over all classes; classes: as from `scores_from_counts`.
    Raises:
        UsageError: there are no examples.
    """
    from sklearn.metrics import precision_recall_fscore_support

    expect(len(truth) > 0, "the number of examples", "at least 1", 0)
    truth, predicted = np.asarray(truth).astype(int), np.asarray(predicted).astype(int)
    measures = ("precision", "recall", "f1")

    def evaluate(average):
        if len(names) == 1:  # scikit-learn reads a single column as one class of two
            columns = [np.atleast_1d(x) for x in _binary(truth[:, 0], predicted[:, 0])]
            return columns if average is None else [column[0] for column in columns]
        return precision_recall_fscore_support(truth, predicted, average=average, zero_division=0)[:3]

    columns = evaluate(None)
    return {
        "examples": len(truth),
        "exact_match": float((truth == predicted).all(1).mean()),
        "averages": {
            average: dict(zip(measures, map(float, evaluate(average)), strict=True))
            for average in ("micro", "macro", "weighted")
        },
        "classes": [
            {
                "name": str(name), **{m: float(column[i]) for m, column in zip(measures, columns, strict=True)},
                "support": int(truth[:, i].sum()), "predicted": int(predicted[:, i].sum()),
            }
            for i, name in enumerate(names)
        ],
    }  # fmt: skip


def _binary(truth, predicted):
    """(precision, recall, F1) of one class, 0 instead of 0 / 0."""
    hits, found, true = (truth & predicted).sum(), predicted.sum(), truth.sum()
    return hits / max(1, found), hits / max(1, true), 2 * hits / max(1, found + true)


def regression_scores(truth, predicted):
    """Scores of estimated numbers, two lists of float of equal length.

    Returns: dict: examples; mean_absolute_error; root_mean_square_error; r2, the explained share of the variance;
        pearson and spearman, correlations. The last three are None if all true numbers are equal, the correlations also
        if all estimates are.
    Raises:
        UsageError: the lists differ in length or are empty.
    """
    truth, predicted = np.asarray(truth, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    expect(truth.shape == predicted.shape, "predicted", f"of shape {truth.shape} like truth", predicted.shape)
    expect(len(truth) > 0, "the number of examples", "at least 1", 0)
    error, spread = predicted - truth, float(((truth - truth.mean()) ** 2).sum())
    varied = spread > 0 and np.ptp(predicted) > 0
    ranks = [_ranks(values) for values in (truth, predicted)]
    return {
        "examples": len(truth),
        "mean_absolute_error": float(np.abs(error).mean()),
        "root_mean_square_error": float(np.sqrt((error**2).mean())),
        "r2": 1 - float((error**2).sum()) / spread if spread else None,
        "pearson": float(np.corrcoef(truth, predicted)[0, 1]) if varied else None,
        "spearman": float(np.corrcoef(*ranks)[0, 1]) if varied else None,
    }


def _ranks(values):
    """The rank of each value; equal values have their mean rank."""
    _, numbers, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[numbers]


def translation_scores(hypotheses, references):
    """Scores of translations given as plain, cased, untokenized text.

    Args:
        hypotheses, references: lists of str, one reference per hypothesis.

    Returns:
        dict: examples; bleu and chrf, 0 to 100, over the whole list, with bleu_signature and chrf_signature, which
        state how they were computed; exact_match: share equal to the reference, except for white space at the ends;
        length_ratio: words of the hypotheses divided by words of the references.

    Raises:
        UsageError: the lists differ in length or are empty.
    Source: Post, "A call for clarity in reporting BLEU scores", 2018; Popović, "chrF", 2015.
    Example:
        >>> from fastattn.training.inspect.scores import translation_scores
        >>> scores = translation_scores(["the cat sits there"], ["the cat sits there"])
        >>> round(scores["bleu"]), scores["exact_match"]
        (100, 1.0)
    """
    from sacrebleu.metrics import BLEU, CHRF

    same = len(hypotheses) == len(references)
    expect(same, "the number of hypotheses", f"{len(references)}, one per reference", len(hypotheses))
    expect(len(references) > 0, "the number of translations", "at least 1", 0)
    bleu, chrf = BLEU(), CHRF()
    score = bleu.corpus_score(hypotheses, [references])
    equal = sum(a.strip() == b.strip() for a, b in zip(hypotheses, references, strict=True))
    return {
        "examples": len(references),
        "bleu": score.score,
        "chrf": chrf.corpus_score(hypotheses, [references]).score,
        "exact_match": equal / len(references),
        "length_ratio": score.ratio,
        "bleu_signature": bleu.get_signature().format(),
        "chrf_signature": chrf.get_signature().format(),
    }


def language_scores(total_nats, tokens, characters):
    """Scores of predicted tokens.

    Args:
        total_nats: sum of their cross-entropies.
        tokens: number of predicted tokens.
        characters: number of characters in their text; None if meaningless, as for masked tokens.

    Returns:
        dict: loss in nats per token, perplexity, bits_per_token, and with characters bits_per_character.

    Raises:
        UsageError: there are no tokens or no characters.
    Example:
        >>> import math
        >>> from fastattn.training.inspect.scores import language_scores
        >>> language_scores(total_nats=100 * math.log(2), tokens=50, characters=200)["bits_per_character"]
        0.5
    """
    expect(tokens > 0, "the number of predicted tokens", "at least 1", tokens)
    expect(characters is None or characters > 0, "the number of characters", "at least 1", characters)
    loss = total_nats / tokens
    scores = {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_token": loss / math.log(2),
    }
    if characters is not None:
        scores["bits_per_character"] = total_nats / math.log(2) / characters
    return scores
