"""Turn the JSON of `pytest benchmarks --benchmark-json=FILE`, or a results.jsonl, into a Markdown table.

python benchmarks/report.py FILE
"""

import sys

from measured import machine_line, read


def main(path):
    rows = read(path)
    print(f"{machine_line(rows[0])}\n")
    print("| benchmark | implementation | median us | ratio of medians | ratio of minima | rate |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        limit = {"copy": "a copy", "GEMM": "GEMM"}.get(row.get("limit"))
        rate = f"{row['rate']} {row['unit']}, {row['percent']} % of {limit}" if limit else ""
        print(
            f"| {row['benchmark']} | {row['implementation']} | {row['median_us']:.0f} | {row['ratio']:.2f}"
            f" | {row['ratio_of_minima']:.2f} | {rate} |"
        )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/report.py FILE, the JSON of pytest benchmarks --benchmark-json=FILE")
    main(sys.argv[1])
