#!/usr/bin/env python
"""Finds benchmarks that became slower: measures two checkouts of fastattn alternately on one machine.

    python scripts/compare_versions.py OLD NEW [--rounds N] [-- arguments of pytest]

Each checkout runs its own `pytest benchmarks` with its own build in a separate process, because one process cannot load
two versions of the library. A benchmark's time is the minimum over all rounds. The other candidates of a benchmark,
such as PyTorch, are the same code in both checkouts, so the spread of their ratios is the noise of ours. Prints a
Markdown table of new/old, the slowest first.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

OURS = "fastattn"


def least_times(checkout, arguments):
    """{(benchmark, candidate): seconds} of one run."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "times.json"
        command = [sys.executable, "-m", "pytest", "-q", f"--benchmark-json={path}", *arguments]
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
        if not path.exists():
            sys.exit(f"{checkout}: pytest did not write any times\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        records = json.loads(path.read_text())["benchmarks"]
    return {(record["group"], record["name"]): record["stats"]["min"] for record in records}


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each checkout, alternating")
    given = sys.argv[1:]
    split = given.index("--") if "--" in given else len(given)
    options, arguments = parser.parse_args(given[:split]), given[split + 1 :] or ["benchmarks"]
    best = {options.old: {}, options.new: {}}
    for _ in range(options.rounds):
        for checkout, times in best.items():
            for key, seconds in least_times(checkout, arguments).items():
                times[key] = min(seconds, times.get(key, seconds))
    old, new = best.values()
    ratios = {key: new[key] / old[key] for key in old.keys() & new.keys()}
    ours = {key: ratio for key, ratio in ratios.items() if key[1].startswith(OURS)}
    others = sorted(ratio for key, ratio in ratios.items() if key not in ours)
    print("| benchmark | candidate | old, us | new, us | new/old |\n|---|---|---|---|---|")
    for key in sorted(ours, key=ours.get, reverse=True):
        print(f"| {key[0]} | {key[1]} | {old[key] * 1e6:.1f} | {new[key] * 1e6:.1f} | {ours[key]:.3f} |")
    if others:
        at = [others[int(share * (len(others) - 1))] for share in (0.05, 0.5, 0.95)]
        print("\n- other candidates, {}: 5, 50 and 95 % of new/old {:.3f}, {:.3f}, {:.3f}".format(len(others), *at))
    print(f"- ours, {len(ours)}: median of new/old {statistics.median(ours.values()):.3f}")
    print(f"- only in one checkout: {len(old.keys() ^ new.keys())}")


if __name__ == "__main__":
    main()
