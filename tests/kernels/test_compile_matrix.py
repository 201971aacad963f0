"""scripts/compile_matrix.py: its cases and its judgement for invented numbers, and a sample that is compiled."""

import json

import pytest
from script_loader import load_script

KERNEL = {"kernel": "attention_fwd_kernel", "registers": 200, "stack": 16, "shared": 60_000, "HMMA": 64}


@pytest.fixture(scope="module")
def script():
    return load_script("compile_matrix")


def test_every_gpu_has_every_call(script):
    cases = list(script.cases((), (), False))
    assert len({case["title"] for case in cases}) == len(cases) == 13 * len(script.CALLS)
    sample = list(script.cases(("sm_90", "gfx942"), (), True))
    assert {case["arch"] for case in sample} == {90, "gfx942"}
    assert len(sample) == 2 * len(script.SAMPLE)


@pytest.mark.parametrize(("arch", "change", "fault"), [
    (80, {}, "fits"), (80, {"stack": 72}, "stack"), (86, {"shared": 102_000}, "shared memory"),
    ("gfx942", {"shared": 65_537}, "shared memory"), (90, {"HMMA": 0}, "no matrix products"),
    (90, {"HMMA": 0, "kernel": "norm_fwd_kernel"}, "fits"), (90, {"HMMA": 0, "products": 8}, "fits"),
])  # fmt: skip
def test_what_does_not_fit(arch, change, fault, script):
    case = {"title": "t", "arch": arch, "arguments": {}, "compiled": [KERNEL | change]}
    ((cells, fits),) = script.judged(case)
    assert (cells[-1], fits) == (fault, fault == "fits")


def test_an_unknown_gpu_is_an_error(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--gpus", "sm_75"])
    assert "unknown: sm_75" in capsys.readouterr().err


def test_done_prints_what_the_file_has(script, tmp_path, capsys):
    first, *_, last = script.cases((), (), False)
    made = [{**case, "compiled": [KERNEL]} for case in (first, last)]
    (tmp_path / "done.json").write_text(json.dumps({case["title"]: case for case in made}))
    assert script.main(["--resume", str(tmp_path / "done.json"), "--done"]) == 0
    printed = capsys.readouterr().out
    assert "2 kernels of 2 calls; 0 do not fit." in printed
    assert f"{13 * len(script.CALLS) - 2} of {13 * len(script.CALLS)} calls were not compiled." in printed
    assert script.main(["--resume", str(tmp_path / "done.json"), "--done", "--gpus", first["title"].split()[0]]) == 0
    assert f"{len(script.CALLS) - 1} of {len(script.CALLS)} calls were not compiled." in capsys.readouterr().out
    with pytest.raises(SystemExit):
        script.main(["--done"])
    assert "--done needs --resume" in capsys.readouterr().err


def test_a_sample_compiles_for_a_newer_gpu_and_for_amd(script):
    pytest.importorskip("triton", reason="Triton is not installed")
    import compilations

    arguments = {"head_dim": 32, "right": 0, "backward": False}
    wanted = [{"title": str(arch), "arch": arch, "call": "attention", "arguments": arguments}
              for arch in (103, "gfx942")]  # fmt: skip
    for case in compilations.run(json.dumps(wanted), timeout=600):
        for cells, fits in script.judged(case):
            assert fits, cells


SPILLED = {  # calls whose backward once had more than STACK bytes of stack: the kernels
    "sm_90 d128 packed gqa": ["dkdv"],
    "sm_100 d128 packed gqa": ["dkdv"],
    "sm_120 d64 packed gqa": ["dkdv", "dq"],
    "sm_120 d64 key mask": ["dq"],
}


def test_kernels_that_had_spilled_fit(script):
    pytest.importorskip("triton", reason="Triton is not installed")
    import compilations

    wanted = [
        {**case, "only": [f"attention_{kernel}_kernel" for kernel in SPILLED[case["title"]]]}
        for case in script.cases((), (), False)
        if case["title"] in SPILLED
    ]
    judged = [row for case in compilations.run(json.dumps(wanted), timeout=600) for row in script.judged(case)]
    assert len(judged) == sum(map(len, SPILLED.values()))
    for cells, fits in judged:
        assert fits, cells
