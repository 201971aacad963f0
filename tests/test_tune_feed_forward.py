"""The logic of scripts/tune_feed_forward.py, with invented times: nothing is measured here."""

import importlib.util
import pathlib

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parent.parent / "scripts" / "tune_feed_forward.py"
KEY, OTHER = (90, "fwd", 512, 2048, 2), (90, "bwd", 512, 2048, 2)
ROW, FAST = (128, 128, 64, 8, 3), (128, 256, 64, 8, 3)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("tune_feed_forward", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tuned(script, table, times, default, limit=2.0):
    def silent(line):
        pass

    return script.tune(table, [KEY], lambda key: limit, lambda key, row: times.get(row, default), silent)


def test_the_fastest_row_is_taken_where_it_wins(script):
    table = {KEY: ROW, OTHER: ROW}
    assert {ROW, FAST} <= set(script.candidates(2))
    assert tuned(script, table, {FAST: 1.0}, 1.5) == {KEY: FAST, OTHER: ROW}
    assert tuned(script, {}, {FAST: 1.0}, None) == {KEY: FAST}
    assert table == {KEY: ROW, OTHER: ROW}


def test_a_row_that_does_not_win_is_removed(script):
    assert tuned(script, {KEY: ROW, OTHER: ROW}, {FAST: 1.99}, 3.0) == {OTHER: ROW}
    assert tuned(script, {KEY: ROW}, {}, None) == {}


def test_the_written_table_is_the_table(script):
    for table in ({}, {KEY: ROW, OTHER: FAST}):
        namespace = {}
        exec(script.table_source(table, "Invented."), namespace)
        assert namespace["TABLE"] == table
        assert "Invented." in namespace["__doc__"]


def test_candidates_fit(script):
    found = list(script.candidates(2))
    assert 20 <= len(found) == len(set(found))
    assert all((m + n) * k * 2 * stages <= 227 * 1024 for m, n, k, _, stages in found)


def test_without_a_gpu_there_is_nothing_to_measure(script, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        script.main([])
