"""Corpora from Python's standard library: reference prose, docstrings by package, Hangul and its romanisation.

The texts are read from the running interpreter; nothing is downloaded.
"""

import ast
import functools
import pathlib
import sysconfig
import unicodedata

import numpy as np

from ..messages import UsageError
from .documents import Documents
from .split import split_documents

DOCSTRING_CLASSES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "urllib", "xml")
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_FIRST_SYLLABLE, _SYLLABLES = 0xAC00, 11172
HELD_OUT_SYLLABLES = 1117  # a tenth


def topics():
    """All articles of Python's help() on topics: about 460,000 characters of English reference prose."""
    try:
        from pydoc_data.topics import topics as articles
    except ImportError as error:
        raise UsageError(
            f"text source 'topics': this Python has no pydoc_data ({error}); name a text file instead"
        ) from None
    return "".join(f"{key}\n{articles[key]}\n" for key in sorted(articles))


@functools.cache
def _docstrings():
    """(package, docstring) of the standard library's modules, classes and functions, in the order of its files."""
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if parts[0] in ("site-packages", "test", "idlelib", "lib2to3") or {"test", "tests"} & set(parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):
            continue
        documented = (node for node in ast.walk(tree) if isinstance(node, _DOCUMENTED))
        texts = filter(None, map(ast.get_docstring, documented))
        found += [(parts[0].removesuffix(".py"), text) for text in texts]
    if not found:
        raise UsageError(f"text source 'docstrings': there are no Python files in {library}")
    return found


def docstrings():
    """All distinct docstrings of the standard library, without labels, for pretraining."""
    return {"all": Documents(list(dict.fromkeys(text for _, text in _docstrings())))}


def docstring_classes():
    """Docstrings of eight packages, labelled with the package; longer than 20 characters and in one package only.

    The parts are 70, 10 and 20 % of each package; `docstring_text` leaves out the last two.
    """
    packages = {}
    for package, text in _docstrings():
        packages.setdefault(text, set()).add(package)
    chosen = [
        (text, *names)
        for text, names in packages.items()
        if len(names) == 1 and names <= set(DOCSTRING_CLASSES) and len(text) > 20
    ]
    texts, labels = map(list, zip(*chosen, strict=True))
    return split_documents(Documents(texts, labels=labels), 0.1, 0.2, seed=0)


def docstring_text():
    """The articles of help() by paragraph and all docstrings, except those that docstring_classes evaluates on."""
    parts = docstring_classes()
    tested = {text for name in ("validation", "test") for text in parts[name].texts}
    articles = [piece for piece in topics().split("\n\n") if piece.strip()]
    texts = dict.fromkeys([*articles, *(text for _, text in _docstrings() if text not in tested)])
    return {"all": Documents(list(texts))}


def _romanised(syllable):
    return unicodedata.name(syllable).removeprefix("HANGUL SYLLABLE ").lower()


def hangul(seed=0, train=20000, held_out=1000):
    """Words of 1 to 5 Hangul syllables, decomposed into letters, and their romanisation, with syllables joined by "-".

    Validation and test words consist of syllables that no training word has, so they measure the rules of spelling.

    Args:
        seed: decides the words and the held-out syllables.
        train, held_out: number of training words, and of validation and of test words.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(_SYLLABLES) + _FIRST_SYLLABLE
    pools = {"train": order[HELD_OUT_SYLLABLES:], "validation": order[:HELD_OUT_SYLLABLES]}
    pools["test"] = pools["validation"]
    parts, seen = {}, set()
    for name, pool in pools.items():
        words = []
        while len(words) < (train if name == "train" else held_out):
            word = "".join(map(chr, generator.choice(pool, generator.integers(1, 6))))
            if word not in seen:
                words.append(word)
                seen.add(word)
        texts = [unicodedata.normalize("NFD", word) for word in words]
        parts[name] = Documents(texts, targets=["-".join(map(_romanised, word)) for word in words])
    return parts


def hangul_styles():
    """Words of `hangul` in two spellings: a quarter, drawn at random, is written without hyphens."""
    parts, generator = hangul(), np.random.default_rng(1)
    for part in parts.values():
        joined = generator.random(len(part)) < 0.25
        part.targets = [t.replace("-", "") if j else t for t, j in zip(part.targets, joined, strict=True)]
    return parts


def hangul_preferences():
    """Words of `hangul` with two spellings in Latin letters: without hyphens, the better one, and with hyphens.

    As there, the syllables of validation and test words are in no training word.
    """
    parts = hangul(train=6000, held_out=500)
    for name, part in parts.items():
        part = part.select([i for i, spelling in enumerate(part.targets) if "-" in spelling])
        joined = [spelling.replace("-", "") for spelling in part.targets]
        parts[name] = Documents(part.texts, targets=joined, rejected=part.targets)
    return parts
