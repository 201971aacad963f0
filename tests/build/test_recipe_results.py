"""The scripts that measure the recipes and the speedrun, and that the page of recipes says what they measured."""

import json
import re
import sys
import unicodedata
from pathlib import Path

import pytest

pytest.importorskip("jsonargparse", reason="needs the packages of fastattn[train]")
from fastattn.commands._options import read_config, train_parser
from fastattn.commands._parse import parse
from fastattn.training.data.sources import read_documents

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "benchmarks/results").glob("*-recipes.md"))


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    names = ("speedrun", "recipes")
    yield {name: __import__(name) for name in names}
    for name in names:
        sys.modules.pop(name, None)


def test_every_recipe_has_a_row_with_commands_that_are_accepted(modules, monkeypatch):
    monkeypatch.chdir(ROOT)
    used = set()
    for row in modules["recipes"].rows().values():
        for command in row.commands:
            name, *arguments = command.split()
            if name in ("train", "finetune"):
                used.add(arguments[arguments.index("--config") + 1])
                config = read_config(parse(train_parser(), arguments))
                assert not config.start or config.start.startswith("runs/")
    recipes = {str(path.relative_to(ROOT)) for path in (ROOT / "recipes").glob("*.yaml")}
    assert used == recipes - {f"recipes/{name}.yaml" for name in modules["speedrun"].RECIPES}


def test_the_held_out_question_is_in_no_training_part(modules):
    question, answer = modules["recipes"].HELD_OUT
    parts = {name: dict(zip(part.texts, part.targets, strict=True)) for name, part in read_documents("hangul").items()}
    found = [text for text in parts["test"] if text in (question, unicodedata.normalize("NFD", question))]
    assert [parts["test"][text] for text in found] == [answer]
    assert found[0] not in parts["train"].keys() | parts["validation"].keys()


def test_a_row_that_did_not_run_is_marked(modules, tmp_path):
    recipes = modules["recipes"]
    report = {"accuracy": 0.82, "averages": {"macro": {"f1": 0.5}}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    figures = {name: recipes.read_figure(tmp_path, key, "") for name, key in recipes.CLASSES.items()}
    results = {
        "a": {"figures": figures, "processor": 12.3, "wall": 20.0},
        "b": {"failed": "train ended with exit code 2"},
    }
    results["q"] = {"figures": {"yes": recipes.read_figure(tmp_path, "output", " no\n")}, "processor": 0, "wall": 0}
    assert recipes.table("abcq", results)[2:] == [
        "| a | accuracy 82.0 %, macro F1 0.5000 | 12 | 20 |",
        "| b | train ended with exit code 2 | | |",
        "| c | not run | | |",
        "| q | answered `no`, expected `yes` |  |  |",
    ]


def test_rows_of_two_commits_are_not_mixed(modules, tmp_path):
    log = tmp_path / "recipes.jsonl"
    log.write_text('{"name": "a", "commit": "1"}\n')
    assert modules["recipes"].read_log(log, "1").keys() == {"a"}
    with pytest.raises(SystemExit, match="has rows of 1, but this is 2"):
        modules["recipes"].read_log(log, "2")


def test_the_steps_of_a_speedrun_fit_with_their_validations(modules):
    probe = {"steps": 60, "training": 6.0, "wall": 10.0}  # 0.1 seconds a step, 2 a validation
    steps = modules["speedrun"].steps_within(600, probe, 100)
    assert 0.1 * steps + 2 * (1 + steps / 100) == pytest.approx(600, abs=0.2)


@pytest.mark.parametrize(("factor", "runs"), [(1.0, 3), (0.7, 4), (1.2, 4)])
def test_a_run_of_the_speedrun_takes_the_time_that_is_asked_for(modules, monkeypatch, factor, runs):
    """A long run is repeated if its steps take longer or shorter than those of the short runs."""
    made = []

    def train(recipe, run, steps, *more):
        training = 0.1 * steps * (1 if more else factor)
        made.append(steps)
        return {"steps": steps, "training": training, "wall": training + 2}

    monkeypatch.setattr(modules["speedrun"], "train", train)
    result = modules["speedrun"].train_for("speedrun", 600)
    assert result["wall"] == pytest.approx(600, rel=0.05)
    assert (result["steps"], len(made)) == (made[-1], runs)


def test_a_speedrun_on_an_unsteady_machine_ends_with_an_error(modules, monkeypatch):
    seconds = iter([1, 1, 300, 900, 300])
    result = {"steps": 60, "training": 0.9}
    monkeypatch.setattr(modules["speedrun"], "train", lambda *_: result | {"wall": next(seconds)})
    with pytest.raises(RuntimeError, match="expected a run of 600 s, got 300 s"):
        modules["speedrun"].train_for("speedrun", 600)


def test_the_page_of_recipes_says_what_was_measured():
    """Each row of the newest result file is in the page unchanged, and the page has no other rows."""
    page = (ROOT / "docs/recipes.md").read_text()
    assert RESULTS[-1].name in page
    rows = [line for line in RESULTS[-1].read_text().splitlines() if line.startswith("| ")][1:]
    cells = [re.split(r" *\| *", row.strip("| ")) for row in rows]
    shown = {}
    for line in page.splitlines():
        if line.startswith("| `"):
            name, _, _, reaches, *_ = (cell.strip() for cell in line.strip("|").split("|"))
            shown[name.replace("`", "")] = reaches
    assert shown == {name: reaches for name, reaches, *_ in cells}
