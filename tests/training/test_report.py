"""Reports, their pictures, comparisons of runs, and attention maps."""

import json
import math
import warnings

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="needs the packages of fastattn[eval]")
pytest.importorskip("sklearn", reason="needs the packages of fastattn[eval]")
import matplotlib.image
import torch

from fastattn.models import CausalLM
from fastattn.training.evaluation.compare import compare_runs
from fastattn.training.evaluation.report import cell, confusions, report_markdown, write_report
from fastattn.training.inspect.attention_maps import attention_maps
from fastattn.training.inspect.figures import label, plot_attention, plot_calibration, plot_confusion
from fastattn.training.inspect.scores import classification_scores
from fastattn.training.messages import UsageError
from fastattn.training.runs.checkpoint import RUN_FILES, save_checkpoint

STRANGE = [
    "$x",
    "$\\frac{$",
    "한국어",
    "\u0000\u200b",
    "a|b",
    "<unk>",
    "\ud800",
    "\n",
    "",
    "\U0001f600",
    "\\$_^",
    "x" * 99,
]


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def read_png(path):
    """Its pixels (height, width, 4) from 0 to 1; checks that the picture is not blank."""
    pixels = matplotlib.image.imread(path)
    assert pixels.ndim == 3
    assert len(np.unique(pixels[::3, ::3, :3].sum(-1))) > 10
    return pixels


def random_scores(names, n=300, probabilities=True):
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(len(names)), n)
    return classification_scores(rng.integers(len(names), size=n), p.argmax(1), p if probabilities else None, names)


def table_of(text, title=None):
    """{first cell: cells} of the Markdown table after a title."""
    lines = (text if title is None else text.split(f"## {title}\n\n")[1]).split("\n\n")
    rows = next(block for block in lines if block.startswith("|")).strip().split("\n")
    assert set(rows[1]) <= set("|-: ")
    assert rows[1].count("|") == rows[0].count("|")
    rows = [row.strip("|").split(" | ") for row in (rows[0], *rows[2:])]
    assert len({len(row) for row in rows}) == 1
    return {row[0].strip(): [entry.strip() for entry in row[1:]] for row in rows}


def test_report_of_classes(tmp_path):
    truth, predicted = [0, 0, 0, 1, 1, 2], [0, 0, 1, 0, 0, 0]
    p = np.eye(3)[predicted] * 0.7 + 0.1
    report = {"run": "runs/a", "step": 2000, "tokens": None, **classification_scores(truth, predicted, p, list("abc"))}
    report["perplexity"] = math.inf
    folder = tmp_path / "deep" / "run"
    written = write_report(folder, report)
    assert [path.name for path in written] == [
        "report.json",
        "confusion.png",
        "calibration.png",
        "report.md",
        "report.html",
    ]
    assert {path.name for path in folder.iterdir()} == {path.name for path in written} <= RUN_FILES
    stored = json.loads((folder / "report.json").read_text())
    assert stored == {**report, "perplexity": None}
    text = (folder / "report.md").read_text()
    assert text.startswith("# Evaluation of runs/a\n")
    first = table_of(text)
    assert (first["step"], first["accuracy"], first["tokens"]) == (["2,000"], ["0.3333"], ["–"])
    assert table_of(text, "Averages over the classes")["macro"] == ["0.1333", "0.2222", "0.1667"]
    classes = table_of(text, "Classes")
    assert classes["name"] == ["precision", "recall", "f1", "support", "predicted"]
    assert classes["a"] == ["0.4000", "0.6667", "0.5000", "3", "5"]
    found = text.split("## Most frequent confusions")[1].split("\n\n")[1].split("\n")[2:]
    assert found == ["| b | a | 2 | 1.0000 |", "| c | a | 1 | 1.0000 |", "| a | b | 1 | 0.3333 |"]
    assert "![confusion matrix](confusion.png)" in text
    assert "![reliability diagram](calibration.png)" in text
    assert "attention" not in text
    for name in ("confusion.png", "calibration.png"):
        read_png(folder / name)


def test_report_of_a_translation_shows_signature_and_pictures_of_the_run(tmp_path):
    (tmp_path / "attention.png").write_bytes(b"picture")
    written = write_report(tmp_path, {"run": "r", "bleu": 31.5, "bleu_signature": "nrefs:1|tok:13a"})
    assert [path.name for path in written] == ["report.json", "report.md", "report.html"]
    text = (tmp_path / "report.md").read_text()
    assert r"| bleu_signature | nrefs:1\|tok:13a |" in text
    assert "![attention map](attention.png)" in text


