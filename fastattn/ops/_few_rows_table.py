"""Up to how many rows of x the kernel for few rows computes x · weightᵀ in fp32. Made by scripts/tune_few_rows.py.

An instruction set that is not in the table gets the other products.
avx512: not measured; one row, which the other kernel would have to pack.
avx512bf16: as avx512.
avx2: measured on an AMD EPYC (Zen 3).
"""

MOST_ROWS = {"avx2": 24, "avx512": 1, "avx512bf16": 1}
