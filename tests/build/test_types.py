"""The public surface is annotated. typed_program.py has what a type checker must report; .ci/run runs one."""

import inspect
import types
from pathlib import Path

import pytest

import fastattn
import fastattn.models
from fastattn.integrations import flash_attn, hugging_face

MODULES = (fastattn, fastattn.nn, fastattn.models, flash_attn, hugging_face)


def public_functions():
    """(name, function) for everything a user calls: functions, and the methods that our classes define."""
    found = {}
    for module in MODULES:
        names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
        for name in names:
            value = getattr(module, name)
            if not getattr(value, "__module__", "").startswith("fastattn"):
                continue
            if not hasattr(module, "__all__") and value.__module__ != module.__name__:
                continue  # imported for internal use
            if isinstance(value, types.FunctionType):
                found[f"{value.__module__}.{name}"] = value
            elif inspect.isclass(value):
                for label, method in vars(value).items():
                    method = getattr(method, "__func__", method)
                    method = method.fget if isinstance(method, property) else method
                    if isinstance(method, types.FunctionType) and (label == "__init__" or not label.startswith("_")):
                        found[f"{value.__module__}.{name}.{label}"] = method
    return found


PUBLIC = public_functions()


@pytest.mark.parametrize("name", PUBLIC)
def test_every_parameter_and_result_has_a_type(name):
    function = inspect.unwrap(PUBLIC[name])
    signature = inspect.signature(function)
    bare = [label for label, p in signature.parameters.items() if label != "self" and p.annotation is p.empty]
    if signature.return_annotation is signature.empty and not name.endswith("__init__"):
        bare.append("return")
    assert not bare


def test_the_package_says_that_it_is_typed():
    assert (Path(fastattn.__file__).parent / "py.typed").is_file()
