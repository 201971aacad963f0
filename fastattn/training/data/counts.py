"""What became of the texts of a part on their way to the model: unknown tokens, cut and empty documents, padding."""

from dataclasses import dataclass

from ..messages import UsageError, warn
from .tokenizer import count_unknown

_USELESS, _MANY = 0.9, 0.05  # shares of unknown tokens


@dataclass
class Counts:
    """Counts of a part.

    Args:
        documents: the documents that were read; 0 for a text without documents.
        tokens: the tokens that the tokenizer made of them.
        unknown: how many of these are the unknown token.
        cut: documents that lost tokens, as the model has block_size positions.
        tokens_cut: the tokens that these documents lost.
        empty: documents without a token.
        padding: share of the positions in batches that hold no token; of the training part, in its first epoch.
    """

    documents: int = 0
    tokens: int = 0
    unknown: int = 0
    cut: int = 0
    tokens_cut: int = 0
    empty: int = 0
    padding: float = 0.0

    def add(self, tokenizer, sides, longest=None):
        """Count a document: the token numbers of its text, or of text and target; longest: the most that are kept."""
        lost = 0 if longest is None else sum(max(0, len(numbers) - longest) for numbers in sides)
        self.documents += 1
        self.tokens += sum(map(len, sides))
        self.unknown += sum(count_unknown(tokenizer, numbers) for numbers in sides)
        self.cut += lost > 0
        self.tokens_cut += lost
        self.empty += not all(sides)

    def facts(self):
        """The counts by their names in a report."""
        names = {"unknown_tokens": self.unknown, "share_unknown": self.unknown / max(1, self.tokens)}
        if not self.documents:
            return names
        names |= {"documents": self.documents, "documents_cut": self.cut, "tokens_cut": self.tokens_cut}
        return {**names, "documents_without_tokens": self.empty, "padding": self.padding}

    def text(self):
        """What was lost, in words; "" if nothing was."""
        total = max(1, self.tokens)
        parts = [f"{self.unknown / total:.1%} of the tokens unknown"] if self.unknown else []
        if self.cut:
            parts.append(
                f"{self.cut:,} of {self.documents:,} documents cut ({self.tokens_cut / total:.1%} of the tokens)"
            )
        if self.empty:
            parts.append(f"{self.empty:,} documents without a token")
        if self.padding >= 0.0005:
            parts.append(f"{self.padding:.1%} padding")
        return ", ".join(parts)


def padding_share(sides, batches):
    """The share of padding in batches.

    Args:
        sides: lists of lengths, one list for each tensor that is padded.
        batches: iterable of lists of indices.
    """
    held = places = 0
    for batch in batches:
        for lengths in sides:
            chosen = [lengths[i] for i in batch]
            held, places = held + sum(chosen), places + len(chosen) * max(chosen)
    return 1 - held / places if places else 0.0


def check_known(source, counts):
    """Warn if many tokens of a part are unknown; UsageError if nearly all of the training part are."""
    for name, part in counts.items():
        share = part.unknown / max(1, part.tokens)
        if name == "train" and share > _USELESS:
            raise UsageError(f"source {source!r}: the vocabulary does not know {share:.1%} of the training tokens")
        if share > _MANY:
            warn(f"source {source!r}: the vocabulary does not know {share:.1%} of the tokens of the {name} part")