def test_a_full_disk_leaves_the_old_report(tmp_path, monkeypatch):
    write_report(tmp_path, {"run": "old"})
    before = (tmp_path / "report.json").read_bytes()

    def refuse(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(OSError, match="No space left"):
        write_report(tmp_path, {"run": "new"})
    assert (tmp_path / "report.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]


def test_no_confusion_and_many():
    perfect = classification_scores([0, 1], [0, 1], None, ["a", "b"])
    assert report_markdown(perfect).split("## Most frequent confusions")[1].strip() == "None."
    scores = random_scores([f"class {i}" for i in range(20)])
    rows = report_markdown(scores).split("## Most frequent confusions")[1].strip().split("\n")
    assert len(rows) == 2 + 20
    pairs = confusions(scores["confusion"], [row["name"] for row in scores["classes"]])
    assert sum(pair[2] for pair in pairs) == round(300 * (1 - scores["accuracy"]))
    assert [pair[2] for pair in pairs] == sorted((pair[2] for pair in pairs), reverse=True)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (math.nan, "–"), (0, "0"), (0.0, "0.0000"), (12345.6, "12,346"), (True, "True"), ("a\n|b", "a \\|b"),
     ("<b>", "&lt;b&gt;"), ("\ud800", "\\ud800")],
)  # fmt: skip
def test_cells(value, text):
    assert cell(value) == text


def test_strange_names_in_every_picture_and_table(tmp_path):
    write_report(tmp_path, {"run": "$\\frac{$", **random_scores(STRANGE)})
    read_png(tmp_path / "confusion.png")
    json.loads((tmp_path / "report.json").read_text())
    assert r"| a\|b |" in (tmp_path / "report.md").read_text()
    weights = torch.rand(2, len(STRANGE), len(STRANGE)).softmax(-1)
    plot_attention(tmp_path / "attention.png", weights, STRANGE)
    read_png(tmp_path / "attention.png")


def test_labels():
    assert label("größe €") == "größe €"
    assert label("한") == "\\ud55c"
    assert label("a\tb") == "a\\tb"
    assert label("$x$") == r"\$x\$"
    assert label("x" * 30) == "x" * 23 + "…"


def test_confusion_matrix_of_two_and_of_many_classes(tmp_path):
    plot_confusion(tmp_path / "two.png", [[9, 1], [0, 0]], ["ham", "spam"])
    small = read_png(tmp_path / "two.png")
    names = [f"a class of number {i}" for i in range(150)]
    plot_confusion(tmp_path / "many.png", random_scores(names)["confusion"], names)
    large = read_png(tmp_path / "many.png")
    assert 300 < small.shape[0] < 1000
    assert 150 * 12 < large.shape[0] < 4000  # 12 pixels per class are readable
    assert large.shape[1] < 4000


