"""Norm."""

import triton  # noqa: F401
