"""Turn the JSON of `pytest benchmarks --benchmark-json=FILE` into a Markdown table.

python benchmarks/report.py FILE
"""

import json
import statistics
import sys


def rows(benchmarks):
    for benchmark in benchmarks:
        extra, stats = benchmark["extra_info"], benchmark["stats"]
        if "implementation" not in extra:
            continue
        rate = ""
        if "gb_per_s" in extra:
            rate = f"{extra['gb_per_s']} GB/s, {extra['percent_of_copy']} % of a copy"
        if "gflop_per_s" in extra:
            rate = f"{extra['gflop_per_s']} GFLOP/s, {extra['percent_of_gemm']} % of GEMM"
        median = stats["median"] if "median" in stats else statistics.median(stats["data"])
        yield (
            benchmark["group"],
            extra["implementation"],
            f"{median * 1e6:.0f}",
            f"{extra['ratio']:.2f}",
            f"{extra['ratio_of_minima']:.2f}",
            rate,
        )


def main(path):
    with open(path, encoding="utf-8") as file:
        report = json.load(file)
    machine = report["machine_info"]
    commit = report.get("commit_info", {}).get("id", "unknown")[:9]
    device = machine.get("gpu") or f"{machine['cpu'].get('brand_raw', 'CPU')}, {machine['threads']} threads"
    print(f"{device}; torch {machine['torch']}, commit {commit}, load {machine['load']:.1f}\n")
    print("| benchmark | implementation | median us | ratio of medians | ratio of minima | rate |")
    print("|---|---|---|---|---|---|")
    for row in rows(report["benchmarks"]):
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/report.py FILE, the JSON of pytest benchmarks --benchmark-json=FILE")
    main(sys.argv[1])