def test_confusion_matrix_shows_a_perfect_diagonal(tmp_path):
    plot_confusion(tmp_path / "a.png", np.eye(40) * 7, [""] * 40)
    red, green, blue, _ = read_png(tmp_path / "a.png").transpose(2, 0, 1)
    dark = (red < 0.1) & (green < 0.25) & (blue > 0.35)  # pixels of share 1 that are neither lines nor letters
    rows, columns = dark[:, : dark.shape[1] * 3 // 4].nonzero()  # the rest is the colour bar
    assert len(rows) > 40 * 100
    assert np.abs((rows - rows.mean()) - (columns - columns.mean())).max() < 16  # a cell has 14 pixels


def test_calibration_of_empty_bins(tmp_path):
    plot_calibration(tmp_path / "a.png", random_scores(["a", "b"], n=1)["calibration"])
    read_png(tmp_path / "a.png")


def test_attention_picture(tmp_path):
    path = tmp_path / "attention.png"
    weights = torch.rand(3, 4, 6, dtype=torch.bfloat16, requires_grad=True)
    plot_attention(path, weights, list("abcd"), keys=list("uvwxyz"))
    read_png(path)
    plot_attention(path, torch.rand(1, 1, 1), ["a"])
    plot_attention(path, np.random.default_rng(0).random((1, 250, 250)), ["token"] * 250)
    assert max(read_png(path).shape) < 4000
    for wrong in (torch.rand(4, 4), torch.rand(0, 4, 4), torch.rand(2, 4, 5)):
        with pytest.raises(UsageError, match="must be"):
            plot_attention(path, wrong, list("abcd"))


def make_run(folder, losses=((0, 4.0), (10, 3.0), (20, 3.5)), report=None, **config):
    folder.mkdir(parents=True)
    rows = [f"{step},,{loss},,,," for step, loss in losses]
    rows += [f"{step},1.0,,,,{100 + step},0.5" for step, _ in losses[1:]]
    header = "step,train_loss,validation_loss,learning_rate,grad_norm,tokens_per_second,seconds"
    (folder / "metrics.csv").write_text("\n".join([header, *rows]) + "\n")
    model = {"n_layer": 2, "n_head": 4, "d_model": 64, **config}
    (folder / "config.yaml").write_text(json.dumps({"layers": "torch", "model": model}))
    for step, loss in losses[1:]:
        save_checkpoint(folder, step, torch.nn.Linear(3, 5), {}, {"validation_loss": loss}, keep=9)
    if report is not None:
        write_report(folder, report)
    return folder


def test_runs_side_by_side(tmp_path):
    a = make_run(tmp_path / "a", report={"step": 10, "source": "topics", "split": "test", "loss": 0.0})
    b = make_run(tmp_path / "b", losses=((0, 5.0), (10, 2.0)), body="lstm")
    baseline = tmp_path / "words"
    write_report(baseline, {"architecture": "words", "parameters": 7, **random_scores(["x", "y"])})
    output = tmp_path / "out"
    text = compare_runs([str(a), str(b), str(baseline)], str(output))
    rows = table_of(text)
    header = rows.pop("run")
    rows = {name: dict(zip(header, cells, strict=True)) for name, cells in rows.items()}
    assert rows[str(a)] == {
        "architecture": "transformer, 2 × 64, 4 heads, torch", "parameters": "20", "evaluated on": "topics, test",
        "loss": "0.0000", "accuracy": "–", "macro precision": "–", "macro recall": "–", "macro F1": "–",
        "log loss": "–", "calibration error": "–", "validation loss": "3.0000", "steps": "20", "seconds": "1.0000",
        "tokens/s": "115.0000",
    }  # fmt: skip
    assert rows[str(b)]["architecture"] == "lstm, 2 × 64, torch"
    assert (rows[str(b)]["loss"], rows[str(b)]["evaluated on"]) == ("–", "no report")  # missing, not 0
    words = rows[str(baseline)]
    assert (words["architecture"], words["parameters"], words["steps"], words["loss"]) == ("words", "7", "–", "–")
    assert 0 < float(words["accuracy"]) < 1
    assert text.split("\n")[1].startswith("| --- | --- | ---: | --- | ---: |")  # numbers are right-aligned
    assert (output / "comparison.md").read_text().startswith(text)
    read_png(output / "comparison.png")


def test_checkpoints_side_by_side(tmp_path):
    run = make_run(tmp_path / "a@b", report={"step": 20, "loss": 2.0})
    write_report(run / "reports" / "10", {"step": 10, "loss": 1.0})
    rows = table_of(compare_runs([f"{run}@{which}" for which in ("10", "20", "best", "last")] + [str(run)]))
    header = rows.pop("run")
    picked = [header.index(title) for title in ("loss", "validation loss", "steps", "seconds")]
    found = {name.removeprefix(str(run)): [cells[i] for i in picked] for name, cells in rows.items()}
    early, late = ["1.0000", "3.0000", "10", "0.5000"], ["2.0000", "3.5000", "20", "1.0000"]
    assert found == {
        "@10": early, "@best": early, "@20": late, "@last": late, "": late,
    }  # fmt: skip


def test_runs_that_cannot_be_compared(tmp_path):
    with pytest.raises(UsageError, match="compare needs at least one run"):
        compare_runs([])
    with pytest.raises(UsageError, match=r"has neither config\.yaml nor report\.json"):
        compare_runs([str(tmp_path / "nothing")])
    run = make_run(tmp_path / "a")
    with pytest.raises(UsageError, match=r"a saved step \(10, 20\), got '11'"):
        compare_runs([f"{run}@11"])
    (run / "report.json").write_text('{"loss"')
    with pytest.raises(UsageError, match="is not a report"):
        compare_runs([str(run)])
    (run / "report.json").write_text("{}")
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(UsageError, match="is not valid YAML"):
        compare_runs([str(run)])
    (run / "metrics.csv").write_text("step,validation_loss\n1,abc\n")
    with pytest.raises(UsageError, match="is not a table of numbers"):
        compare_runs([str(run)])
    bare = tmp_path / "bare"
    write_report(bare, {})
    with pytest.raises(UsageError, match="has no checkpoint yet for '@best'"):
        compare_runs([f"{bare}@best"])
    # no curve at all gives an empty picture
    assert "validation loss" in compare_runs([str(bare)], str(tmp_path / "out"))


@pytest.mark.parametrize("layers", ["fastattn", "torch"])
def test_attention_maps_are_the_softmax_of_the_scores(layers):
    torch.manual_seed(0)
    model = CausalLM(11, n_layer=2, n_head=2, d_model=8, block_size=16, dropout=0.5, layers=layers, init="xavier")
    tokens = torch.randint(11, (1, 7))
    maps = attention_maps(model, tokens)
    assert model.training
    assert [tuple(weights.shape) for weights in maps] == [(2, 7, 7)] * 2
    model.eval()
    with torch.no_grad():
        x = model.token_embedding(tokens) + model.position_embedding.weight[:7]
        for block, weights in zip(model.blocks, maps, strict=True):
            attention = block.self_attn
            qkv = torch.nn.functional.linear(block.norm1(x), attention.in_proj_weight, attention.in_proj_bias)
            q, k, _ = qkv.unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)[:, 0]
            scores = (q @ k.mT / 2).masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
            torch.testing.assert_close(weights, scores.softmax(-1))
            x = block(x, src_mask=torch.ones(7, 7).triu(1).bool(), is_causal=True)
        after = model(tokens)
    attention_maps(model, tokens)
    with torch.no_grad():
        assert torch.equal(model(tokens), after)  # all hooks are removed


