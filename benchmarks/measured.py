"""The rows of a run of benchmarks: one dict for each benchmark and implementation.

A row has: benchmark, implementation, median_us, ratio and ratio_of_minima (time of the first implementation divided by
its own); where they are known, rate with its unit and limit ("copy" or "GEMM") and percent of it; and what was
measured: device, threads, kernels (the instruction set of ours), timer, torch, fastattn, python, commit, load. A result
file in Markdown has fewer of these.
"""

import json
import platform
import re
import statistics
from pathlib import Path

HEAD = re.compile(
    r"(.+?)(?:, (\d+) threads?)?(?:, (\w+) kernels)?; torch (\S+), commit (\w+), load ([\d.]+)$", re.MULTILINE
)
RATE = re.compile(r"([\d.]+) (GB/s|GFLOP/s), ([\d.]+) % of (?:a )?(copy|GEMM)")


def row_of(benchmark, extra, seconds):
    """A row from the extra_info of the `compare` fixture and the times of all rounds."""
    row = {"benchmark": benchmark, "implementation": extra["implementation"]}
    row |= {"median_us": round(statistics.median(seconds) * 1e6, 2)}
    row |= {"ratio": extra["ratio"], "ratio_of_minima": extra["ratio_of_minima"]}
    for key, unit, limit in (("gb_per_s", "GB/s", "copy"), ("gflop_per_s", "GFLOP/s", "GEMM")):
        if key in extra:
            percent = extra[f"percent_of_{limit.lower()}"]
            row |= {"rate": extra[key], "unit": unit, "limit": limit, "percent": percent}
    return row


def facts_of(machine, commit):
    """What was measured, from the machine_info of pytest-benchmark."""
    gpu = machine.get("gpu")
    return {
        "device": gpu or machine["cpu"].get("brand_raw", "CPU"),
        "threads": None if gpu else machine["threads"],
        "kernels": None if gpu else machine.get("kernels"),
        "timer": machine.get("timer"),
        "torch": machine["torch"],
        "fastattn": machine.get("fastattn"),
        "python": machine.get("python_version", platform.python_version()),
        "commit": commit[:9],
        "load": round(machine["load"], 1),
    }


def from_json(report):
    """The rows of the JSON of --benchmark-json."""
    facts = facts_of(report["machine_info"], report.get("commit_info", {}).get("id", "unknown"))
    for benchmark in report["benchmarks"]:
        extra, stats = benchmark["extra_info"], benchmark["stats"]
        if "implementation" in extra:
            seconds = stats["data"] if "data" in stats else [stats["median"]]
            yield row_of(benchmark["group"], extra, seconds) | facts


def from_markdown(text):
    """The rows of a result file."""
    head = HEAD.search(text)
    if head is None:
        raise ValueError("it has no line with machine, torch, commit and load, as benchmarks/report.py writes it")
    device, threads, kernels, torch, commit, load = head.groups()
    facts = {"device": device, "threads": threads and int(threads), "torch": torch, "commit": commit}
    facts |= {"load": float(load)} | ({"kernels": kernels} if kernels else {})
    for line in text.split("\n"):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| test_") and len(cells) == 6:
            row = {"benchmark": cells[0], "implementation": cells[1], "median_us": float(cells[2])}
            row |= {"ratio": float(cells[3]), "ratio_of_minima": float(cells[4])}
            if rate := RATE.fullmatch(cells[5]):
                row |= {"rate": float(rate[1]), "unit": rate[2], "percent": float(rate[3]), "limit": rate[4]}
            yield row | facts


def read(path):
    """The rows of a results.jsonl, of the JSON of --benchmark-json, or of a result file in Markdown.

    A file that has none, or that cannot be read, ends the program with a message.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines()]
        else:
            rows = list(from_markdown(text) if path.suffix == ".md" else from_json(json.loads(text)))
    except (OSError, ValueError) as error:
        raise SystemExit(f"{path}: {error}") from None
    if not rows:
        raise SystemExit(f"{path}: it has no rows of the compare fixture")
    return rows


def write(path, rows):
    """Write one line a row."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def machine_line(row):
    """What was measured, in one line. It names the kernels, as virtual machines hide the processor."""
    threads = f", {row['threads']} thread{'s' * (row['threads'] > 1)}" if row.get("threads") else ""
    kernels = f", {row['kernels']} kernels" if row.get("kernels") else ""
    return f"{row['device']}{threads}{kernels}; torch {row['torch']}, commit {row['commit']}, load {row['load']:.1f}"
