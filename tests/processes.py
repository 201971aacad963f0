"""What a test runs in a process of its own: in another environment, or in memory that nothing else has used."""

import os
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))


def _output_of(*arguments, **environment):
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def run_code(code, *arguments, **environment):
    """What this code prints; it finds the modules that are found here."""
    return _output_of("-W", "ignore", "-c", code, *arguments, PYTHONPATH=os.pathsep.join(sys.path), **environment)


def run_tests(selected, *files, **environment):
    """pytest's last line about the selected tests of these files, of which none fails."""
    paths = [os.path.join(HERE, file) for file in files]
    output = _output_of("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *paths, "-k", selected, **environment)
    return output.splitlines()[-1]