@pytest.mark.parametrize("layers", ["fastattn", "torch"])
@pytest.mark.parametrize("options", [{"positions": "rotary", "n_kv_head": 1}, {"positions": "alibi"}])
def test_attention_maps_of_our_own_blocks(layers, options):
    torch.manual_seed(0)
    model = CausalLM(11, n_layer=1, n_head=2, d_model=8, block_size=16, layers=layers, init="xavier", **options).eval()
    tokens = torch.randint(11, (1, 7))
    (weights,) = attention_maps(model, tokens)
    seen = []
    attention = model.blocks[0].self_attn
    attention.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        model(tokens)
        x, output = seen[0]
        heads = options.get("n_kv_head", 2)
        v = (x[0] @ attention.in_proj_weight[-4 * heads :].mT).unflatten(-1, (heads, 4)).transpose(0, 1)
        values = (weights @ v).transpose(0, 1).flatten(1)
        torch.testing.assert_close(attention.out_proj(values), output[0], rtol=1e-4, atol=1e-5)


def test_attention_maps_of_cross_attention():
    torch.manual_seed(0)
    blocks = torch.nn.ModuleList(torch.nn.TransformerDecoderLayer(8, 2, 16, batch_first=True) for _ in range(2))

    class Decoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = blocks

        def forward(self, x, memory):
            for block in self.blocks:
                x = block(x, memory)

    x, memory = torch.randn(1, 3, 8), torch.randn(1, 5, 8)
    for weights in attention_maps(Decoder(), x, memory, name="multihead_attn"):
        assert weights.shape == (2, 3, 5)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3))
    with pytest.raises(UsageError, match="the batch must be one text"):
        attention_maps(Decoder(), x.expand(2, -1, -1), memory.expand(2, -1, -1))


def test_attention_maps_of_what_has_none():
    class Model(torch.nn.Module):
        def __init__(self, *blocks):
            super().__init__()
            self.blocks = torch.nn.ModuleList(blocks)

        def forward(self, x):
            return x

    with pytest.raises(UsageError, match="self_attn of every block must be a MultiheadAttention, got NoneType"):
        attention_maps(Model(torch.nn.Linear(2, 2)), torch.zeros(1, 2, 2))
    with pytest.raises(UsageError, match="got no blocks"):
        attention_maps(Model(), torch.zeros(1, 2, 2))
    layer = torch.nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    with pytest.raises(UsageError, match="a block does not call its self_attn"):
        attention_maps(Model(layer), torch.zeros(1, 2, 4))
