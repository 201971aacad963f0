"""The compiled libraries of this package: which were built, and how to load one."""

import functools
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
