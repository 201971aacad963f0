"""A baseline for networks: a linear classifier on word counts."""

import time

import numpy as np

from ..data.vectors import bag_of_words, count_words
from ..inspect.scores import classification_scores
from ..messages import UsageError


def bag_of_words_baseline(train, test, *, tfidf=False, max_ngram=1):
    """Logistic regression on the words of a text.

    Args:
        train, test: Documents with labels.
        tfidf, max_ngram: as for `vectors.bag_of_words`.

    Returns:
        dict: the classification_scores of `test` over the classes of both; architecture; parameters; seconds of
        counting and fitting.

    Raises:
        UsageError: labels are missing, there is only one class, or there are no words.
    """
    from sklearn.linear_model import LogisticRegression

    for name, documents in (("train", train), ("test", test)):
        if not documents.labels:
            raise UsageError(f"the {name} part must have labels, got {len(documents)} documents without")
        if not isinstance(documents.labels[0], str) or documents.pairs:
            raise UsageError("the baseline is for documents with one text and one class (label_kind class, no pair)")
    if len(set(train.labels)) < 2:
        raise UsageError(f"the train part must have at least two classes, got only {train.labels[0]!r}")
    start = time.perf_counter()
    vectorizer = bag_of_words(tfidf=tfidf, max_ngram=max_ngram)
    features = count_words(vectorizer, train.texts)
    # TF-IDF rows have length 1, less than rows of ones, so the same confidence needs larger weights
    model = LogisticRegression(C=10.0 if tfidf else 1.0, max_iter=1000).fit(features, train.labels)
    seconds = time.perf_counter() - start
    names = sorted({*train.labels, *test.labels})
    number = {name: i for i, name in enumerate(names)}
    probabilities = np.zeros((len(test), len(names)))
    probabilities[:, [number[name] for name in model.classes_]] = model.predict_proba(vectorizer.transform(test.texts))
    truth = [number[label] for label in test.labels]
    kind, grams = "TF-IDF" if tfidf else "bag", "words" if max_ngram == 1 else f"up to {max_ngram} words"
    return {
        "architecture": f"{kind} of {grams}, logistic regression",
        "parameters": model.coef_.size + model.intercept_.size,
        "seconds": seconds,
        **classification_scores(truth, probabilities.argmax(1), probabilities, names),
    }
