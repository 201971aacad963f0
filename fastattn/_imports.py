"""Imports that wait until the program imports another module, which is too slow to import here."""

import importlib
import importlib.machinery
import sys

_waiting = {}  # module -> our module to import after it


class _Finder:
    """Finds the modules in `_waiting` as Python does, and imports ours after them."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        follower = _waiting.pop(name, None)
        spec = None if follower is None else importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            importlib.import_module(follower)

        spec.loader.exec_module = exec_module
        return spec


def import_after(module, follower):
    """Import `follower` now if `module` is loaded, else right after `module` is imported."""
    if module in sys.modules:
        importlib.import_module(follower)
        return
    if not any(finder is _Finder for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder)
    _waiting[module] = follower
