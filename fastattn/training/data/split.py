"""Splits documents into training, validation and test parts that share no text."""

import collections

import numpy as np

from ..messages import UsageError
from .documents import PARTS
from .tables import looks_like_numbers


def split_documents(documents, validation_fraction, test_fraction, seed, *, stratify=True):
    """Draw the parts of a split.

    Documents with the same text or the same group (for example from one file) stay in one part.

    Args:
        documents: Documents.
        validation_fraction, test_fraction: shares of all documents.
        seed: the same seed gives the same split.
        stratify: if each document has one class, draw these fractions of every class; the training part then has at
            least one document of each. If documents have several classes, the fractions are those of the whole.

    Returns:
        {"train": Documents, "validation": ..., "test": ...}, in the order of the source; no part for a fraction of 0.

    Raises:
        UsageError: a part would be empty.
    """
    fractions = {"test": test_fraction, "validation": validation_fraction}
    labels, names = _classes(documents, stratify)
    strata = collections.defaultdict(list)  # a unit has the class of its first document
    units = _units(documents)
    for unit in units:
        strata[labels[unit[0]]].append(unit)
    generator = np.random.default_rng(seed)
    parts = {name: [] for name in PARTS}
    owed = dict.fromkeys(fractions, 0.0)  # remainders of rounding, carried over to the next class
    for stratum in strata.values():
        total = sum(map(len, stratum))
        *order, last = generator.permutation(len(stratum)).tolist()  # the last one is for training
        order = iter(order)
        for name, fraction in fractions.items():
            owed[name] += fraction * total
            while owed[name] >= 0.5 and (index := next(order, None)) is not None:
                parts[name] += stratum[index]
                owed[name] -= len(stratum[index])
        for index in (*order, last):
            parts["train"] += stratum[index]
    _complete_training(parts, names, units)
    fractions["train"] = 1.0
    parts = {name: documents.select(sorted(chosen)) for name, chosen in parts.items() if fractions[name]}
    if empty := [name for name, part in parts.items() if not len(part)]:
        raise UsageError(
            f"split: {len(documents)} documents are too few: the {empty[0]} part would be empty; equal texts and files "
            f"stay together, which leaves {len(units)}, and the training part needs one of each class ({len(strata)})"
        )
    return parts


def _classes(documents, stratify):
    """For each document the class to stratify by, or None, and the tuple of the classes that training must have."""
    labels = documents.labels or [None] * len(documents)
    if not stratify or not isinstance(labels[0], str) or looks_like_numbers(labels):
        return [None] * len(labels), [label if isinstance(label, tuple) else () for label in labels]
    return labels, [(label,) for label in labels]


def _complete_training(parts, names, units):
    """Move units to the training part until it has each class: a unit of several may be the only one of a class.

    names: the classes of each document.
    """
    known = {name for i in parts["train"] for name in names[i]}
    held_out = {i: name for name in parts if name != "train" for i in parts[name]}
    for unit in units:
        if unit[0] in held_out and not known.issuperset(name for i in unit for name in names[i]):
            name = held_out[unit[0]]
            parts[name] = [i for i in parts[name] if i not in unit]
            parts["train"] += unit
            known |= {name for i in unit for name in names[i]}


def _units(documents):
    """Lists of indices of documents that are connected by equal texts or groups."""
    parent = list(range(len(documents)))

    def root(i):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    for values in filter(None, (documents.texts, documents.groups)):
        first = {}
        for i, value in enumerate(values):
            a, b = root(first.setdefault(value, i)), root(i)
            parent[max(a, b)] = min(a, b)
    units = collections.defaultdict(list)
    for i in range(len(documents)):
        units[root(i)].append(i)
    return list(units.values())


def shared_texts(parts):
    """The number of documents of a part whose text is also in an earlier part: {(earlier, part): count > 0}."""
    shared, seen = {}, {}
    for name, documents in parts.items():
        for earlier, texts in seen.items():
            if count := sum(text in texts for text in documents.texts):
                shared[earlier, name] = count
        seen[name] = set(documents.texts)
    return shared
