"""One line for models that others wrote: `replace` puts our kernels under them, in place."""

from fastattn.drop_in.replacement import replace
from fastattn.drop_in.report import Report

__all__ = ["Report", "replace"]
