"""The table of products of few rows and the script that rewrites it, without measuring."""

from script_loader import load_script

from fastattn.ops import _few_rows_table


def test_the_entry_ends_at_the_first_loss():
    script = load_script("tune_few_rows")
    assert script.most_rows({1: 2.0, 2: 1.0, 4: 0.9, 8: 1.5}) == 2
    assert script.most_rows({1: 0.9, 2: 3.0}) == 0


def test_one_entry_and_its_origin_are_rewritten():
    script = load_script("tune_few_rows")
    old = script.TABLE_FILE.read_text(encoding="utf-8")
    new = script.text(old, _few_rows_table.MOST_ROWS | {"avx512": 64}, "avx512", "a machine")
    found = {}
    exec(compile(new, "table", "exec"), found)
    assert found["MOST_ROWS"] == _few_rows_table.MOST_ROWS | {"avx512": 64}
    assert "avx512: measured on a machine." in found["__doc__"]
    assert "avx512: not measured" not in new
    assert "avx2: measured on" in new
