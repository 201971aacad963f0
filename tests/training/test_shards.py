"""A corpus in shards of tokens: the same texts as elsewhere, the same files, and the same order for every reader."""

import gzip
import itertools
import json
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pytest
import torch
from training_cases import assert_same_run, column, numbers, tiny_config, tiny_model

from fastattn.cli import main
from fastattn.training.config import Columns, DataConfig
from fastattn.training.data.order import WindowOrder, permute
from fastattn.training.data.shards import _Writer, part_of
from fastattn.training.data.sources import read_documents
from fastattn.training.data.stream import stream_texts
from fastattn.training.data.token_folder import Shards, open_token_folder
from fastattn.training.messages import UsageError
from fastattn.training.runs.train import train
from fastattn.training.tasks.registry import make_task


def documents(n=300):
    return [f"document {i} has {i % 7} of {'many ' * (i % 4)}words" for i in range(n)]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents()))
    return path


def shard(corpus, output, *options):
    how = ["--validation_fraction", "0.2", "--shard_tokens", "2000"]
    how += [] if "--tokenizer_file" in options else ["--vocab_size", "300"]
    assert main(["data", "shard", str(corpus), "--output", str(output), *how, *map(str, options)]) == 0
    return output


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["line", "paragraph", "file"])
@pytest.mark.parametrize("ending", [".txt", ".md.gz"])
def test_a_stream_has_the_texts_of_other_readers(tmp_path, unit, ending):
    generator = np.random.default_rng(0)
    pieces = ["a", "é", " ", "\n", "\r\n", "\r", "\u2028", "\x0b", "한", "\t", "\n\n", "\ufeff", "\U0001f600"]
    for number in range(40):
        text = "x" + "".join(generator.choice(pieces, generator.integers(0, 30)))
        content = (b"\xef\xbb\xbf" if number % 3 == 0 else b"") + text.encode()
        path = tmp_path / f"{number}{ending}"
        path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
        assert list(stream_texts(str(path), Columns(), unit)) == read_documents(str(path), unit=unit)["all"].texts
    folder = list(stream_texts(str(tmp_path), Columns(), unit))
    assert folder == read_documents(str(tmp_path), unit=unit)["all"].texts


def test_tables_and_named_sets_are_streamed_too(tmp_path):
    rows = [{"body": text, "more": 1} for text in documents(2500)]
    columns = Columns(text="body")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    (tmp_path / "b.csv").write_text("body,more\n" + "".join(f'"{row["body"]}",1\n' for row in rows))
    for name in ("a.jsonl", "b.csv"):
        assert list(stream_texts(str(tmp_path / name), columns)) == documents(2500)
    assert list(stream_texts("hangul", Columns()))[:3] == read_documents("hangul")["train"].texts[:3]


