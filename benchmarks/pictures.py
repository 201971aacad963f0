"""Pictures of benchmarks: one SVG and one PNG for each benchmark function, with a bar for each case.

    pytest benchmarks --pictures DIR
    python benchmarks/pictures.py DIR FILE... [--only WORD ...] [--without WORD ...]

A bar goes from 1 (eager PyTorch) to the ratio, on a logarithmic axis, so twice as fast and half as fast are equally
long. The black mark of a case is what it would reach at the rate of the machine: that of a copy of its bytes, or of a
large matrix product, measured in the same run. FILE is a results.jsonl, the JSON of --benchmark-json, or a result file.
"""

import argparse
import math
import re
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, NullLocator
from measured import machine_line, read

COLOURS = ("tab:blue", "#b0b0b0", "#d8c08c", "#c3a6c9", "#9fc7b5")  # fastattn first, then its peers
# {function: (title, what the parts of a case mean)}, where they do not say it themselves
NAMES = {
    "training_step": ("encoder layer, training step", "{}, dropout {}, d_model {}"),
    "inference": ("encoder layer, inference", "{}, d_model {}"),
    "attention": ("attention (batch × heads × tokens × head_dim)", ""),
    "dropout": ("attention with dropout", ""),
    "bias_with_gradient": ("attention with a bias that gets a gradient", ""),
    "half_padded_batch": ("attention, half of the tokens are padding", ""),
    "contiguous": ("attention on a cache (batch × heads × key heads × keys × head_dim)", ""),
    "paged": ("attention on a cache in pages", "{} queries, {}"),
    "several_queries": ("attention on a cache, several queries", "{} queries, {}"),
    "append": ("attention on a cache, with new keys appended", ""),
    "feed_forward": ("feed-forward block", "{}, {}, d_model {}, {}, dropout {}"),
    "activation": ("activation and dropout alone", "{}, {}, dropout {}"),
    "norm": ("norms (rows × columns)", "{}, {}, {}, {}x{}, {}"),
    "rotary": ("rotary embedding", "batch {}, {} tokens, {} heads, {} key heads, head_dim {}, {}, {}, {}"),
    "linear_cross_entropy": ("output layer and its loss (tokens × d_model × vocabulary)", ""),
    "product": ("matrix products (rows × outputs × inputs)", ""),
    "encoder": ("encoder, inference", "batch {}, {} tokens, {}"),
}
WORDS = {"fwd": "forward", "fwd_bwd": "forward + backward"}
LIMITS = {"GEMM": "a large matrix product", "copy": "a copy of the bytes"}


def picture_names(rows):
    """{function: its rows}; test_norm[plain-fp32] belongs to "norm"."""
    found = {}
    for row in rows:
        found.setdefault(re.sub(r"^test_|\[.*", "", row["benchmark"]), []).append(row)
    return found


def case_name(function, benchmark):
    """The case of a benchmark for readers."""
    match = re.search(r"\[(.*)\]", benchmark)
    if match is None:
        return function.replace("_", " ")
    parts = [WORDS.get(part, part) for part in match[1].split("-")]
    form = NAMES.get(function, ("", ""))[1]
    if not form or form.count("{}") > len(parts):
        form = ", ".join(["{}"] * len(parts))
    name = re.sub(r"(?<=\d)x(?=\d)", " × ", form.format(*parts))
    return re.sub(r"\b(?!d_model|head_dim)([a-z]+)_(?=[a-z])", r"\1 ", name)


def limit_of(row):
    """The ratio that a row would have at the rate of the machine, or None."""
    percent = row.get("percent")
    return row["ratio"] * 100 / percent if percent else None


