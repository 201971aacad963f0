"""Cleaning of documents, with a report of what was changed and removed."""

import collections
import html
import html.parser
import re
import unicodedata
from dataclasses import asdict, dataclass, replace
from typing import Literal

from ..messages import expect

_SPACES = re.compile(r"[^\S\n]+")
_BLANK_LINES = re.compile(r"\n\s*\n")
# invisible characters without meaning; joiners and direction marks stay, because some scripts need them
_INVISIBLE = {0x00AD, 0x200B, 0x2060, 0xFEFF}


@dataclass
class CleanConfig:
    """The cleaning steps for every document, in this order.

    Args:
        markup: remove HTML and XML tags, comments, scripts and styles, and decode entities
        normalization: Unicode normal form; null = none; NFKC also replaces compatibility characters such as ligatures
        control: remove control characters (except tab and newline), soft hyphens, zero-width spaces and byte order
            marks
        whitespace: collapse runs of spaces, strip the ends of lines, and keep at most one empty line in a row
        lowercase: convert to lower case
        min_characters: remove shorter documents
        max_characters: remove longer documents; null = no limit
        duplicates: of documents that are equal after these steps, keep only the first
    """

    markup: bool = False
    normalization: Literal["NFC", "NFKC"] | None = "NFC"
    control: bool = True
    whitespace: bool = True
    lowercase: bool = False
    min_characters: int = 1
    max_characters: int | None = None
    duplicates: bool = True

    def __post_init__(self):
        expect(self.min_characters >= 0, "min_characters", "at least 0", self.min_characters)
        longest = self.max_characters
        expect(
            longest is None or longest >= max(1, self.min_characters),
            "max_characters",
            f"null or at least min_characters = {self.min_characters}",
            longest,
        )


class _TextOf(html.parser.HTMLParser):
    """Collects the visible text of a page; tags of block elements become line breaks."""

    INLINE = frozenset(
        ("a", "abbr", "b", "bdo", "cite", "code", "em", "font", "i", "kbd", "mark", "q", "s", "small", "span", "strong",
         "sub", "sup", "tt", "u", "var")
    )  # fmt: skip
    HIDDEN = frozenset(("script", "style", "template"))

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.pieces, self.hidden = [], 0

    def handle_starttag(self, tag, attrs):
        self.hidden += tag in self.HIDDEN
        if tag not in self.INLINE:
            self.pieces.append("\n")

    def handle_endtag(self, tag):
        self.hidden = max(0, self.hidden - (tag in self.HIDDEN))
        if tag not in self.INLINE:
            self.pieces.append("\n")

    def handle_data(self, data):
        if not self.hidden:
            self.pieces.append(data)


def _without_markup(text):
    if "<" not in text:
        return html.unescape(text)
    parser = _TextOf()
    parser.feed(text)
    parser.close()
    return "".join(parser.pieces).strip("\n")


def _without_control(text):
    if text.isprintable():  # no control character, but perhaps an invisible one
        return text.translate(dict.fromkeys(_INVISIBLE)) if not text.isascii() else text
    kept = (c for c in text if c in "\n\t" or (unicodedata.category(c) != "Cc" and ord(c) not in _INVISIBLE))
    return "".join(kept)


def _even_whitespace(text):
    lines = (_SPACES.sub(" ", line).strip() for line in text.split("\n"))
    return _BLANK_LINES.sub("\n\n", "\n".join(lines)).strip("\n")


def cleaning_steps(config):
    """The steps of a CleanConfig as {name: function of a text}, in their order."""
    steps = {
        "markup": config.markup and _without_markup,
        "normalization": config.normalization and (lambda text: unicodedata.normalize(config.normalization, text)),
        "control": config.control and _without_control,
        "whitespace": config.whitespace and _even_whitespace,
        "lowercase": config.lowercase and str.lower,
    }
    return {name: step for name, step in steps.items() if step}


def clean(documents, config=None):
    """Clean all texts of every document, then remove documents that are too short, too long or duplicates.

    Args:
        documents: Documents; they are not modified.
        config: CleanConfig, default CleanConfig().

    Returns:
        (Documents, report): the report counts the documents that each step changed, the removed documents by reason,
            and the duplicates whose labels differ.
    """
    config = config or CleanConfig()
    steps = cleaning_steps(config)
    changed = collections.Counter(dict.fromkeys(steps, 0))
    removed = dict.fromkeys(("too short", "too long", "duplicate"), 0)

    def cleaned(text):
        for name, step in steps.items():
            new = step(text)
            changed[name] += new != text
            text = new
        return text

    texts = [cleaned(text) for text in documents.texts]
    others = {name: getattr(documents, name) for name in ("pairs", "targets", "rejected")}
    others = {name: list(map(cleaned, column)) for name, column in others.items() if column is not None}
    first, kept, conflicts = {}, [], 0
    for i, text in enumerate(texts):
        sides = (text, *(column[i] for column in others.values()))
        earlier = first.setdefault(sides, i)
        if min(map(len, sides)) < config.min_characters:
            removed["too short"] += 1
        elif config.max_characters is not None and max(map(len, sides)) > config.max_characters:
            removed["too long"] += 1
        elif config.duplicates and earlier != i:
            removed["duplicate"] += 1
            conflicts += documents.labels is not None and documents.labels[earlier] != documents.labels[i]
        else:
            kept.append(i)
    result = replace(documents, texts=texts, **others).select(kept)
    report = {
        "documents": {"before": len(documents), "after": len(result)},
        "characters": {"before": sum(map(len, documents.texts)), "after": sum(map(len, result.texts))},
        "changed by": dict(changed),
        "removed": removed,
        "duplicates with another label": conflicts,
        "config": asdict(config),
    }
    return result, report
