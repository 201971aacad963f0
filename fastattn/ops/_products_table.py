"""The largest numbers of rows of x for which our fp32 products are used if torch's library has fast ones. Made by
scripts/tune_products.py.

Keys: the instruction set of our kernels, and the one that MKL uses if it is AVX-512 too. Products: y = x · weightᵀ,
dx = dy · weight, dw = dyᵀ · x. Where a key is missing, our products are used for any number of rows on AVX-512, and for
none on another instruction set.
avx512bf16, MKL avx512: measured on an Intel Xeon (Sapphire Rapids class), one thread.
"""

OURS_UP_TO: dict[str, dict[str, int]] = {"avx512bf16, MKL avx512": {"dw": 0, "dx": 0, "y": 128}}
