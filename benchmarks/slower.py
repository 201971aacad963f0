"""Compare a run of benchmarks with a committed one and say what got slower; exit with 1 if anything did.

    pytest benchmarks --pictures new
    python benchmarks/slower.py benchmarks/results/FILE new/results.jsonl --factor 1.1

What is compared is the ratio to PyTorch, which was measured in turns with ours in the same process, so another load of
the machine matters less than for times. A row got slower if its ratio of medians and its ratio of minima both fell by
more than the factor. Files are results.jsonl, the JSON of --benchmark-json, or result files in Markdown.
"""

import argparse
import sys

from measured import machine_line, read


def compare(old, new, factor):
    """(lines that say what got slower, lines that say what got faster, how many rows both runs have).

    Args:
        old, new: rows.
        factor: by which both ratios must differ.
    """
    before = {(row["benchmark"], row["implementation"]): row for row in old}
    slower, faster, both = [], [], 0
    for row in new:
        was = before.get((row["benchmark"], row["implementation"]))
        if was is None or row["implementation"] != "fastattn":
            continue
        both += 1
        changes = [row[key] / was[key] for key in ("ratio", "ratio_of_minima")]
        line = (
            f"{row['benchmark']}: {was['ratio']:.2f} ({was['ratio_of_minima']:.2f}) →"
            f" {row['ratio']:.2f} ({row['ratio_of_minima']:.2f})"
        )
        if max(changes) < 1 / factor:
            slower.append(line)
        elif min(changes) > factor:
            faster.append(line)
    return slower, faster, both


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("--factor", type=float, default=1.1, help="what counts as a difference; default: 1.1")
    options = parser.parse_args(arguments)
    old, new = read(options.old), read(options.new)
    print(f"old: {machine_line(old[0])}\nnew: {machine_line(new[0])}")
    facts = [(old[0].get(key), new[0].get(key)) for key in ("device", "threads", "torch", "kernels")]
    if any(None not in pair and len(set(pair)) > 1 for pair in facts):
        print("Another machine, number of threads or PyTorch: differences need not come from the code.")
    elif facts[-1].count(None) == 1:  # older result files do not name the kernels
        print("Only one file names the kernels: is it the same kind of processor?")
    slower, faster, both = compare(old, new, options.factor)
    if not both:
        parser.error("the two runs have no row of fastattn in common")
    ours = {row["benchmark"] for row in old if row["implementation"] == "fastattn"}
    if missing := ours - {row["benchmark"] for row in new}:
        print(f"{len(missing)} of {len(ours)} rows of the old run are not in the new one")
    for title, lines in (("slower", slower), ("faster", faster)):
        print(f"{len(lines)} of {both} rows got {title} by more than {options.factor:g}, compared with PyTorch")
        print("".join(f"  {line}\n" for line in lines), end="")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
