"""Figures of an evaluation: confusion matrix, reliability diagram, attention map. Drawn without a display.

Labels come from data, so formula signs and characters without a glyph in the font are escaped.
"""

import functools
import io
import math

import numpy as np
import torch

from ..files import write_atomic
from ..messages import expect


def new_figure(width, height, layout="constrained"):
    """A standalone figure, sized in inches; pyplot would keep a global reference."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def save_png(figure, path):
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomic(path, picture.getvalue())


@functools.cache
def _glyphs():
    """The code points that the font has."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties())).get_charmap())


def label(text, limit=24):
    """A text as matplotlib can draw it: one line, at most `limit` characters, no formulas."""
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    shown = (c if c.isprintable() and ord(c) in _glyphs() else c.encode("unicode_escape").decode() for c in text)
    return "".join(shown).replace("$", r"\$")


def plot_confusion(path, confusion, names):
    """Draw a confusion matrix, true classes by row, coloured by the share of the row; with counts if they are legible.

    Args:
        path: path of the PNG.
        confusion: (classes, classes) counts.
        names: list of str.
    """
    counts = np.asarray(confusion)
    share = counts / counts.sum(1, keepdims=True).clip(1)
    cell = 0.55 if len(names) <= 20 else min(0.12, 24 / len(names))  # inches; viewers still open a picture of 24
    texts = [label(name) for name in names]
    figure, (axes,) = _matrices(share[None], texts, texts, cell, 1.0, "Blues", "share of the true class")
    axes.set(xlabel="predicted", ylabel="true")
    if len(names) <= 20:
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, f"{count}", ha="center", va="center", fontsize=8, color=colour)
    save_png(figure, path)


def plot_calibration(path, bins):
    """Draw a reliability diagram: accuracy and number of predictions by predicted probability.

    Args:
        path: path of the PNG.
        bins: `calibration` of `scores.scores_from_counts`.
    """
    figure = new_figure(5, 6)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    low, width = [row["low"] for row in bins], 1 / len(bins)
    style = {"width": width, "align": "edge", "edgecolor": "white"}
    top.bar(low, [row["accuracy"] or 0.0 for row in bins], **style)
    filled = [row for row in bins if row["examples"]]
    means = [row["confidence"] for row in filled], [row["accuracy"] for row in filled]
    top.plot(*means, "o", color="black", ms=4, label="means of a bin")
    top.plot([0, 1], [0, 1], "--", color="gray", label="as accurate as confident")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    top.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy")
    bottom.bar(low, [row["examples"] for row in bins], **style)
    bottom.set(xlabel="probability of the predicted class", ylabel="examples")
    save_png(figure, path)


def plot_attention(path, weights, tokens, keys=None):
    """Draw attention weights, one panel per head, queries by row.

    Args:
        path: path of the PNG.
        weights: (n_head, seqlen_q, seqlen_k), for example from `attention_maps.attention_maps`.
        tokens: list of str, the texts of the queries.
        keys: list of str, the texts of the keys; None: the same tokens.

    Raises:
        UsageError: the numbers of tokens do not match the weights.
    Example:
        >>> from pathlib import Path
        >>> from fastattn.training.inspect.figures import plot_attention
        >>> plot_attention(Path("attention.png"), torch.rand(4, 2, 2).softmax(-1), ["the", "cat"])
    """
    weights = torch.as_tensor(weights).detach().float().cpu().numpy()
    keys = tokens if keys is None else keys
    expect(weights.ndim == 3 and weights.size, "weights", "of shape (n_head, seqlen_q, seqlen_k)", weights.shape)
    sizes = len(tokens), len(keys)
    expect(weights.shape[1:] == sizes, "the numbers of tokens and keys", f"{weights.shape[1:]}", sizes)
    cell = min(0.2, 24 / math.ceil(len(weights) ** 0.5) / max(len(tokens), len(keys)))  # inches
    texts = ([label(token.replace(" ", "␣"), 12) for token in line] for line in (tokens, keys))
    figure, panels = _matrices(weights, *texts, cell, weights.max(), "viridis", "weight")
    across = math.ceil(len(weights) ** 0.5)
    for head, axes in enumerate(panels):
        axes.set_title(f"head {head}", fontsize=9)
        if head % across == 0:
            axes.set_ylabel("query")
        if head + across >= len(panels):
            axes.set_xlabel("key, to which it attends")
    save_png(figure, path)


def _matrices(matrices, rows, columns, cell, top, colours, bar):
    """A figure of matrices of equal size in a square grid, with a colour bar from 0 to `top`: (figure, axes).

    All sizes are known, so everything is placed in inches; the layout engine takes seconds for hundreds of labels.

    Args:
        matrices: (n, len(rows), len(columns)).
        rows, columns: labels, shown left of the first panels and below the lowest ones.
        cell: inches per cell; if that is too narrow for letters, only every nth label is shown.
    """
    across = math.ceil(len(matrices) ** 0.5)
    step = max(math.ceil(0.09 / cell), math.ceil(max(len(rows), len(columns)) / 200))
    points = min(9.0, 65 * cell * step)
    left, bottom = (0.5 + 0.62 * points / 72 * max(map(len, texts)) for texts in (rows, columns))
    width, height = (max(len(texts) * cell, 2.0) for texts in (columns, rows))
    gap = 0.35
    total = left + across * (width + gap) + 1.0, bottom + math.ceil(len(matrices) / across) * (height + gap)
    figure = new_figure(*total, layout=None)

    def add_axes(x, y, width, height):
        return figure.add_axes((x / total[0], y / total[1], width / total[0], height / total[1]))

    panels = []
    for number, matrix in enumerate(matrices):
        row, column = divmod(number, across)
        axes = add_axes(left + column * (width + gap), total[1] - (row + 1) * (height + gap), width, height)
        image = axes.imshow(matrix, vmin=0, vmax=top, cmap=colours, aspect="auto")
        axes.set(xticks=[], yticks=[])
        if column == 0:
            axes.set_yticks(range(0, len(rows), step), rows[::step], fontsize=points)
        if number + across >= len(matrices):
            axes.set_xticks(range(0, len(columns), step), columns[::step], fontsize=points, rotation=90)
        panels.append(axes)
    height = min(4.0, height)
    figure.colorbar(image, cax=add_axes(total[0] - 0.9, total[1] - gap - height, 0.15, height), label=bar)
    return figure, panels
