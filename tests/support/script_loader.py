"""Imports a script of scripts/, or of another folder that is not on sys.path."""

import importlib.util
import pathlib

ROOT = pathlib.Path(__file__).parents[2]


def load_script(name, folder="scripts"):
    """Return a new module of FOLDER/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
