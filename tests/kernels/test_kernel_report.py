"""The output of scripts/kernel_report.py for invented numbers: nothing is compiled here."""

import pytest
from script_loader import load_script

NUMBERS = {"registers": 100, "stack": 0, "spills": 0, "shared": 1024, "instructions": 2000, "products": 32}


@pytest.fixture(scope="module")
def script():
    return load_script("kernel_report")


def test_titles_tell_cases_and_their_kernels_apart(script):
    titles = [case["title"] for case in script.cases(())]
    assert len(titles) == len(set(titles)) > 50
    assert all("sm_90" in case["title"] for case in script.cases(["sm_90"]))
    kernel = {"kernel": "add_up_kernel", "LDL": 2, "STL.64": 3, "HMMA": 32, **NUMBERS}
    found = dict(script.measured({"title": "norm sm_80 512", "compiled": [dict(kernel), dict(kernel)]}))
    assert found == dict.fromkeys(["norm sm_80 512: add_up", "norm sm_80 512: add_up 2"], NUMBERS | {"spills": 5})


def test_changes_are_shown_for_what_both_reports_have(script):
    before = {"a": NUMBERS, "b": NUMBERS, "gone": NUMBERS}
    after = {"a": NUMBERS | {"registers": 90}, "b": NUMBERS | {"stack": 8}, "new": NUMBERS}
    lines = script.table(script.changes(before, after)).splitlines()
    assert lines[2:] == ["| a | 100 → 90 | 0 | 0 | 1024 | 2000 | 32 |", "| b | 100 | 0 → 8 | 0 | 1024 | 2000 | 32 |"]
    registers, stack, *_ = script.summary(before, after)
    assert registers == "registers: 200 → 190, more in 0, less in 1 of 2 kernels"
    assert stack == "stack: 0 → 8, more in 1, less in 0 of 2 kernels"