@pytest.mark.parametrize(("name", "content", "problem"), [
    ("a.txt", b"good\nbad \xff\n", "is not UTF-8 after line "),
    ("a.txt", b"good\nzero \0\n", r"is a binary file \(a zero in line 2\)"),
    ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2 is not valid JSON"),
    ("a.jsonl", b'{"text": "x"}\n{"text": null}\n', r"a\.jsonl, line 2: column 'text' is empty"),
    ("a.txt.gz", gzip.compress(b"line\n" * 9000, mtime=0)[:-20], "is not valid gzip data after line"),
    ("a.txt.gz", b"no gzip", "is not valid gzip data after line 0"),
    ("a.txt", b" \n", "the train part has no documents"),
])  # fmt: skip
def test_a_damaged_corpus_is_one_line_and_leaves_nothing(tmp_path, capsys, name, content, problem):
    (tmp_path / name).write_bytes(content)
    options = ["--tokenizer", "byte", "--output", str(tmp_path / "out")]
    assert main(["data", "shard", str(tmp_path / name), *options]) == 2
    with pytest.raises(AssertionError, match=problem):
        raise AssertionError(capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == [name]


# --- shards -----------------------------------------------------------------------------------------------------------


def test_shards_hold_the_documents_whatever_the_processes(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastattn.training.data.shards._BATCH", 1000)
    one, two = (shard(corpus, tmp_path / str(n), "--processes", n) for n in (1, 2))
    assert files_of(one) == files_of(two)
    assert (one / "train-00001.tokens").exists()
    folder = open_token_folder(one, with_ends=True)
    for part, expected in (("train", []), ("validation", [])):
        expected += [text for text in documents() if part_of(text, {"validation": 0.2}) == part]
        starts = [0, *folder.ends[part].tolist()]
        tokens = folder.splits[part][:]
        end = folder.tokenizer.number_of("[SEP]")
        found = [tokens[a:b].tolist() for a, b in itertools.pairwise(starts)]
        assert [folder.tokenizer.decode(numbers) for numbers in found] == expected
        assert all(numbers[-1] == end for numbers in found)
    report = json.loads((one / "data.json").read_text())
    assert report["train"]["tokens"] == len(folder.splits["train"])
    assert report["train"]["documents"] + report["validation"]["documents"] == 300


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_an_interrupted_corpus_goes_on_and_is_the_same(corpus, tmp_path, capsys, monkeypatch, kind):
    options = ["--tokenizer", kind, "--shard_tokens", "1000"]
    expected = files_of(shard(corpus, tmp_path / "whole", *options))
    output, flush, stops = tmp_path / "parts", _Writer.flush, 0
    monkeypatch.chdir(tmp_path)  # what changes in the working directory does not count

    def interrupted(writer):
        if stops % 3 == 2:  # after the shard of this call
            flush(writer)
        raise KeyboardInterrupt

    command = ["data", "shard", str(corpus), "--output", str(output), "--validation_fraction", "0.2"]
    command += ["--vocab_size", "300", *options]
    while stops < 12:
        monkeypatch.setattr(_Writer, "flush", interrupted)
        monkeypatch.setattr("fastattn.training.data.shards._BATCH", 300 + 100 * stops)
        assert main([*command, "--processes", "1"]) == 130
        assert not output.exists()
        stops += 1
    monkeypatch.setattr(_Writer, "flush", flush)
    (tmp_path / "parts.unfinished" / ".train-00000.tokens.1.tmp").write_bytes(b"of a killed process")
    capsys.readouterr()
    assert main(command) == 0
    assert "continuing after" in capsys.readouterr().err
    assert files_of(output) == expected


def test_an_unfinished_corpus_with_other_settings_or_texts_is_refused(corpus, tmp_path, capsys, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    command = ["data", "shard", str(corpus), "--output", str(tmp_path / "out"), "--tokenizer", "byte"]
    with monkeypatch.context() as patch:
        patch.setattr(_Writer, "flush", interrupted)
        assert main([*command, "--validation_fraction", "0.2"]) == 130
    for options, change, problem in (
        (["--validation_fraction", "0.3"], "", "was begun with other settings (fractions)"),
        (["--validation_fraction", "0.2", "--shard_tokens", "9"], "", "was begun with other settings (shard_tokens)"),
        (["--validation_fraction", "0.2"], '{"text": "new"}\n', "was begun with other settings (state of the source)"),
    ):
        corpus.write_text(corpus.read_text() + change)
        assert main([*command, *options]) == 2
        assert problem in capsys.readouterr().err
    settings = tmp_path / "out.unfinished" / "settings.json"
    settings.write_text("{")
    assert main([*command, "--validation_fraction", "0.2"]) == 2
    assert "is damaged: remove the folder" in capsys.readouterr().err
    settings.unlink()
    assert main([*command, "--validation_fraction", "0.2"]) == 2
    assert "must be empty or an unfinished output" in capsys.readouterr().err


def test_a_worker_that_dies_loses_no_file(corpus, tmp_path, capsys, monkeypatch):
    def broken(*_):
        raise BrokenProcessPool
        yield

    monkeypatch.setattr("fastattn.training.data.shards._encode_all", broken)
    command = ["data", "shard", str(corpus), "--output", str(tmp_path / "out"), "--tokenizer", "byte"]
    assert main([*command, "--processes", "2"]) == 2
    assert "a worker process died, perhaps because memory ran out" in capsys.readouterr().err
    assert (tmp_path / "out.unfinished" / "tokenizer.json").is_file()


@pytest.mark.parametrize("what", ["tokenize", "shard"])
def test_what_a_tokenizer_file_decides_is_refused_beside_it(corpus, tmp_path, capsys, what):
    file = shard(corpus, tmp_path / "first", "--tokenizer", "word") / "tokenizer.json"
    options = {"tokenizer": "word", "vocab_size": 300, "strip_accents": "true"}
    options |= {"learn_from": 9} if what == "shard" else {"specials": '["[MASK]"]'}
    for name, value in options.items():
        command = ["data", what, str(corpus), "--output", str(tmp_path / "out"), "--tokenizer_file", str(file)]
        capsys.readouterr()
        assert main([*command, f"--{name}", str(value)]) == 2
        assert f"{name} must be left out with tokenizer_file" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == []


def test_a_document_that_waits_keeps_only_itself_in_memory(tmp_path):
    writer = _Writer(tmp_path, "validation", 100, None)
    batch = np.arange(10**6, dtype=np.int32)
    for piece in np.split(batch, [3]):
        writer.add(piece[:50])
    assert sum(piece.nbytes if piece.base is None else piece.base.nbytes for piece in writer.pieces) == 4 * 53


def test_several_tensors_are_read_as_one():
    whole = torch.arange(100, dtype=torch.int32)
    shards = Shards(list(whole.split([1, 40, 0, 9, 50])))
    index = torch.from_numpy(np.random.default_rng(0).integers(0, 100, (7, 5)))
    assert torch.equal(shards[index], whole[index])
    for where in (slice(0, 0), slice(3, 60), slice(None), slice(95, 200)):
        assert torch.equal(shards[where], whole[where])
    assert len(shards) == 100
    assert shards.count(41) == 1


def test_missing_and_foreign_files_are_refused(corpus, tmp_path):
    folder = shard(corpus, tmp_path / "out")
    ends = (folder / "train-00000.ends").read_bytes()
    (folder / "train-00000.ends").write_bytes(ends[:-8])
    with pytest.raises(UsageError, match=r"train-00000\.ends does not belong to train-00000\.tokens"):
        open_token_folder(folder, with_ends=True)
    (folder / "train-00001.tokens").unlink()
    with pytest.raises(UsageError, match=r"train must have \d+ files, got \d+"):
        open_token_folder(folder)
    (folder / "data.json").unlink()
    with pytest.raises(UsageError, match=r"data\.json must say how many shards train has"):
        open_token_folder(folder)


# --- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 15, 16, 17, 1000, 4097])
def test_permute_moves_each_number_to_a_place_of_its_own(n):
    for seed in range(5):
        keys = np.random.default_rng(seed).integers(2**64, size=6, dtype=np.uint64)
        places = permute(np.arange(n), n, keys)
        assert sorted(places.tolist()) == list(range(n))
    if n > 100:  # far from the order of the numbers, and from that of other keys
        assert abs(np.corrcoef(places, np.arange(n))[0, 1]) < 0.2
        assert (places == permute(np.arange(n), n, keys[::-1])).mean() < 0.02


def test_a_shuffle_reads_each_window_once_an_epoch_in_batches_of_any_size():
    orders = [WindowOrder([1003], [1.0], 7, batch, 10, shuffle=True) for batch in (4, 20)]
    small, large = (torch.cat([order.starts(step) for step in range(steps)]) for order, steps in
                    zip(orders, (75, 15), strict=True))  # fmt: skip
    assert torch.equal(small, large)
    for epoch in small.view(3, 100):
        offset = int(epoch.min())
        assert offset < 3  # as far as there is room
        assert sorted(epoch.tolist()) == list(range(offset, 1000, 10))
    assert not torch.equal(small[:100], small[100:200])


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_mixture_has_the_shares_of_its_weights(shuffle):
    sizes, weights = [500, 5000, 1001], [1.0, 2.0, 5.0]
    order = WindowOrder(sizes, weights, 3, 50, 10, shuffle)
    starts = torch.cat([order.starts(step) for step in range(40)])
    assert torch.equal(starts, torch.cat([order.starts(step) for step in range(40)]))
    bounds = torch.tensor([500, 5500, 6501])
    source = torch.searchsorted(bounds, starts, right=True)
    assert source.bincount().tolist() == [250, 500, 1250]
    assert torch.equal(torch.searchsorted(bounds, starts + 10, right=True), source)  # a window is in one source
    if shuffle:
        for number, size in enumerate(sizes):
            windows = (size - 1) // 10
            assert (starts[source == number][:windows].unique()).numel() == min(windows, 500)
    with pytest.raises(UsageError, match="a weight must be at least 1/1000 of their sum"):
        WindowOrder([100, 100], [1.0, 1e-5], 3, 5, 10, shuffle)


# --- training ---------------------------------------------------------------------------------------------------------


def config_of(run, **data):
    data = DataConfig(order="shuffle", packed=True, **data)
    options = {"steps": 12, "evaluate_every": 4, "batch_size": 4, "sample_prompt": None}
    return tiny_config(run, "", data=data, model=tiny_model(n_layer=1), **options)


def test_a_mixture_of_shards_trains_and_resumes_in_the_same_order(corpus, tmp_path, capsys):
    first = shard(corpus, tmp_path / "first")
    other = tmp_path / "other.txt"
    other.write_text("".join(f"{i} other lines of text\n" for i in range(300)))
    second = shard(other, tmp_path / "second", "--tokenizer_file", first / "tokenizer.json")
    mixture = {str(first): 3, str(second): 1}
    whole, parts = config_of(tmp_path / "whole", mixture=mixture), config_of(tmp_path / "parts", mixture=mixture)
    assert train(whole) == 0
    parts.steps = 8
    parts.optim.schedule = whole.optim.schedule = "constant"
    whole = config_of(tmp_path / "again", mixture=mixture)
    whole.optim.schedule = "constant"
    assert train(whole) == 0
    assert train(parts) == 0
    assert main(["train", "--resume", str(tmp_path / "parts"), "--steps", "12"]) == 0
    assert_same_run(tmp_path / "again", tmp_path / "parts", 12)
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "again"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["documents"] > 20
    assert main(["generate", str(tmp_path / "again"), "--prompt", "document", "--max_new_tokens", "4"]) == 0


@pytest.fixture
def mixture(corpus, tmp_path):
    """{folder: weight} of two corpora with one tokenizer."""
    other = tmp_path / "other.txt"
    other.write_text("".join(f"{i} other lines of text\n" for i in range(200)))
    first = shard(corpus, tmp_path / "first")
    return {str(first): 3, str(shard(other, tmp_path / "second", "--tokenizer_file", first / "tokenizer.json")): 1}


@pytest.mark.parametrize("packed", [False, True])
def test_each_source_of_a_mixture_is_validated(mixture, tmp_path, capsys, packed):
    config = config_of(tmp_path / "run", mixture=mixture)
    config.data.packed, config.data.order = packed, "random"
    assert train(config) == 0
    best = min(numbers(tmp_path / "run", "validation_loss"))
    logged = [numbers(tmp_path / "run", f"validation_loss_{name}") for name in ("first", "second")]
    assert len(logged[0]) == len(logged[1]) == 4  # at the start, and three times
    sources, both = evaluated(capsys, tmp_path / "run", "sources", "loss")
    counts = [sources[name]["tokens"] for name in ("first", "second")]
    losses = [sources[name]["loss"] for name in ("first", "second")]
    assert losses == [pytest.approx(column[-1], abs=1e-6) for column in logged]
    assert both == pytest.approx(best, abs=1e-6) == np.average(losses, weights=counts)
    assert sources["first"]["bits_per_character"] > 0
    for name in mixture:  # the same windows as a run on this folder alone reads
        alone = config_of(tmp_path / "alone", source=name)
        alone.data.packed, alone.data.order, alone.steps = packed, "random", 1
        task, whole = make_task(alone), make_task(config)
        tokens = [torch.cat([rows[0] for rows in t.rows("validation")]) for t in (task, whole)]
        start = 0 if name == next(iter(mixture)) else len(tokens[1]) - len(tokens[0])
        assert torch.equal(tokens[1][start : start + len(tokens[0])], tokens[0])
    report = (tmp_path / "run" / "report.md").read_text()
    assert "## Sources of the mixture" in report


def evaluated(capsys, run, *keys):
    capsys.readouterr()
    assert main(["evaluate", str(run), "--json", "--split", "validation"]) == 0
    report = json.loads(capsys.readouterr().out)
    return [report[key] for key in keys]


def test_a_limit_of_windows_leaves_no_source_out(mixture, tmp_path):
    task = make_task(config_of(tmp_path / "run", mixture=mixture))
    for limit in (1, 5):
        sources = torch.cat([rows[-1] for rows in task.rows("validation", limit)])
        assert sources.unique().tolist() == [0, 1]
        assert len(sources) <= max(limit, 2)
    rows = list(task.rows("validation"))
    shared = [list(task.rows("validation", None, rank, 2)) for rank in range(2)]
    assert sum(map(len, shared)) == len(rows) > 1
    assert all(torch.equal(shared[i % 2][i // 2][0], row[0]) for i, row in enumerate(rows))


def test_a_folder_that_a_mixture_names_twice_is_refused(corpus, tmp_path, monkeypatch, capsys):
    shard(corpus, tmp_path / "a", "--tokenizer", "byte")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    for again in ("./a", str(tmp_path / "a"), "link", "b/../a"):
        options = ["--data.mixture", json.dumps({"a": 1, again: 2}), "--run", "run"]
        assert main(["train", *options]) == 2
        assert "data.mixture names one folder twice, 'a' and" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_accumulation_reads_the_same_batches(corpus, tmp_path):
    folder = shard(corpus, tmp_path / "out", "--tokenizer", "char")
    losses = []
    for accumulate in (1, 2):
        config = config_of(tmp_path / str(accumulate), source=str(folder))
        config.accumulate, config.model.dropout = accumulate, 0.0
        assert train(config) == 0
        losses.append([float(value) for _, value in column(tmp_path / str(accumulate), "train_loss")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_what_cannot_be_mixed_is_refused(corpus, tmp_path, capsys):
    first, second = shard(corpus, tmp_path / "a"), shard(corpus, tmp_path / "b", "--tokenizer", "byte")
    both = json.dumps({str(first): 1, str(second): 1})
    for options, problem in (
        (["--data.mixture", both], "were not made by the same tokenizer"),
        (["--data.mixture", both, "--data.source", str(first)], "data.source must be left out with data.mixture"),
        (["--data.mixture", json.dumps({str(first): 0})], "must be a finite number above 0, got 0"),
        (["--data.mixture", "{}"], "data.mixture must be null or at least one folder"),
        (["--data.mixture", json.dumps({str(corpus): 1})], "there is no train.tokens or train-00000.tokens"),
        (["--data.order", "shuffle", "--task", "masked_lm"], "data.order must be left out for the task masked_lm"),
        (["--data.mixture", json.dumps({str(first): 1}), "--model.block_size", "9999999"], "must have more than"),
    ):
        assert main(["train", *options, "--run", str(tmp_path / "run")]) == 2, options
        assert problem in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
