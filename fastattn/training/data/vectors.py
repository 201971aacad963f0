"""Texts as vectors: one-hot, bag of words, TF-IDF and Word2Vec, which also initialises an embedding.

scikit-learn counts the words, and gensim trains the word vectors (the extras eval and words).
"""

import re
import zlib

import numpy as np
import torch

from ..messages import UsageError, expect


def one_hot(numbers, vocab_size):
    """Token numbers (...,) int as vectors (..., vocab_size) of float32: a one at the number, zeros elsewhere.

    Raises:
        UsageError: a number is outside the vocabulary.
    """
    numbers = torch.as_tensor(numbers, dtype=torch.int64)
    if numbers.numel() and not 0 <= numbers.min() <= numbers.max() < vocab_size:
        raise UsageError(f"one_hot: numbers must be from 0 to {vocab_size - 1}, got {numbers.min()} to {numbers.max()}")
    return torch.nn.functional.one_hot(numbers, vocab_size).float()


def bag_of_words(*, tfidf=False, max_ngram=1, max_features=None, min_documents=1):
    """An unfitted vectorizer of scikit-learn: fit_transform(texts) -> sparse (documents, words).

    Args:
        tfidf: sublinear term frequency times inverse document frequency, rows of length 1; False: 1 if the document has
            the word, else 0.
        max_ngram: longest sequence of words that counts as a feature.
        max_features: number of most frequent features to keep; None = all.
        min_documents: features in fewer documents are left out.

    Raises:
        UsageError: max_ngram or max_features is below 1.
    """
    from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer

    for name, value in (("max_ngram", max_ngram), ("max_features", max_features)):
        expect(value is None or value >= 1, name, "at least 1", value)
    options = {"ngram_range": (1, max_ngram), "max_features": max_features, "min_df": min_documents}
    return TfidfVectorizer(sublinear_tf=True, **options) if tfidf else CountVectorizer(binary=True, **options)


def count_words(vectorizer, texts):
    """vectorizer.fit_transform(texts); UsageError if the texts have no words."""
    try:
        return vectorizer.fit_transform(texts)
    except ValueError as error:
        raise UsageError(f"the training texts have no words of two letters or more ({error})") from None


def words_of(text):
    """The lower-cased words of a text, as in scikit-learn's vectorizers but including single letters."""
    return re.findall(r"\w+", text.lower())


def word2vec(texts, dimension=100, *, window=5, min_count=2, epochs=10, seed=0):
    """Word vectors learnt from texts: skip-gram with negative sampling.

    Args:
        texts: list of str.
        dimension: length of a vector.
        window: number of context words on each side.
        min_count: rarer words get no vector.
        epochs: passes over the texts.
        seed: the same seed gives the same vectors, as there is one worker.

    Returns:
        gensim KeyedVectors: `vectors[word]` is float32 (dimension,); most_similar(word) lists the nearest words.

    Raises:
        UsageError: no word occurs min_count times.
    Source: Mikolov et al., "Distributed representations of words and phrases and their compositionality", 2013.
    """
    from gensim.models import Word2Vec

    sentences = [words_of(text) for text in texts]
    model = Word2Vec(
        vector_size=dimension, window=window, min_count=min_count, sg=1, workers=1, seed=seed,
        hashfxn=lambda word: zlib.crc32(str(word).encode()),  # Python's own hash differs from process to process
    )  # fmt: skip
    model.build_vocab(sentences)
    if not len(model.wv):
        raise UsageError(f"word2vec: no word occurs {min_count} times in the {len(texts)} texts")
    model.train(sentences, total_examples=len(sentences), epochs=epochs)
    return model.wv


@torch.no_grad()
def initialize_embedding(embedding, tokenizer, vectors):
    """Copy word vectors into the embedding rows of tokens that are words; other rows do not change.

    The vectors are scaled to the standard deviation of the embedding.

    Args:
        embedding: nn.Embedding (tokenizer.vocab_size, dimension of the vectors).
        tokenizer: with token_of(number) -> str.
        vectors: from `word2vec`.

    Returns:
        The number of rows set.

    Raises:
        UsageError: the dimensions differ.
    """
    if embedding.embedding_dim != vectors.vector_size:
        raise UsageError(f"word vectors must have dimension {embedding.embedding_dim}, got {vectors.vector_size}")
    factor = float(embedding.weight.std()) / float(np.std(vectors.vectors))
    count = 0
    for number in range(tokenizer.vocab_size):
        word = tokenizer.token_of(number).lower()
        if word in vectors:
            embedding.weight[number] = torch.from_numpy(vectors[word] * factor)
            count += 1
    return count
