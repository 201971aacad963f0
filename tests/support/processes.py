"""Runs code in a separate process: in another environment, or with memory that nothing else has used."""

import glob
import os
import subprocess
import sys

import pytest

TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ROOMS = glob.glob(os.path.join(TESTS, "*/"))


def _output_of(*arguments, **environment):
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def run_code(code, *arguments, **environment):
    """Return what this code prints. It finds the modules that are found here, and all test files."""
    path = os.pathsep.join([*sys.path, *ROOMS])
    return _output_of("-W", "ignore", "-c", code, *arguments, PYTHONPATH=path, **environment)


def assert_fails(code, *arguments, message=""):
    """Check that this code ends with an error in a process of its own, and with this message on stderr."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode != 0
    assert message in done.stderr, done.stderr


LOWER_CAPABILITIES = ("default", "avx2", "avx512", "avx512bf16")  # that FASTATTN_CPU_CAPABILITY can ask for


def skip_unless_lower(capability):
    """Skip a test of an instruction set that is not below the one that all other tests of this processor use."""
    import fastattn
    from fastattn._native import CPU_CAPABILITIES

    used = fastattn.cpu_capability()
    if CPU_CAPABILITIES.index(capability) >= CPU_CAPABILITIES.index(used):
        pytest.skip(f"the kernels for {used} run in all other tests here")


def run_tests(selected, *files, **environment):
    """Run the selected tests of these files, named from tests/; return pytest's last line. No test may fail."""
    if "FASTATTN_CPU_CAPABILITY" in environment:
        skip_unless_lower(environment["FASTATTN_CPU_CAPABILITY"])
    paths = [os.path.join(TESTS, file) for file in files]
    output = _output_of("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *paths, "-k", selected, **environment)
    return output.splitlines()[-1]


def run_on_instruction_set(capability, code):
    """Run code with the CPU kernels of an instruction set; skip if all other tests already run it."""
    skip_unless_lower(capability)
    code += "\nimport fastattn; print(fastattn.cpu_capability())"
    assert run_code(code, FASTATTN_CPU_CAPABILITY=capability).splitlines()[-1] == capability
