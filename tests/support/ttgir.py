"""Reads Triton's intermediate code for GPUs: in which order a loop with products loads, multiplies and waits."""

import math
import re
from typing import NamedTuple

_EVENTS = (
    ("L", re.compile(r"\basync_(tma_)?copy_global_to_local\b")),  # a load into shared memory is issued
    ("W", re.compile(r"\bwarp_group_dot_wait\b")),  # products are awaited
    ("P", re.compile(r"\b(warp_group_dot|tt\.dot|tc_gen5_mma)\b")),  # a product is issued
)


class Loop(NamedTuple):
    """The events between the last loop and this one, and those in it: one letter of _EVENTS each."""

    before: str
    body: str

    def blocks_ahead(self):
        """For how many blocks loads were issued before the loop; None if it loads nothing."""
        loads = self.body.count("L")
        return self.before.count("L") / loads if loads else None

    def loads_under_a_product(self):
        """Whether the loads of a step are issued right after a product, which nothing has awaited yet."""
        return re.search(r"PL+$", self.body) is not None


def _event(line):
    return next((letter for letter, pattern in _EVENTS if pattern.search(line)), "")


def _indent(line):
    return len(line) - len(line.lstrip())


def loops(text):
    """The innermost loops with products."""
    lines = text.splitlines()
    found, last = [], 0
    for begin, line in enumerate(lines):
        if "scf.for" not in line:
            continue
        end = next(i for i in range(begin + 1, len(lines)) if _indent(lines[i]) <= _indent(line) and "}" in lines[i])
        body = lines[begin + 1 : end]
        events = "".join(map(_event, body))
        if "P" in events and not any("scf.for" in line for line in body):
            found.append(Loop("".join(map(_event, lines[last:begin])), events))
            last = end
    return found


def elements_loaded(text, dtype):
    """The numbers of elements that its loads of a dtype have, ascending; 1 for a load of a single number."""
    pointers = re.compile(rf"(?:tensor<((?:\d+x)*))?!tt\.ptr<{dtype}>")
    found = set()
    for line in text.splitlines():
        if re.search(r"\b(tt\.load|async_copy_global_to_local)\b", line):
            found |= {math.prod(map(int, match[1].split("x")[:-1])) if match[1] else 1
                      for match in pointers.finditer(line)}  # fmt: skip
    return sorted(found)
