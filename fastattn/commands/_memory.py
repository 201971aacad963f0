"""Lets the process of a command keep the memory that it frees, instead of returning it to the kernel.

Otherwise, a tensor of several MiB that is freed and allocated again in every step is mapped again each time, and every
page of it faults at its first access. That can take longer than computing the tensor. The price is that freed memory
stays with the process until it ends. This is for our own processes only: `import fastattn` never does it.
"""

import ctypes
import os

VARIABLE = "FASTATTN_KEEP_MEMORY"
_OWN_CHOICE = "LD_PRELOAD GLIBC_TUNABLES MALLOC_MMAP_MAX_ MALLOC_MMAP_THRESHOLD_ MALLOC_TRIM_THRESHOLD_ MALLOC_TOP_PAD_"
_SETTINGS = (  # mallopt's parameter numbers in glibc's malloc.h, and our values
    (-4, 0),  # M_MMAP_MAX: take no block from mmap, which would be unmapped when it is freed
    (-1, 2**31 - 1),  # M_TRIM_THRESHOLD: never shrink the heap
    (-2, 2**26),  # M_TOP_PAD: grow it by at least 64 MiB
)


def why_not(environment):
    """Why freed memory is not kept, or None; environment: the variables of the process, as a mapping."""
    if environment.get(VARIABLE) == "0":
        return f"{VARIABLE}=0"
    for name in _OWN_CHOICE.split():
        if environment.get(name):
            return f"{name} is set"
    if not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        return "the C library is not glibc"
    return None


def keep_freed_memory():
    """Keep freed memory from now on, unless `why_not` has a reason; returns whether it is kept."""
    if os.name != "posix" or why_not(os.environ) is not None:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    results = [mallopt(number, value) for number, value in _SETTINGS]
    return all(results)
