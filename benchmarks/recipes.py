"""Run the recipes one after the other and write what they reach, as their own reports say it, into a Markdown file.

python benchmarks/recipes.py FILE.md [--only NAME ...]

The rows that were measured are kept in runs/recipes.jsonl and are not run again, so a call that was interrupted can be
repeated. A row of another commit is refused: a table has one commit.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LOG = ROOT / "runs" / "recipes.jsonl"
LM = {"loss": "loss", "bits a character": "bits_per_character"}
CLASSES = {"accuracy": "accuracy", "macro F1": "averages.macro.f1"}
TRANSLATION = {"BLEU": "bleu", "exact": "exact_match"}
PERCENT = {"accuracy", "exact", "exact answers", "preference accuracy"}
HELD_OUT = ("뾘쌻뗠휁", "bboen-ssyalb-ddyeol-hwenj")  # a test word of the source hangul, and its answer


class Row(NamedTuple):
    """commands: of fastattn; figures: {name: key in report.json of the run that the last command names, or output}."""

    commands: list
    figures: dict


def row_of(recipe, figures, *, run=None, command="train", options="", evaluate=""):
    """The Row that trains a recipe and evaluates it."""
    run = run or f"runs/{recipe}"
    given = f" --run {run}" if run != f"runs/{recipe}" else ""
    train = f"{command} --config recipes/{recipe}.yaml{given} {options}".strip()
    return Row([train, f"evaluate {run} {evaluate}".strip()], figures)


def rows():
    """{name: Row}, in the order in which they run: the run that another one starts from comes first."""
    preference = {"preference accuracy": "preference_accuracy"}
    tiny = "--steps 1 --optim.learning_rate 1e-12"  # the start itself
    found = {
        "chat_hangul": row_of("chat_hangul", {"exact answers": "exact_answers"}),
        "chat_hangul, a held-out question": Row(
            [f"generate runs/chat_hangul --prompt {HELD_OUT[0]} --temperature 0"], {HELD_OUT[1]: "output"}
        ),
        "preference_hangul, the start": row_of(
            "chat_hangul", {"exact answers": "exact_answers"}, run="runs/chat_styles",
            options="--data.source hangul_styles",
        ),
        "preference_hangul, before": row_of(
            "preference_hangul", preference, run="runs/before", command="finetune", options=tiny
        ),
        "preference_hangul": row_of("preference_hangul", preference, command="finetune"),
        "preference_hangul, LoRA": row_of(
            "preference_hangul", preference, run="runs/lora", command="finetune",
            options="--trained lora --optim.learning_rate 2e-4",
        ),
        "sms_spam": row_of("sms_spam", CLASSES),
        "hangul": row_of("hangul", TRANSLATION),
        "docstrings_pretrain": row_of("docstrings_pretrain", {"loss": "loss"}),
        "docstrings": row_of("docstrings", CLASSES, command="finetune", options="--start runs/docstrings_pretrain"),
        "docstrings, from scratch": row_of("docstrings", CLASSES, run="runs/docstrings_scratch"),
        "char_lm": row_of("char_lm", LM),
        "shakespeare_char": row_of("shakespeare_char", LM),
        "shakespeare_char, layers of torch.nn": row_of(
            "shakespeare_char", LM, run="runs/shakespeare_torch", options="--layers torch"
        ),
        "bpe_lm": row_of("bpe_lm", LM),
    }  # fmt: skip
    bodies = {
        "transformer": "",
        "cnn": "--model.body cnn --steps 400",
        "lstm": "--model.body lstm --model.n_layer 1 --steps 400",
        "bag_of_words": "--model.body bag_of_words --optim.learning_rate 5e-3",
        "cnn, word2vec": "--model.body cnn --steps 400 --model.embedding word2vec",
        "transformer, word2vec": "--model.embedding word2vec",
    }
    for name, options in bodies.items():
        run = f"runs/sst2_{name.replace(', ', '_')}"
        found[f"sst2, {name}"] = row_of("sst2", CLASSES, run=run, options=options)
    start = "--start runs/clinc150_pretrain"
    found["python_docs_es"] = row_of("python_docs_es", TRANSLATION)
    found["clinc150_pretrain"] = row_of("clinc150_pretrain", {"loss": "loss"})
    found["clinc150"] = row_of("clinc150", CLASSES, command="finetune", options=start)
    found["clinc150, from scratch"] = row_of("clinc150", CLASSES, run="runs/clinc150_scratch")
    for seed in (1, 2, 3):
        few = f"--data.train_limit 1500 --steps 600 --evaluate_every 100 --seed {seed}"
        name = f"clinc150, 1,500 labels, seed {seed}"
        found[name] = row_of(
            "clinc150", CLASSES, run=f"runs/clinc150_few_{seed}", command="finetune", options=f"{start} {few}"
        )
        found[f"{name}, from scratch"] = row_of(
            "clinc150", CLASSES, run=f"runs/clinc150_few_scratch_{seed}", options=few
        )
    found["multi30k"] = row_of("multi30k", TRANSLATION)
    return found


def measure(row, environment):
    """Run the commands of a row; {figures or failed, processor and wall seconds of training}."""
    seconds = {"processor": 0.0, "wall": 0.0}
    for command in row.commands:
        words = shlex.split(command)
        trains = words[0] in ("train", "finetune")
        before, start = _processor_seconds(), time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "fastattn", *words, *(["--overwrite"] if trains else [])],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            return {"failed": f"{words[0]} ended with exit code {done.returncode}: {last}"}
        if trains:
            seconds["processor"] += _processor_seconds() - before
            seconds["wall"] += time.perf_counter() - start
    run = ROOT / shlex.split(row.commands[-1])[1]
    figures = {name: read_figure(run, key, done.stdout) for name, key in row.figures.items()}
    return {"figures": figures} | {name: round(value, 1) for name, value in seconds.items()}


def _processor_seconds():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def read_figure(run, key, output):
    """A figure of a run; key: as in Row."""
    if key == "output":
        return output.strip()
    value = json.loads((run / "report.json").read_text(encoding="utf-8"))
    for part in key.split("."):
        value = value[part]
    return value


def reached(name, value):
    """The text of a figure."""
    if isinstance(value, str):
        return f"answered `{value}`, as trained" if value == name else f"answered `{value}`, expected `{name}`"
    if name in PERCENT:
        return f"{name} {100 * value:.1f} %"
    return f"{name} {value:.2f}" if name == "BLEU" else f"{name} {value:.4f}"


def table(names, results):
    """The lines of the Markdown table; results: {name: result of `measure`}."""
    lines = ["| recipe | reaches | processor seconds of training | wall seconds |", "|---|---|---|---|"]
    for name in names:
        result = results.get(name)
        if result is None or "failed" in result:
            lines.append(f"| {name} | {'not run' if result is None else result['failed']} | | |")
            continue
        figures = ", ".join(reached(*figure) for figure in result["figures"].items())
        seconds = [f"{result[key]:.0f}" if result[key] else "" for key in ("processor", "wall")]
        lines.append(f"| {name} | {figures} | {seconds[0]} | {seconds[1]} |")
    return lines


def page(found, results, commit):
    """The whole result file."""
    import torch

    dates = sorted(result["date"] for result in results.values())
    loads = [result["load"] for result in results.values()]
    threads = {result["threads"] for result in results.values()}
    head = [
        f"# What the recipes reach, {dates[-1]}", "",
        "```sh", "python benchmarks/recipes.py FILE.md", "```", "",
        f"{processor()}, {', '.join(map(str, sorted(threads)))} thread(s), {platform.system()}; Python "
        f"{platform.python_version()}, torch {torch.__version__}, commit {commit}; load of the machine at the start of "
        f"a row {min(loads):.1f} to {max(loads):.1f}.", "",
        "The scores are those of `fastattn evaluate`, of the test part if there is one, else of the validation part. "
        "The times are those", "of `train` and `finetune` with reading, validation and checkpoints.", "",
    ]  # fmt: skip
    commands = [line for name, row in found.items() for line in (f"# {name}", *row.commands)]
    lines = [*head, *table(found, results), "", "Each line is a command of `fastattn`:", "", "```", *commands, "```"]
    return "\n".join(lines) + "\n"


def processor():
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def commit_of_checkout():
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=9", "--exclude=*"]
    return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()


def read_log(path, commit):
    """{name: result} of the rows that were measured; SystemExit if one is of another commit."""
    entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if foreign := {entry["commit"] for entry in entries} - {commit}:
        sys.exit(f"{path} has rows of {', '.join(foreign)}, but this is {commit}: move it away")
    return {entry["name"]: entry for entry in entries}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", nargs="*", help="names of rows; none: only write the file")
    options = parser.parse_args()
    found = rows()
    names = list(found) if options.only is None else options.only
    if unknown := [name for name in names if name not in found]:
        parser.error(f"there is no row {unknown[0]!r}; the rows are {'; '.join(found)}")
    commit = commit_of_checkout()
    LOG.parent.mkdir(exist_ok=True)
    results = read_log(LOG, commit)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for name in names:
        if name not in results or "failed" in results[name]:
            entry = {"name": name, "commit": commit, "date": str(datetime.date.today()), "load": os.getloadavg()[0]}
            entry |= {"threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))}
            results[name] = entry | measure(found[name], environment)
            with LOG.open("a") as log:
                log.write(json.dumps(results[name], ensure_ascii=False) + "\n")
        if results:
            options.output.write_text(page(found, results, commit), encoding="utf-8")
        print(table([name], results)[-1], flush=True)


if __name__ == "__main__":
    main()
