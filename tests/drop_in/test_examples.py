"""Every script in examples/ runs in its tiny size; each one raises if the replaced model does not agree."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {
    "bert_finetune": ["transformers"], "llama_pretraining": ["transformers"], "vit": ["transformers"],
    "small_gpt": [], "seq2seq": [], "hugging_face_trainer": ["transformers", "accelerate"],
    "lightning_module": ["lightning"],
}  # fmt: skip


def load(name, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delitem(sys.modules, "comparison", raising=False)
    return module


@pytest.mark.parametrize("name", NEEDS)
def test_example(name, monkeypatch, capsys):
    for package in NEEDS[name]:
        pytest.importorskip(package, reason=f"{package} is not installed")
    ratio = load(name, monkeypatch).main(["--tiny"])
    printed = capsys.readouterr().out
    assert ratio > 0
    assert "modules replaced" in printed
    assert not printed.startswith("0 modules")
    assert "gradients differ by" in printed
    assert "times as fast" in printed


def test_all_are_listed():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} - {"comparison"}
    assert scripts == set(NEEDS)
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}.py`" in text for name in scripts)


def test_a_model_that_does_not_agree_is_noticed(monkeypatch):
    load("small_gpt", monkeypatch)
    monkeypatch.syspath_prepend(EXAMPLES)
    comparison = importlib.import_module("comparison")
    monkeypatch.delitem(sys.modules, "comparison")
    model, other = torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)
    with pytest.raises(SystemExit, match="do not agree"):
        comparison.check_agreement(model, other, lambda model: model(torch.ones(2, 3)).square().sum())
