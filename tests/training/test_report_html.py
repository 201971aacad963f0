"""The report as one HTML file: it has all of an evaluation and needs nothing else."""

import base64
import re
from html.parser import HTMLParser

import pytest

pytest.importorskip("matplotlib", reason="needs the packages of fastattn[eval]")
pytest.importorskip("sklearn", reason="needs the packages of fastattn[eval]")

from fastattn.training.evaluation.report import write_report
from fastattn.training.inspect.scores import classification_scores

VOID = {"meta", "img"}


class Reader(HTMLParser):
    """The text and the attributes of a page; checks that tags are closed in their order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.sources = [], [], {}
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.sources[dict(attrs)["alt"]] = dict(attrs)["src"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def scores(names):
    p = [[0.7, 0.3], [0.6, 0.4], [0.2, 0.8]]
    return classification_scores([0, 1, 1], [0, 0, 1], p, names)


def test_everything_is_inside(tmp_path):
    run, folder = tmp_path / "runs" / "spam", tmp_path / "runs" / "spam" / "reports" / "20"
    run.mkdir(parents=True)
    (run / "loss.png").write_bytes(b"loss of the run")
    (run / "attention.png").write_bytes(b"of another evaluation")
    (run / "config.yaml").write_text("seed: 7\n")
    (run / "sample.txt").write_text("a sample\nof two lines")
    write_report(folder, {"run": str(run), "step": 20, "perplexity": 2.5, **scores(["spam", "ham"])}, run)
    text = (folder / "report.html").read_text()
    page = Reader(text)
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:)|url\(|<script|@import""", text)
    assert list(page.sources) == ["Loss curve", "Confusion matrix", "Reliability diagram"]
    pictures = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in page.sources.values()]
    assert pictures[0] == b"loss of the run"
    assert pictures[1:] == [(folder / name).read_bytes() for name in ("confusion.png", "calibration.png")]
    for word in (
        "Evaluation of spam",
        "step",
        "20",
        "2.5000",
        "log loss",
        "macro",
        "Most frequent confusions",
        "seed: 7\n",
    ):
        assert word in page.words
    assert "a sample\nof two lines" in page.words


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "a|b", "\ud800", '"&<'])
def test_names_of_the_data_are_only_text(tmp_path, name):
    write_report(tmp_path, {"run": name, "source": name, **scores([name, "b"])})
    text = (tmp_path / "report.html").read_text()
    assert "<script>" not in text
    assert name.encode("utf-8", "backslashreplace").decode() in Reader(text).words


def test_a_report_without_pictures(tmp_path):
    write_report(tmp_path, {"run": "words", "bleu": 31.5})
    page = Reader((tmp_path / "report.html").read_text())
    assert not page.sources
    assert "31.5000" in page.words
