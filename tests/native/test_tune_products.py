"""scripts/tune_products.py: from measurements to the table, and how the table decides which product runs."""

import pytest
import torch
from script_loader import load_script

from fastattn._native import cpu_capability
from fastattn.ops import _gemm, _products_table


@pytest.fixture(scope="module")
def script():
    return load_script("tune_products")


def test_the_entry_ends_at_the_first_loss(script):
    assert script.most_rows({1: 1.2, 16: 1.0, 64: 0.9, 128: 1.5}) == 16
    assert script.most_rows({1: 0.9, 16: 2.0}) == 0
    assert script.most_rows({1: 1.5, 16: 2.0}) == script.ANY == _gemm._ANY


def test_one_entry_and_its_origin_are_rewritten(script):
    old = script.TABLE_FILE.read_text(encoding="utf-8")
    entry = {"y": 7, "dx": 0, "dw": script.ANY}
    new = script.text(old, _products_table.OURS_UP_TO | {"avx512, a library": entry}, "avx512, a library", "a machine")
    found = {}
    exec(new, found)
    assert found["OURS_UP_TO"] == _products_table.OURS_UP_TO | {"avx512, a library": entry}
    assert "avx512, a library: measured on a machine." in found["__doc__"]
    again = script.text(new, found["OURS_UP_TO"], "avx512, a library", "another machine")
    assert again.count("avx512, a library: measured") == 1
    exec(again, found)


def test_every_entry_has_its_machine():
    for key, entry in _products_table.OURS_UP_TO.items():
        assert f"{key}: measured on" in _products_table.__doc__
        assert set(entry) == {"y", "dx", "dw"}


def test_the_table_chooses_by_rows(monkeypatch):
    if not _gemm._has_kernel:
        pytest.skip("our products are for AVX-512")
    monkeypatch.setattr(_gemm, "_most_rows", 0)
    monkeypatch.setattr(_gemm, "_up_to", {"y": 4, "dx": 5, "dw": 0, "any": 5})
    calls, product = [], _gemm._product
    monkeypatch.setattr(_gemm, "_product", lambda *args: calls.append(args[3:]) or product(*args))
    w = torch.randn(7, 9)
    for rows, expected in ((4, 2), (5, 1), (6, 0)):
        x, dy = torch.randn(rows, 9), torch.randn(rows, 7)
        calls.clear()
        pairs = (
            (_gemm.linear(x, w), x @ w.t()),
            (_gemm.input_grad(dy, w), dy @ w),
            (_gemm.weight_grad(dy, x), dy.t() @ x),
        )
        for found, exact in pairs:
            torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
        assert len(calls) == expected


def test_amx_has_the_fp32_products_of_avx512bf16_and_its_own_in_bf16():
    """This holds even if this processor has neither."""
    here = cpu_capability()
    try:
        _gemm.use_kernel("avx512bf16")
        fp32, few_in_bf16 = (_gemm.most_rows(), _gemm.most_rows_of_gradients()), _gemm.most_rows(torch.bfloat16, 1000)
        _gemm.use_kernel("amx")
        assert (_gemm.most_rows(), _gemm.most_rows_of_gradients()) == fp32
        assert few_in_bf16 == (128, 0)
        assert _gemm.most_rows(torch.bfloat16, 1000) == (0, 2**40)
        assert _gemm.most_rows(torch.bfloat16, 100) == (0, 0)
        assert _gemm.products_key("amx") == _gemm.products_key("avx512bf16")
    finally:
        _gemm.use_kernel(here)


def test_the_key_names_the_library_only_where_it_can_tell(monkeypatch):
    assert _gemm.products_key("avx512").startswith("avx512")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    _gemm._mkl_uses_avx512.cache_clear()
    try:
        assert _gemm.products_key("avx512") == "avx512"
    finally:
        monkeypatch.undo()
        _gemm._mkl_uses_avx512.cache_clear()
