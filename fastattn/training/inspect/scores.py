"""Numbers that say how good predictions are: of classes, of translations, of the next token.

What is counted of classes adds up: processes count their own share and sum the counts, so that any number of them
gives the scores of one. scikit-learn derives precision, recall and F1 from the counts, sacrebleu gives BLEU and chrF.
"""

import math

import numpy as np

from ..messages import UsageError, expect

N_BINS = 15  # of the reliability diagram, equally wide


def classification_scores(truth, predicted, probabilities, names):
    """Scores of predicted classes; arguments as for `count_predictions`, result as of `scores_from_counts`."""
    return scores_from_counts(count_predictions(truth, predicted, probabilities, len(names)), names)


def count_predictions(truth, predicted, probabilities, n_classes):
    """What `scores_from_counts` needs of some examples; the counts of several processes may be added, key by key.

    Args:
        truth, predicted: (examples,) int, true and predicted classes.
        probabilities: None or (examples, n_classes) float, rows summing to 1.
        n_classes: number of classes.

    Returns:
        {"confusion": (n_classes, n_classes) int64, truth by row}, and with probabilities {"bins": (N_BINS, 3) float64,
        of each bin of the probability of the predicted class: examples, sum of that probability, right ones;
        "log_loss" and "brier": () float64, sums over the examples}.

    Raises:
        UsageError: shapes that differ, a number that is no class, rows that are no probabilities.
    """
    truth, predicted = np.asarray(truth, dtype=np.int64), np.asarray(predicted, dtype=np.int64)
    expect(truth.ndim == 1, "truth", "one class an example", truth.shape)
    expect(predicted.shape == truth.shape, "predicted", f"shape {truth.shape} as truth", predicted.shape)
    for name, numbers in (("truth", truth), ("predicted", predicted)):
        wrong = numbers[(numbers < 0) | (numbers >= n_classes)]
        expect(not len(wrong), name, f"classes from 0 to {n_classes - 1}", int(wrong[0]) if len(wrong) else None)
    pairs = np.bincount(truth * n_classes + predicted, minlength=n_classes**2)
    counts = {"confusion": pairs.reshape(n_classes, n_classes)}
    if probabilities is None:
        return counts
    p = np.asarray(probabilities, dtype=np.float64)
    expect(p.shape == (len(truth), n_classes), "probabilities", f"shape {(len(truth), n_classes)}", p.shape)
    if not ((p >= 0).all() and np.allclose(p.sum(1), 1, rtol=0, atol=1e-3)):  # false for NaN too
        raise UsageError("probabilities: expected rows of numbers from 0 to 1 that sum to 1, got others")
    rows = np.arange(len(truth))
    confidence = p[rows, predicted]
    bins = (np.ceil(confidence * N_BINS) - 1).clip(0, N_BINS - 1).astype(np.int64)  # a bin holds its upper end
    columns = (None, confidence, predicted == truth)
    counts["bins"] = np.stack([np.bincount(bins, column, N_BINS).astype(np.float64) for column in columns], 1)
    # the least that is not taken for 0 is the resolution of float64, as in scikit-learn
    counts["log_loss"] = -np.log(p[rows, truth].clip(np.finfo(np.float64).eps)).sum()
    counts["brier"] = (p**2).sum() - 2 * p[rows, truth].sum() + len(truth)
    return counts


def scores_from_counts(counts, names):
    """The scores of counted predictions.

    Args:
        counts: of `count_predictions`, or a sum of several.
        names: list of str, of the classes.

    Returns:
        dict: examples; accuracy; averages: {"micro", "macro", "weighted": {precision, recall, f1}}, macro and weighted
        over the classes that occur among truth or predictions; classes: [{name, precision, recall, f1, support,
        predicted}], 0 where nothing was there to divide by; confusion: truth by row. With probabilities also log_loss
        (nats an example); brier (squared distance to the true class, summed over the classes, 0 to 2);
        expected_calibration_error; calibration: [{low, high, examples, confidence, accuracy}], None in an empty bin.

    Raises:
        UsageError: no example.
    Source: Guo et al., "On calibration of modern neural networks", 2017; Brier, "Verification of forecasts expressed in
        terms of probability", 1950.
    """
    from sklearn.metrics import precision_recall_fscore_support

    confusion = np.asarray(counts["confusion"]).astype(np.int64)
    total = int(confusion.sum())
    if not total:
        raise UsageError("classification: expected at least one example, got none")
    truth, predicted = confusion.nonzero()  # every pair of classes once, with its count as weight

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


def translation_scores(hypotheses, references):
    """Scores of translations, as plain text with its case and without tokenization of one's own.

    Args:
        hypotheses, references: lists of str, one reference each.

    Returns:
        dict: examples; bleu and chrf, 0 to 100, of the whole list, with bleu_signature and chrf_signature, which say
        how they were computed; exact_match: share that equals its reference but for white space at the ends;
        length_ratio: words of the hypotheses over words of the references.

    Raises:
        UsageError: lists of different lengths, or empty.
    Source: Post, "A call for clarity in reporting BLEU scores", 2018; Popović, "chrF", 2015.
    """
    from sacrebleu.metrics import BLEU, CHRF

    expect(len(hypotheses) == len(references), "hypotheses", f"{len(references)}, one a reference", len(hypotheses))
    expect(len(references) > 0, "translation", "at least one example", 0)
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
        tokens: how many were predicted.
        characters: of their text, None where that says nothing, for example of masked tokens.

    Returns:
        dict: loss in nats a token, perplexity, bits_per_token, and with characters bits_per_character.

    Raises:
        UsageError: no token, or no character.
    """
    expect(tokens > 0, "language model", "at least one predicted token", tokens)
    expect(characters is None or characters > 0, "language model", "at least one character", characters)
    loss = total_nats / tokens
    scores = {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_token": loss / math.log(2),
    }
    if characters is not None:
        scores["bits_per_character"] = total_nats / math.log(2) / characters
    return scores
