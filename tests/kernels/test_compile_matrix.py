"""scripts/compile_matrix.py: its cases and its judgement for invented numbers, and a sample that is compiled."""

import json
import sys
import types

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


def test_the_first_calls_are_of_all_families_and_gpus(script):
    cases = list(script.cases((), (), False))[: 13 * 9]
    assert len({case["arch"] for case in cases}) == 13
    assert {case["call"] for case in cases} == {"norm", "passes", "attention"}


def test_every_row_of_attention_is_reached(script, monkeypatch):
    """Every kernel, size of elements, head dim and kind of call that the table of attention has a row for."""
    torch = pytest.importorskip("torch")
    config = pytest.importorskip("fastattn.kernels.attention_config", reason="Triton is not installed")
    from fastattn.kernels import attention_call

    monkeypatch.setattr(attention_call.attention_config, "architecture", lambda device: (90, 0))
    monkeypatch.setattr(attention_call, "splits", config.splits.__wrapped__)  # without what it remembers
    reached = set()
    for call, arguments in script.CALLS.values():
        if call == "attention":
            plan = plan_of(torch, attention_call, **arguments)
            _, dtype, head_dim, kind = plan.kind
            kernels = [
                "fwd",
                *plan.launches_of_keys(),
                "dq",
                *(["dbias"] if arguments.get("bias", [2])[0] == 1 else []),
            ]
            reached |= {(config.table_key(90, kernel, dtype.itemsize, head_dim), kind) for kernel in kernels}
    for key, row in config.TABLE.items():
        for kind in ("full", "causal", "extra", "alibi"):
            served = getattr(row, kind) if key[1] != "dbias" else kind == "extra"  # a bias is always "extra"
            if key[1] == "dkdv" and (90, "dk", *key[2:]) in config.TABLE:
                served = kind == "extra"  # the other kinds have a launch for each
            if key in {config.table_key(90, *key[1:])} and served:
                assert (key, kind) in reached, (key, kind)


def plan_of(torch, attention_call, head_dim, dtype="bfloat16", kv_heads=8, left=-1, right=-1, mask=False, packed=False,
            bias=None, alibi=False, softcap=0.0, dropout_p=0.0, sink=False):  # fmt: skip
    """The plan that the launchers make for the arguments of compilations.attention_call."""
    q, k = (attention_call.geometry(torch.empty(2, heads, 1024, head_dim, device="meta")) for heads in (8, kv_heads))
    shapes = {"bias": bias, "mask": [2, 1, 1, 1024] if mask is True else mask}
    extra = {name: shape and attention_call.geometry(torch.empty(shape, device="meta"))
             for name, shape in shapes.items()}  # fmt: skip
    return attention_call.Plan(
        q, k, k, extra["bias"], extra["mask"] or None, getattr(torch, dtype), torch.device("cuda"), "ieee", int(alibi),
        dropout_p > 0, 2 if packed else None, left, right, False, softcap, dropout_p, 0.125,
    )  # fmt: skip


def test_done_prints_what_the_file_has(script, tmp_path, capsys):
    first, *_, last = script.cases((), (), False)
    made = [{**case, "compiled": [KERNEL]} for case in (first, last)]
    kept = {"3.9.0": {case["title"]: case for case in made}, "3.6.0": {first["title"]: made[0]}}
    (tmp_path / "done.json").write_text(json.dumps(kept))
    assert script.main(["--resume", str(tmp_path / "done.json"), "--done"]) == 0
    printed = capsys.readouterr().out
    assert "2 kernels of 2 calls; 0 do not fit." in printed
    assert f"Triton 3.9.0: {13 * len(script.CALLS) - 2} of {13 * len(script.CALLS)} calls were not compiled." in printed
    assert f"Triton 3.6.0: {13 * len(script.CALLS) - 1} of" in printed
    assert script.main(["--resume", str(tmp_path / "done.json"), "--done", "--gpus", first["title"].split()[0]]) == 0
    assert f"{len(script.CALLS) - 1} of {len(script.CALLS)} calls were not compiled." in capsys.readouterr().out
    with pytest.raises(SystemExit):
        script.main(["--done"])
    assert "--done needs --resume" in capsys.readouterr().err


def test_a_run_continues_and_a_kernel_that_does_not_compile_is_a_line(script, tmp_path, monkeypatch, capsys):
    asked = []

    def run(text, jobs, timeout):
        cases = json.loads(text)
        asked.append([case["title"] for case in cases])
        if any(case["call"] == "norm" for case in cases):
            raise AssertionError("Traceback\nptxas: no")
        return [{**case, "compiled": [KERNEL]} for case in cases]

    monkeypatch.setitem(sys.modules, "compilations", types.SimpleNamespace(run=run))
    monkeypatch.setattr(script.importlib.metadata, "version", lambda name: "3.9.0")
    options = ["--resume", str(tmp_path / "out.json"), "--gpus", "sm_90", "--calls"]
    assert script.main([*options, "d64"]) == 0
    assert script.main([*options, "d64", "norm 1000"]) == 1
    assert "| sm_90 norm 1000 |  |  |  |  |  | does not compile: ptxas: no |" in capsys.readouterr().out
    assert asked == [["sm_90 d64"], ["sm_90 norm 1000"]]
    monkeypatch.setattr(script.importlib.metadata, "version", lambda name: "3.6.0")
    assert script.main([*options, "d64"]) == 0
    assert asked[2:] == [["sm_90 d64"]]  # the same call with another Triton


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
