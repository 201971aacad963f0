"""Triton kernels. The folder stands at the top of the repository, its import name is fastattn.kernels."""

if __name__ != "fastattn.kernels":
    raise ImportError(f"import the Triton kernels as fastattn.kernels, not as {__name__}")
