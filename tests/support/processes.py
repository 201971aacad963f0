"""What a test runs in a process of its own: in another environment, or in memory that nothing else has used."""

import glob
import os
import subprocess
import sys

TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ROOMS = glob.glob(os.path.join(TESTS, "*/"))


def _output_of(*arguments, **environment):
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def run_code(code, *arguments, **environment):
    """What this code prints; it finds the modules that are found here, and all test files."""
    path = os.pathsep.join([*sys.path, *ROOMS])
    return _output_of("-W", "ignore", "-c", code, *arguments, PYTHONPATH=path, **environment)


def run_tests(selected, *files, **environment):
    """pytest's last line about the selected tests of these files, named from tests/, of which none fails."""
    paths = [os.path.join(TESTS, file) for file in files]
    output = _output_of("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *paths, "-k", selected, **environment)
    return output.splitlines()[-1]
