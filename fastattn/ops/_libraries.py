"""The compiled libraries of this package: which were built, and how to load one."""

import functools
import importlib
import json
import os

import torch

from fastattn.ops._schemas import DEFINITIONS

PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@functools.lru_cache
def build_info():
    """What setup.py built, and why it left out the rest. Empty in a checkout that was never built."""
    try:
        with open(os.path.join(PACKAGE, "_build_info.json"), encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        return {}


@functools.cache
def introspection():
    """The module fastattn._C, which answers questions about the compiled part, or None.

    It is None if there is no such module for this Python, or if it is of an older source.
    """
    try:
        module = importlib.import_module("fastattn._C")
    except ImportError:
        return None
    return module if hasattr(module, "best_cpu_capability") else None


def built_for():
    """What the libraries were built with and for: the dict with cxx, torch, nvcc, cuda_archs and cpu_variants.

    fastattn._C knows it. Without that module, the record of the build does. Empty in a checkout that was never built.
    """
    module = introspection()
    return module.build_info() if module else build_info()


def native_note(device_type):
    """A line about the native kernels for a device type, "cpu" or "cuda", or None without fastattn._C."""
    module = introspection()
    if module is None:
        return None
    info = module.build_info()
    if device_type == "cpu":
        return f"native kernels: built for {', '.join(info['cpu_variants'])}; {module.cpu_capability()} is in use"
    if not info["nvcc"]:
        return None
    return f"native kernels: built with CUDA {info['nvcc']} for {', '.join(info['cuda_archs'])}"


def load_library(name):
    """Load a library of ops or schemas. Returns None, or the reason why it is not available."""
    path = os.path.join(PACKAGE, name)
    if not os.path.exists(path):
        reason = build_info().get("not_built", {}).get(name, "not built in this checkout")
        return reason if "\n" not in reason else "it failed to compile; the log is in fastattn/_build_info.json"
    if build_info().get("schemas") != DEFINITIONS:
        return "built from another version of the source, whose ops have other arguments: build it again"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"built, but it does not load: {error}"
    return None
