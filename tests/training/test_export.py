"""Runs for other programs: transformers and onnxruntime compute what ours compute, and a folder starts a new run."""

import json

import pytest
import torch
from training_cases import TEXT, numbers, table_config, tiny_config, tiny_model, write_table

import fastattn
from fastattn.cli import main
from fastattn.training.config import Columns, DataConfig
from fastattn.training.data.tokenizer import SPECIALS, build_tokenizer
from fastattn.training.data.tokenizer_export import convert_tokenizer
from fastattn.training.runs.train import train

BERT = {"norm_first": False, "norm_eps": 1e-12}
LLAMA = {"positions": "rotary", "norm": "rms", "bias": False, "feed_forward": "swiglu", "tied": False, "n_kv_head": 1}
TEXTS = ["9 green bottles", "one fell", "  two\n\nfor "]


@torch.enable_grad()
def make_run(tmp_path, task, **model):
    """A run of two steps in tmp_path / task."""
    run, size = tmp_path / task, {"steps": 2, "evaluate_every": 2, "sample_tokens": 0}
    if task == "lm":
        (tmp_path / "text.txt").write_text(TEXT)
        config = tiny_config(run, tmp_path / "text.txt", model=tiny_model(**model), **size)
    else:
        write_table(tmp_path / "table.jsonl")
        config = table_config(task, run, tmp_path / "table.jsonl", model=tiny_model(**model), **size)
    assert train(config) == 0
    return run


def export(run, folder, capsys, *options):
    capsys.readouterr()
    code = main(["export", str(run), str(folder), *options])
    out, error = capsys.readouterr()
    return code, json.loads(out) if out else error


@pytest.mark.parametrize("model", [{}, LLAMA, {"positions": "alibi"}], ids=["GPT-2", "Llama", "ALiBi"])
@torch.no_grad()
def test_a_language_model_in_transformers(tmp_path, capsys, model):
    transformers = pytest.importorskip("transformers")
    run, folder = make_run(tmp_path, "lm", **model), tmp_path / "out"
    code, facts = export(run, folder, capsys)
    if model.get("positions") == "alibi":
        assert code == 2
        assert "gpt2 differs in positions" in facts
        assert facts.count("\n") == 1
        assert not folder.exists()
        return
    assert (code, facts["model_type"], facts["step"]) == (0, "llama" if model else "gpt2", 2)
    ours = fastattn.load_run(run)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS[:2]:
        tokens = ours.tokenizer.encode(text)
        assert tokenizer(text).input_ids == tokens
        assert tokenizer.decode(tokens) == text
        x = torch.tensor([tokens])
        torch.testing.assert_close(theirs(x).logits, ours.model(x), rtol=1e-4, atol=1e-5)
    assert export(run, folder, capsys)[1] == f"fastattn: error: export writes a new folder, but '{folder}' exists\n"


@torch.no_grad()
def test_encoders_in_transformers(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    run = make_run(tmp_path, "masked_lm", head_transform=True, **BERT)
    assert export(run, tmp_path / "bert", capsys)[1]["model_type"] == "bert"
    ours, text = fastattn.load_run(run), "red green 7 nothing"
    tokens = ours.task.encode(text)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "bert")
    assert tokenizer(text).input_ids == tokens
    x, lengths = torch.tensor([tokens]), torch.tensor([len(tokens)])
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "bert").eval()
    torch.testing.assert_close(theirs(x).logits, ours.model(x, lengths), rtol=1e-4, atol=1e-5)
    run = make_run(tmp_path, "classify", pooling="pooler", **BERT)
    assert export(run, tmp_path / "classifier", capsys)[0] == 0
    ours = fastattn.load_run(run)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier").eval()
    torch.testing.assert_close(
        theirs(x).logits.softmax(-1), ours.task.predict(ours.model, [text]), rtol=1e-4, atol=1e-5
    )
    assert [theirs.config.id2label[n] for n in range(len(ours.task.names))] == ours.task.names
    code, error = export(make_run(tmp_path, "translate"), tmp_path / "other", capsys)
    assert code == 2
    assert "--format onnx writes any model" in error


