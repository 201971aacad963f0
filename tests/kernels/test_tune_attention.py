"""The logic of scripts/tune_attention.py, with invented times: nothing is measured here."""

import pytest
from script_loader import load_script

pytest.importorskip("triton", reason="Triton is not installed")
from fastattn.kernels.common import Launch, Variants

KEY, OTHER = (90, "fwd", 2, 64), (90, "dq", 2, 128)
ROWS = Variants(Launch(64, 64, 4, 2), Launch(64, 64, 4, 2), Launch(32, 32, 4, 1))


@pytest.fixture(scope="module")
def script():
    return load_script("tune_attention")


def timer(times, default):
    """Returns milliseconds by row; all other rows take `default`."""
    return lambda table, key, variant: times.get(getattr(table[key], variant), default)


def test_the_fastest_row_is_taken_for_the_measured_variant_only(script):
    fast = (128, 64, 8, 3)
    assert fast in list(script.candidates("fwd", 2, 64))
    table = {KEY: ROWS, OTHER: ROWS}
    tuned = script.tune(table, [KEY], ["causal"], timer({fast: 1.0}, 2.0), report=lambda line: None)
    assert tuned == {KEY: ROWS._replace(causal=fast), OTHER: ROWS}
    assert table == {KEY: ROWS, OTHER: ROWS}


def test_a_row_that_is_hardly_slower_stays(script):
    tuned = script.tune({KEY: ROWS}, [KEY], ["full"], timer({(128, 64, 8, 3): 1.99}, 2.0), report=lambda line: None)
    assert tuned == {KEY: ROWS}


def test_rows_that_cannot_run_are_passed_over(script):
    tuned = script.tune({KEY: ROWS}, [KEY], ["full"], timer({(128, 32, 8, 2): 5.0}, None), report=lambda line: None)
    assert tuned[KEY].full == (128, 32, 8, 2)
    tuned = script.tune({KEY: ROWS}, [KEY], ["full"], timer({}, None), report=lambda line: None)
    assert tuned == {KEY: ROWS}


def test_the_written_table_is_the_table(script):
    table = {KEY: ROWS, OTHER: ROWS}
    namespace = {}
    exec(script.table_source(table, "Invented."), namespace)
    assert namespace["TABLE"] == table
    assert "Invented." in namespace["__doc__"]


def test_candidates_are_tiles_that_can_work(script):
    from fastattn.kernels.attention_config import HEAD_DIMS, KERNELS

    for kernel in KERNELS:
        for head_dim in HEAD_DIMS:
            found = list(script.candidates(kernel, 2, head_dim))
            assert 4 <= len(found) == len(set(found))
