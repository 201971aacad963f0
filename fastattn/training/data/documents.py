"""Documents with their labels, targets and groups."""

import json
from dataclasses import dataclass, fields

from ..files import write_atomic

PARTS = ("train", "validation", "test")


@dataclass
class Documents:
    """Texts with parallel lists of their attributes; a missing list is None.

    Args:
        texts: the texts to read.
        labels: their classes; tuples of names for documents with several, floats for numbers to estimate.
        targets: the texts to predict from them, for example translations.
        groups: a split keeps documents of one group together, for example those of one file.
        rejected: texts that are worse than the targets.
        pairs: second texts, which are read with the first ones.
    """

    texts: list
    labels: list | None = None
    targets: list | None = None
    groups: list | None = None
    rejected: list | None = None
    pairs: list | None = None

    def __len__(self):
        return len(self.texts)

    def select(self, indices):
        """The documents at these indices, in the order of the indices."""
        picked = {}
        for column in fields(self):
            values = getattr(self, column.name)
            picked[column.name] = None if values is None else [values[i] for i in indices]
        return Documents(**picked)


def join_documents(parts):
    """The Documents of several parts, one after the other."""
    whole = {column.name: [] for column in fields(Documents)}
    for part in parts:
        for name, values in whole.items():
            values.extend(getattr(part, name) or [])
    return Documents(**{name: values if values or name == "texts" else None for name, values in whole.items()})


def write_documents(path, documents, messages=None):
    """Write documents as JSON lines with the keys text, label, target, group, rejected, pair.

    messages: None, or the key of conversations, which are then read from the texts and written as they were.
    """
    names = {column.name: column.name.removesuffix("s") for column in fields(Documents)}
    columns = {key: getattr(documents, name) for name, key in names.items()}
    present = {key: values for key, values in columns.items() if values is not None}
    if messages is not None:
        conversations = map(json.loads, present.pop("text"))
        named = [[{"role": role, "content": content} for role, content in items] for items in conversations]
        present = {messages: named, **present}
    rows = (dict(zip(present, row, strict=True)) for row in zip(*present.values(), strict=True))
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
