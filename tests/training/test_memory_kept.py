"""The commands that run a model keep freed memory; `import fastattn` and a caller of main() do not."""

import os
import subprocess
import sys

import pytest

from fastattn.commands import _memory

FAULTS = """
import resource, sys
{before}
blocks = []
def faults():
    start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(48 * 2**20)
    block[:: 4096] = b"x" * len(block[:: 4096])
    del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - start
faults()
print(faults())
"""
COMMAND = """
import fastattn.cli
fastattn.cli.run_command = lambda argv: 0
{call}
"""
pytestmark = pytest.mark.skipif(_memory.why_not({}) is not None, reason="needs glibc")


def faults(before, **variables):
    """Page faults of a block of 48 MiB that the process has had before."""
    environment = {k: v for k, v in os.environ.items() if k not in _memory._OWN_CHOICE.split()}
    run = subprocess.run(
        [sys.executable, "-c", FAULTS.format(before=before)], env=environment | variables, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    return int(run.stdout)


OWN = COMMAND.format(call="sys.argv = ['fastattn', 'train']; fastattn.cli.main()")
OTHER = COMMAND.format(call="fastattn.cli.main(['train'])")


def test_a_command_keeps_memory():
    assert faults(OWN) < 600


def test_other_callers_do_not():
    assert faults(OTHER) > 6000
    assert faults(OWN, FASTATTN_KEEP_MEMORY="0") > 6000


@pytest.mark.parametrize("name", ["MALLOC_MMAP_MAX_", "GLIBC_TUNABLES", "LD_PRELOAD"])
def test_the_users_own_choice_wins(name):
    assert name in _memory.why_not({name: "x"})
    assert _memory.why_not({"FASTATTN_KEEP_MEMORY": "1"}) is None
