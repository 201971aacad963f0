"""`fastattn finetune` from folders of BERT and GPT-2 as they are published; nothing is downloaded."""

import json

import pytest

pytest.importorskip("safetensors", reason="needs the packages of fastattn[train]")
import torch
from made_up_models import make_up
from safetensors.torch import load_file


@pytest.fixture
def documents(tmp_path):
    """Documents with labels, a text, and tokenizers in their published form: other numbers, truncation and padding."""
    pytest.importorskip("lightning_fabric", reason="needs the packages of fastattn[train]")
    pytest.importorskip("tokenizers", reason="needs the packages of fastattn[train]")
    from fastattn.training.data.tokenizer import LearntTokenizer

    texts = [f"the {'good' if i % 2 else 'bad'} film number {i} of {i % 7} actors" for i in range(80)]
    rows = [{"text": text, "label": f"class {i % 2}"} for i, text in enumerate(texts)]
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "text.txt").write_text("\n".join(texts))
    bert = LearntTokenizer.train("wordpiece", texts, 90, ("[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"))
    gpt2 = LearntTokenizer.train("bpe", texts, 300, ("<|endoftext|>",))
    for name, kind, tokenizer, options in (
        ("bert", "bert", bert, {}),
        ("classes", "bert", bert, {"n_classes": 2}),
        ("gpt2", "gpt2", gpt2, {}),
    ):
        vocab_size = tokenizer.vocab_size + 4 * (name == "gpt2")  # rows without a token, as in published models
        make_up(tmp_path / name, kind, vocab_size, **options)
        tokenizer.tokenizer.enable_truncation(8)
        tokenizer.tokenizer.enable_padding(length=8)
        (tmp_path / name / "tokenizer.json").write_text(tokenizer.to_json())
    (tmp_path / "common.yaml").write_text(COMMON)
    return tmp_path


COMMON = """
tensorboard: false
accelerator: cpu
steps: 4
evaluate_every: 2
batch_size: 4
sample_tokens: 4
sample_prompt: the
data: {validation_fraction: 0.2, test_fraction: 0}
optim: {warmup_steps: 1}
"""


def command(documents):
    return ["finetune", "--config", str(documents / "common.yaml")]


@pytest.mark.parametrize("trained", ["all", "head", "lora"])
def test_bert_to_a_classifier(documents, capsys, trained):
    from fastattn.cli import main

    run = documents / "run"
    source = ["--data.source", str(documents / "documents.jsonl"), "--data.columns.label", "label"]
    arguments = [
        *command(documents),
        "--start",
        str(documents / "bert"),
        "--task",
        "classify",
        "--run",
        str(run),
        *source,
    ]
    assert main([*arguments, "--trained", trained]) == 0
    error = capsys.readouterr().err
    assert "loaded all weights except head.weight, head.bias" in error
    stored = load_file(run / "checkpoints" / "step-00000004" / "model.safetensors")
    start = load_file(documents / "bert" / "model.safetensors")
    same = torch.equal(stored["encoder.token_embedding.weight"], start["bert.embeddings.word_embeddings.weight"])
    assert same == (trained != "all")
    assert not torch.equal(stored["pooler.weight"], start["bert.pooler.dense.weight"])
    assert main(["predict", str(run), "the good film"]) == 0
    assert capsys.readouterr().out.startswith("class ")


def test_the_head_of_a_bert_classifier_goes_on(documents, capsys):
    from fastattn.cli import main

    source = ["--data.source", str(documents / "documents.jsonl"), "--data.columns.label", "label"]
    arguments = [*command(documents), "--start", str(documents / "classes"), "--task", "classify", *source]
    assert main([*arguments, "--run", str(documents / "run")]) == 0
    assert "loaded all weights" not in capsys.readouterr().err


def test_bert_as_a_masked_lm(documents, capsys):
    from fastattn.cli import main

    source = ["--data.source", str(documents / "documents.jsonl")]
    arguments = [*command(documents), "--start", str(documents / "bert"), "--task", "masked_lm", *source]
    assert main([*arguments, "--run", str(documents / "run")]) == 0
    assert "loaded all weights" not in capsys.readouterr().err
    assert main([*arguments, "--run", str(documents / "other"), "--model.head_transform", "false"]) == 2
    assert "the checkpoint has head.bias, which this model does not" in capsys.readouterr().err


@pytest.mark.parametrize("packed", ["true", "false"])
def test_gpt2_on_other_text(documents, capsys, packed):
    from fastattn.cli import main

    run = documents / "run"
    source = ["--data.source", str(documents / "text.txt"), "--data.packed", packed, "--model.block_size", "10"]
    arguments = [*command(documents), "--start", str(documents / "gpt2"), *source, "--run", str(run)]
    assert main(arguments) == 0
    out, error = capsys.readouterr()
    assert "loaded all weights" not in error
    losses = [
        float(line.split("validation loss ")[1].split()[0]) for line in out.splitlines() if line.startswith("step ")
    ]
    assert losses[-1] < losses[0]
    assert (run / "sample.txt").read_text().startswith("the")
    assert main(["generate", str(run), "--prompt", "the good", "--max_new_tokens", "5"]) == 0


def test_a_hugging_face_folder_that_does_not_fit(documents, capsys):
    from fastattn.cli import main

    base = ["--data.source", str(documents / "text.txt"), "--run", str(documents / "run")]
    (documents / "bert" / "tokenizer.json").unlink()
    for start, options, expected in (
        ("bert", ["--task", "masked_lm"], "has no tokenizer.json"),
        ("gpt2", ["--task", "masked_lm"], "is of task lm, which cannot start task masked_lm"),
        (
            "gpt2",
            ["--model.block_size", "25"],
            "position_embedding.weight must have shape (25, 16) as in this model, got (24, 16)",
        ),
        ("gpt2", ["--model.norm_eps", "1e-6"], "model.norm_eps must be 1e-05 as in"),
    ):
        assert main([*command(documents), "--start", str(documents / start), *options, *base]) == 2
        assert expected in capsys.readouterr().err
        assert not (documents / "run").exists()
