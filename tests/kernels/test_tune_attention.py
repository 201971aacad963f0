"""The logic of scripts/tune_attention.py, with invented times: nothing is measured here."""

import types

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
    fast = Launch(128, 64, 8, 3)
    assert fast in list(script.candidates("fwd", 2, 64))
    table = {KEY: ROWS, OTHER: ROWS}
    tuned = script.tune(table, [KEY], ["causal"], timer({fast: 1.0}, 2.0), report=lambda line: None)
    assert tuned == {KEY: ROWS._replace(causal=fast), OTHER: ROWS}
    assert table == {KEY: ROWS, OTHER: ROWS}


def test_a_row_that_is_hardly_slower_stays(script):
    times = timer({Launch(128, 64, 8, 3): 1.99}, 2.0)
    tuned = script.tune({KEY: ROWS}, [KEY], ["full"], times, report=lambda line: None)
    assert tuned == {KEY: ROWS}


def test_rows_that_cannot_run_are_passed_over(script):
    times = timer({Launch(128, 32, 8, 2): 5.0}, None)
    tuned = script.tune({KEY: ROWS}, [KEY], ["full"], times, report=lambda line: None)
    assert tuned[KEY].full == Launch(128, 32, 8, 2)
    tuned = script.tune({KEY: ROWS}, [KEY], ["full"], timer({}, None), report=lambda line: None)
    assert tuned == {KEY: ROWS}


def test_a_kind_without_a_row_of_its_own_begins_with_the_row_of_extra(script):
    tuned = script.tune({KEY: ROWS}, [KEY], ["alibi"], timer({ROWS.extra: 2.0}, 3.0), report=lambda line: None)
    assert tuned == {KEY: ROWS}
    fast = Launch(128, 64, 8, 3)
    times = timer({ROWS.extra: 2.0, fast: 1.0}, 3.0)
    tuned = script.tune({KEY: ROWS}, [KEY], ["alibi"], times, report=lambda line: None)
    assert tuned == {KEY: ROWS._replace(alibi=fast)}


def test_launches_of_dk_and_dv_alone_are_tuned_where_calls_use_them(script):
    both, alone = (90, "dkdv", 2, 256), (90, "dk", 2, 256)
    table, asked = {both: ROWS, alone: Variants(ROWS.full, None)}, []

    def measure(table, key, variant):
        asked.append((key, variant))
        return 2.0

    tuned = script.tune(table, [both, alone], ["full", "causal", "extra"], measure, report=lambda line: None)
    assert tuned == table
    assert set(asked) == {(alone, "full"), (both, "causal"), (both, "extra")}


def test_the_written_table_is_the_table(script):
    table = {KEY: ROWS._replace(alibi=Launch(64, 64, 4, 2, 128)), OTHER: ROWS}
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


def test_an_interrupted_run_continues_from_the_file(script, tmp_path):
    """A candidate that ended a run is measured once more, unless the GPU was lost, and left out after a second end."""
    path, asked = tmp_path / "times.json", []

    def run(measure, row=None):
        table = {KEY: ROWS if row is None else ROWS._replace(full=row)}
        return script.Kept(measure, path, "GPU")(table, KEY, "full")

    def timed(*_):
        asked.append(1)
        return 2.0

    def ends(error):
        def measure(*_):
            asked.append(1)
            raise error

        with pytest.raises(type(error)):
            run(measure, Launch(128, 64, 8, 3))

    assert [run(timed), run(timed), len(asked)] == [2.0, 2.0, 1]
    ends(KeyboardInterrupt())
    ends(MemoryError())  # as if the process ended: nothing is noted
    ends(MemoryError())
    assert run(timed, Launch(128, 64, 8, 3)) is None
    assert len(asked) == 4
    path.unlink()
    ends(SystemExit("the GPU is lost"))
    assert run(timed, Launch(128, 64, 8, 3)) is None
    assert len(asked) == 5


def test_the_time_of_a_backward_kernel_depends_on_its_companions(script, tmp_path):
    table = {OTHER: ROWS, (90, "dkdv", 2, 128): ROWS}
    kept = script.Kept(lambda table, key, variant: len(kept.times), tmp_path / "times.json", "GPU")
    first = kept(table, OTHER, "causal")
    assert kept(table | {(90, "dkdv", 2, 128): ROWS._replace(causal=ROWS.extra)}, OTHER, "causal") != first
    assert kept(table | {KEY: ROWS}, OTHER, "causal") == first


def test_a_lost_gpu_ends_the_run(script):
    def ones(*_, **__):
        raise RuntimeError("an illegal memory access was encountered")

    workload = types.SimpleNamespace(torch=types.SimpleNamespace(ones=ones), device="cuda")
    with pytest.raises(SystemExit, match="the GPU is lost after an error: out of bounds; run this again"):
        script.Workload.refuse_if_lost(workload, RuntimeError("out of bounds"))
