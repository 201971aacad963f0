"""The training, validation and test part of a source of documents."""

import numpy as np

from ..messages import UsageError
from .documents import PARTS, join_documents
from .sources import read_documents
from .split import split_documents

SPLIT_SEED = 0  # the same parts for every seed of a run, so that runs are comparable


def read_parts(data):
    """{part: Documents} of a DataConfig: train, validation and usually test; UsageError as read_documents."""
    parts = read_documents(data.source, data.columns, target_source=data.target_source, unit=data.unit)
    if "all" in parts:
        parts = split_documents(parts["all"], data.validation_fraction, data.test_fraction, SPLIT_SEED)
    elif "train" not in parts:
        raise UsageError(f"source {data.source!r} has no training part, only {', '.join(parts)}")
    elif "validation" not in parts:
        parts = parts | split_documents(parts["train"], data.validation_fraction, 0.0, SPLIT_SEED)
    if data.train_limit is not None:
        parts["train"] = limit_documents(parts["train"], data.train_limit)
    return {name: parts[name] for name in PARTS if name in parts}


def read_whole(data):
    """All documents of a DataConfig, its parts joined; UsageError as read_documents."""
    parts = read_documents(data.source, data.columns, target_source=data.target_source, unit=data.unit)
    return join_documents(parts.values())


def limit_documents(documents, limit):
    """A fixed random choice of `limit` documents, balanced over the classes."""
    order = np.random.default_rng(0).permutation(len(documents)).tolist()
    if documents.labels is None:
        return documents.select(sorted(order[:limit]))
    seen, ranked = {}, []
    for i in order:
        label = documents.labels[i]
        seen[label] = seen.get(label, 0) + 1
        ranked.append((seen[label], i))
    return documents.select(sorted(i for _, i in sorted(ranked)[:limit]))
