"""The most rows of x for which the kernel for few rows computes x · weightᵀ. Made by scripts/tune_few_rows.py.

An instruction set that is not in the table gets the other products.
avx512: as avx512bf16, whose kernel is the same.
avx512bf16: measured on an Intel Xeon (Sapphire Rapids class).
avx2: measured on an AMD EPYC (Zen 3).
"""

MOST_ROWS = {"avx2": 24, "avx512": 8, "avx512bf16": 8}
# In bf16 on AVX512-BF16 without AMX, for weights of at least this many elements; set by hand (docs/lab/products.md).
MOST_ROWS_BF16, LEAST_WEIGHT_BF16 = 128, 2**18
