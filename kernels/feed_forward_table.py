"""Where the feed-forward block runs product and activation in one kernel, rewritten by scripts/tune_feed_forward.py.

Nothing was measured on hardware yet: the vendor's product and a pass of ours run everywhere.
"""

# (architecture, pass, d_model, d_ff, bytes of an element) -> (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages)
TABLE = {}
