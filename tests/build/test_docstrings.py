"""The API pages name everything that is public, and the examples in its docstrings run."""

import doctest
import importlib
import re
from pathlib import Path

import pytest
import torch
from training_cases import TEXT, tiny_config

import fastattn
from fastattn.integrations import flash_attn
from fastattn.integrations.hugging_face import write_hugging_face
from fastattn.models import CausalLM
from fastattn.training.runs.train import train

PAGES = Path(__file__).parents[2].joinpath("docs/api").glob("*.md")
NAMED = sorted(name for page in PAGES for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE))
LOAD_RUN = "fastattn.training.runs.loaded.load_run"  # fastattn.load_run, which no reader of source text can find
NEEDS = {
    "fastattn.register": ["transformers"],
    "fastattn.training.inspect.scores.classification_scores": ["sklearn"],
    "fastattn.training.inspect.scores.translation_scores": ["sacrebleu"],
}
NEEDS_FOLDER = {"load_hugging_face", "write_hugging_face"}


def find(name):
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(module), last)


def test_the_pages_name_everything_public_once():
    public = {f"fastattn.{name}" for name in fastattn.__all__ if name != "nn"} | {LOAD_RUN}
    public |= {f"{flash_attn.__name__}.{name}" for name in dir(flash_attn) if name.startswith("flash_attn_")}
    assert public <= set(NAMED)
    assert len(NAMED) == len(set(NAMED))
    assert find(LOAD_RUN) is fastattn.load_run
    assert {name for name in dir(fastattn) if not name.startswith("_")} == {*fastattn.__all__, "load_run"}
    assert all(getattr(fastattn, name) is getattr(fastattn.nn, name) for name in fastattn.nn.__all__)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A folder with what examples read: a function that makes it for the example of a name."""
    monkeypatch.chdir(tmp_path)

    def make(name):
        if name == LOAD_RUN:
            Path("text.txt").write_text(TEXT)
            config = tiny_config(Path("runs/char_lm"), Path("text.txt"), steps=2, evaluate_every=2, sample_tokens=0)
            assert train(config) == 0
        if name.rpartition(".")[2] in NEEDS_FOLDER:
            for folder in ("models/gpt2", "exported"):
                Path(folder).mkdir(parents=True)
            write_hugging_face(CausalLM(100, n_layer=2, n_head=2, d_model=16, block_size=16), "models/gpt2")

    return make


@pytest.mark.parametrize("name", NAMED)
def test_examples_run(name, folders):
    if "sdpa" in name and fastattn.backends()["cpu"]["native"] != "available":
        pytest.skip("without kernels every call is left to torch")
    for package in NEEDS.get(name, ()):
        pytest.importorskip(package, reason=f"{package} is not installed")
    folders(name)
    (example,) = doctest.DocTestFinder(recurse=False).find(
        find(name), name, globs={"torch": torch, "fastattn": fastattn}
    )
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0
