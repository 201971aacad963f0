"""Makes Triton's interpreter leave out work that takes more than half of its time. Kernels compute the same.

- For a launch, the interpreter replaces the functions of triton.language by its own, and puts the old ones back at the
  end. At every call of one jitted function by another, it searches for them again, where all are replaced already.
- At every launch it searches all of triton.language for the functions to replace, and makes the same replacements.
- It builds a table of all dtypes whenever it looks one up.
- It computes in 64 bits whether a sum of integers overflows, for an assertion that it makes only in debug mode.
- For every intermediate result, it computes again what follows from the shape.
"""

import dataclasses
import functools
import inspect
import types


class _NothingToRestore:
    def restore(self):
        pass


def speed_up():
    """Change the interpreter of this process; do nothing for a release of Triton with another one."""
    from triton.runtime import interpreter

    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._patch_lang = _patch_once_per_launch(interpreter)
        interpreter._patch_builtin = _remember_replacements(interpreter._patch_builtin)
        interpreter._get_np_dtype = _remember_dtypes(interpreter._get_np_dtype)
        _remember_shapes(interpreter.tl.core)
        options = interpreter.interpreter_builder.options
        if not options.debug:
            interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


def _patch_once_per_launch(interpreter):
    patch, language = interpreter._patch_lang, interpreter.tl
    replaced = set()  # the modules whose functions are replaced now, as seen by the functions called so far

    @functools.cache
    def modules_of(fn):
        values = filter(inspect.ismodule, fn.__globals__.values())
        return frozenset(module.__name__ for module in values if module in (language, language.core))

    def patch_lang(fn):
        if modules_of(fn) in replaced:
            return _NothingToRestore()
        is_launch = not replaced
        scope = patch(fn)
        replaced.add(modules_of(fn))
        if is_launch:
            restore = scope.restore

            def end_launch():
                replaced.clear()
                restore()

            scope.restore = end_launch
        return scope

    return patch_lang


def _remember_replacements(patch_builtin):
    known = {}  # a module or class → what set_attr of a scope takes; nothing is replaced when it is seen first

    def patch(owner, builder, scope):
        if owner not in known:
            found = known[owner] = []
            patch_builtin(owner, builder, types.SimpleNamespace(set_attr=lambda *change: found.append(change)))
        for change in known[owner]:
            scope.set_attr(*change)

    return patch


def _remember_dtypes(get_np_dtype):
    known = {}

    def get(dtype):
        name = dtype.scalar.name
        if name not in known:
            known[name] = get_np_dtype(dtype)
        return known[name]

    return get


def _remember_shapes(core):
    """Copy the attributes that follow from the shape from an older object: of a block's type and of a tensor."""
    known_types, tensors = {}, {}
    make_type, make_tensor = core.block_type.__init__, core.tensor.__init__

    def block_type(self, element_ty, shape):
        key = element_ty.name, *(getattr(size, "value", size) for size in shape)
        if element_ty.is_ptr():  # there are kinds of pointers with the same name
            make_type(self, element_ty, shape)
        elif key in known_types:
            vars(self).update(known_types[key])
        else:
            make_type(self, element_ty, shape)
            known_types[key] = dict(vars(self))

    def tensor(self, handle, type):
        key = tuple(type.shape) if type.is_block() else ()
        if key in tensors:
            vars(self).update(tensors[key], handle=handle, type=type, dtype=type.scalar)
        else:
            make_tensor(self, handle, type)
            tensors[key] = dict(vars(self), handle=None)

    core.block_type.__init__, core.tensor.__init__ = block_type, tensor
