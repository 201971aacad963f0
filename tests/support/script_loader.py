"""Imports a script of scripts/, which is not on sys.path."""

import importlib.util
import pathlib

SCRIPTS = pathlib.Path(__file__).parents[2] / "scripts"


def load_script(name):
    """Return a new module of scripts/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
