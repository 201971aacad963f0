"""Up to how many rows of x the kernel for few rows computes x · weightᵀ in fp32. Made by scripts/tune_few_rows.py.

An instruction set that is not in the table gets the other products. avx512: not measured beyond one row.
"""

MOST_ROWS = {"avx2": 16, "avx512": 1, "avx512bf16": 1}