@torch.no_grad()
def test_a_classifier_of_pairs_with_several_classes_in_transformers(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    table, run = tmp_path / "table.jsonl", tmp_path / "run"
    rows = [{"text": f"one {i}", "pair": f"two {i % 7}", "label": ["red"] * (i % 2) + ["blue"]} for i in range(60)]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = table_config("classify", run, table, model=tiny_model(pooling="pooler", **BERT), steps=2, evaluate_every=2)
    config.data.columns = Columns(label="label", label_kind="classes", pair="pair")
    with torch.enable_grad():
        assert train(config) == 0
    assert export(run, tmp_path / "out", capsys)[0] == 0
    ours = fastattn.load_run(run)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.problem_type == "multi_label_classification"
    batch = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("one 7", "two 3", return_tensors="pt")
    expected = ours.task.predict(ours.model, ["one 7"], ["two 3"])
    torch.testing.assert_close(theirs(**batch).logits.sigmoid(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task", ["lm", "masked_lm", "classify", "translate"])
@torch.no_grad()
def test_onnx_computes_the_same_for_other_sizes(tmp_path, capsys, task):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    run = make_run(tmp_path, task, **(LLAMA if task == "lm" else {}))
    code, facts = export(run, tmp_path / "onnx", capsys, "--format", "onnx")
    assert code == 0
    ours = fastattn.load_run(run)
    tokens, lengths = torch.arange(21).view(3, 7) % ours.tokenizer.vocab_size, torch.tensor([7, 5, 1])
    inputs = {"lm": (tokens,), "translate": (tokens, lengths, tokens[:, :2])}.get(task, (tokens, lengths))
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / facts["file"]), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {name: x.numpy() for name, x in zip(facts["inputs"], inputs, strict=True)})
    got, expected = torch.from_numpy(got), ours.model(*inputs)
    if task == "masked_lm":  # what stands at padding has no meaning
        got, expected = (x[torch.arange(7) < lengths[:, None]] for x in (got, expected))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "onnx" / "tokenizer.json").is_file()


def test_an_exported_folder_starts_a_run(tmp_path, capsys):
    run = make_run(tmp_path, "masked_lm", head_transform=True, **BERT)
    assert export(run, tmp_path / "bert", capsys)[0] == 0
    arguments = ["--task", "masked_lm", "--data.source", str(tmp_path / "table.jsonl"), "--steps", "1"]
    arguments += ["--batch_size", "8", "--tensorboard", "false", "--data.test_fraction", "0"]
    for start, new in ((run, "from_run"), (tmp_path / "bert", "from_folder")):
        assert main(["finetune", "--start", str(start), "--run", str(tmp_path / new), *arguments]) == 0
    losses = [numbers(tmp_path / new, "validation_loss") for new in ("from_run", "from_folder")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("name", ["Llama", "Gemma3"])
def test_other_families_start_a_run(tmp_path, capsys, name):
    transformers = pytest.importorskip("transformers")
    from test_checkpoint_families import their_model

    (tmp_path / "text.txt").write_text(TEXT)
    tokenizer = build_tokenizer("bpe", [], [TEXT], 300)
    their_model(transformers, name, tmp_path / "start", vocab_size=tokenizer.vocab_size)
    (tmp_path / "start" / "tokenizer.json").write_text(tokenizer.to_json())
    arguments = ["--data.source", str(tmp_path / "text.txt"), "--steps", "8", "--evaluate_every", "8"]
    arguments += ["--batch_size", "4", "--log_every", "1", "--tensorboard", "false", "--optim.warmup_steps", "1"]
    start = ["--start", str(tmp_path / "start"), "--run", str(tmp_path / "run"), "--model.block_size", "8"]
    assert main(["finetune", *start, *arguments, "--trained", "lora"]) == 0
    losses = numbers(tmp_path / "run", "validation_loss")
    assert losses[-1] < losses[0]
    code, facts = export(tmp_path / "run", tmp_path / "back", capsys)
    assert (code, facts["model_type"]) == (0, {"Llama": "llama", "Gemma3": "gemma3_text"}[name])


@pytest.mark.parametrize("kind", ["char", "byte", "word", "bpe", "wordpiece"])
def test_a_converted_tokenizer_encodes_and_decodes_as_ours(kind):
    texts = ["schön – ガス\n\tमें", "the end.", "a\u2028b  c"]
    for specials in (SPECIALS, ()) if kind in ("char", "byte", "bpe") else (SPECIALS,):
        ours = build_tokenizer(kind, texts, texts, 400, specials)
        theirs = convert_tokenizer(ours)
        assert theirs.get_vocab_size() == ours.vocab_size
        for text in texts:
            tokens = ours.encode(text)
            assert theirs.encode(text, add_special_tokens=False).ids == tokens
            assert theirs.decode(tokens) == ours.decode(tokens)
            if specials:
                assert theirs.decode([2, *tokens, 3]) == ours.decode([2, *tokens, 3])


def test_load_run_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match=r"run '.*none' does not exist"):
        fastattn.load_run(tmp_path / "none")
    run = make_run(tmp_path, "lm")
    assert fastattn.load_run(run, checkpoint="last").step == 2
    assert isinstance(fastattn.load_run(str(run)).config.data, DataConfig)
    with pytest.raises(ValueError, match="checkpoint"):
        fastattn.load_run(run, checkpoint="7")
