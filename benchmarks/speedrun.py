"""Run the CPU speedrun and nanoGPT's settings for the same wall time, and write both scores into a Markdown file.

OMP_NUM_THREADS=2 python benchmarks/speedrun.py FILE.md

Two short runs of each recipe measure a step and a validation. The number of steps is set from these before the long
run. A run whose wall time misses the given one by more than 10 % is repeated with as many more or fewer steps, because
on a virtual machine the same steps can take 10 % longer from one run to the next.
"""

import argparse
import csv
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

from recipes import ROOT, commit_of_checkout, processor

RECIPES = {"speedrun": [], "speedrun_nanogpt": ["--layers", "torch"]}  # nanoGPT has the layers of torch.nn
PROBE = 60  # steps of the first short run; the second one takes PROBE_SECONDS
PROBE_SECONDS = 40
TOLERANCE = 0.1  # the share of the wall time by which a run may miss it


def train(recipe, run, steps, *more):
    """Train a recipe and return {"steps", "wall", "training"}.

    wall: seconds from the validation before the first step to the last checkpoint. training: those of the steps alone.
    """
    command = ["train", "--config", f"recipes/{recipe}.yaml", "--steps", str(steps), "--run", str(run), "--overwrite"]
    fastattn(*command, *RECIPES[recipe], *more)
    with open(run / "metrics.csv", newline="") as file:
        training = sum(float(row["seconds"] or 0) for row in csv.DictReader(file))
    last = max(path.stat().st_mtime for path in run.glob("checkpoints/*/meta.json"))
    return {"steps": steps, "wall": last - (run / "config.yaml").stat().st_mtime, "training": training}


def fastattn(*words):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "fastattn", *words], cwd=ROOT, env=environment, check=True)


def train_for(recipe, seconds):
    """The result of `train` for a run that takes this many seconds; raise RuntimeError after three runs that do not."""
    import yaml

    every = yaml.safe_load((ROOT / "recipes" / f"{recipe}.yaml").read_text())["evaluate_every"]
    steps = PROBE
    for limit in (PROBE_SECONDS, seconds):
        short = ("--evaluate_every", str(steps), "--sample_tokens", "0")  # validations at the first and the last step
        steps = steps_within(limit, train(recipe, ROOT / "runs" / "probe", steps, *short), every)
    for _ in range(3):
        result = train(recipe, ROOT / "runs" / recipe, steps)
        if abs(result["wall"] / seconds - 1) <= TOLERANCE:
            return result
        steps = round(steps * seconds / result["wall"])
    raise RuntimeError(f"{recipe}: expected a run of {seconds} s, got {result['wall']:.0f} s")


def steps_within(seconds, probe, every):
    """The most steps that fit, with a validation every `every` steps; probe: result of `train` with two validations."""
    step, validation = probe["training"] / probe["steps"], (probe["wall"] - probe["training"]) / 2
    return max(1, int((seconds - validation) / (step + validation / every)))


def score(run):
    fastattn("evaluate", str(run))
    return json.loads((run / "report.json").read_text())["bits_per_character"]


def page(results, seconds, load):
    import torch

    names = {
        "speedrun": "recipes/speedrun.yaml",
        "speedrun_nanogpt": "nanoGPT's model and settings, layers of torch.nn",
    }
    rows = [f"| {names[name]} | {r['bits']:.4f} | {r['steps']:,} | {r['wall']:.0f} |" for name, r in results.items()]
    ours, theirs = (results[name]["bits"] for name in RECIPES)
    threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
    lines = [
        f"# The CPU speedrun, {datetime.date.today()}", "",
        "```sh", f"OMP_NUM_THREADS={threads} python benchmarks/speedrun.py FILE.md --seconds {seconds}", "```", "",
        f"{processor()}, {threads} threads; Python {platform.python_version()}, torch {torch.__version__}, commit "
        f"{commit_of_checkout()}, load {load:.1f}.", "",
        "| recipe | bits a character of the test part | steps | wall seconds |", "|---|---|---|---|", *rows, "",
        f"Ratio of the scores: {ours / theirs:.3f}.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seconds", type=int, default=600, help="of each run, from the first step to the last")
    options = parser.parse_args()
    load, results = os.getloadavg()[0], {}
    for recipe in RECIPES:
        results[recipe] = train_for(recipe, options.seconds) | {"bits": score(ROOT / "runs" / recipe)}
    options.output.write_text(page(results, options.seconds, load), encoding="utf-8")
    print(options.output.read_text())


if __name__ == "__main__":
    main()