def draw(function, rows):
    """The Figure of one function."""
    cases = list(dict.fromkeys(row["benchmark"] for row in rows))
    baseline = rows[0]["implementation"]
    names = sorted({row["implementation"] for row in rows} - {baseline}, key=lambda name: (name != "fastattn", name))
    measured = {(row["benchmark"], row["implementation"]): row for row in rows}
    height = 0.8 / max(len(names), 1)
    lane = max(0.34, 0.17 * len(names))  # inches a case
    labels = [case_name(function, case) for case in cases]
    figure = Figure(figsize=(3.8 + 0.075 * max(map(len, labels)), 1.5 + lane * len(cases)), layout="constrained")
    axes = figure.add_subplot()
    _scale(axes, rows, [limit for row in rows if row["implementation"] == "fastattn" and (limit := limit_of(row))])
    low, high = axes.get_xlim()
    limited = False
    for y, case in enumerate(cases):
        for number, name in enumerate(names):
            row = measured.get((case, name))
            if row is None:
                continue
            place = y - 0.4 + height * (number + 0.5)
            axes.barh(place, row["ratio"] - 1, left=1, height=height, color=COLOURS[number % len(COLOURS)])
            inside = math.log(row["ratio"]) > 0.06 * math.log(high / low)  # else the mark may cross it
            right = inside or row["ratio"] < 1  # the side of the number's anchor
            style = {"ha": "right" if right else "left", "va": "center", "fontsize": 8}
            style |= {"xytext": (-3 if right else 3, 0), "textcoords": "offset points"}
            colour = "white" if inside and number == 0 else "black"
            axes.annotate(f"{row['ratio']:.2f}", (row["ratio"], place), color=colour, **style)
        limit = limit_of(measured.get((case, "fastattn"), {"ratio": 0}))
        if limit is not None:
            axes.plot([limit, limit], [y - 0.45, y + 0.45], color="black", linewidth=2)
            limited = True
    axes.axvline(1, color="gray", linewidth=1)
    axes.set_yticks(range(len(cases)), labels, fontsize=9)
    axes.set(ylim=(len(cases) - 0.4, -0.6), xlabel=f"times as fast as {baseline}")
    handles = [Patch(color=COLOURS[number % len(COLOURS)], label=name) for number, name in enumerate(names)]
    if limited:
        kinds = " or ".join(sorted({LIMITS.get(row["limit"], row["limit"]) for row in rows if "limit" in row}))
        handles.append(Line2D([], [], color="black", linewidth=2, label=f"at the rate of {kinds}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(NAMES.get(function, (function.replace("_", " "),))[0], fontsize=11)
    facts = machine_line(rows[0])
    if len(facts) > 70:  # wider than the axes, which end at the edge of the picture
        facts = facts.replace("; ", ";\n")
    axes.set_title(facts, fontsize=7, color="dimgray")
    return figure


def _scale(axes, rows, limits):
    """A logarithmic axis around 1 with room for the numbers beside the bars."""
    values = [row["ratio"] for row in rows] + limits
    low, high = min(0.5, min(values) / 1.25), max(2.0, max(values) * 1.25)
    axes.set_xscale("log", base=2)
    first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
    ticks = [2.0**power for power in range(first, last + 1) if power % math.ceil((last - first) / 9) == 0]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{tick:g}×" for tick in ticks], fontsize=8)
    axes.set_xlim(low, high)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def write_pictures(folder, rows):
    """Write FUNCTION.svg and FUNCTION.png for every function, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for function, some in picture_names(rows).items():
        figure = draw(function, some)
        with matplotlib.rc_context({"svg.hashsalt": function}):  # the same numbers give the same file
            for suffix, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 120})):
                written.append(folder / f"{function}.{suffix}")
                figure.savefig(written[-1], facecolor="white", **options)
    return written


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--only", nargs="+", default=[], help="rows whose benchmark has all of these words")
    parser.add_argument("--without", nargs="+", default=[], help="and none of these")
    options = parser.parse_args(arguments)
    rows = [row for file in options.files for row in read(file)]
    rows = [row for row in rows if all(word in row["benchmark"] for word in options.only)]
    rows = [row for row in rows if not any(word in row["benchmark"] for word in options.without)]
    if not rows:
        parser.error("no row is left")
    if len({machine_line(row) for row in rows}) > 1:
        parser.error("the files are not of one run: a picture compares cases of one machine and one commit")
    for path in write_pictures(options.folder, rows):
        print(path)


if __name__ == "__main__":
    main()
