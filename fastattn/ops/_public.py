"""The wrapper of every public function: it supports `__torch_function__` and explains wrong arguments.

A successful call pays only for one look at the types of its arguments. If a call fails, the arguments are checked
again: an unknown name or a wrong type is reported instead of the error that it caused. Flags and integers are checked
before the call, because a wrong one, such as the string "no", might not cause an error.
"""

import difflib
import functools
import inspect
import re
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch.overrides import handle_torch_function, has_torch_function

from fastattn.ops._advice import ADVICE
from fastattn.ops._backends import asked_for
from fastattn.ops._kinds import (
    describe,
    is_causal_bias,
    is_flag,
    is_integer,
    is_jagged,
    is_nested,
    is_number,
    nonplain_kind,
)

_Function = TypeVar("_Function", bound=Callable)
_is_mode_enabled = torch._C._is_torch_function_mode_enabled


class ArgumentValueError(ValueError, RuntimeError):
    """An argument has a wrong value. Also a RuntimeError, because PyTorch and flash-attn raise that."""


class ArgumentTypeError(TypeError, RuntimeError):
    """An argument has a wrong type or dtype. Also a RuntimeError, for the same reason."""


_KINDS = {ValueError: ArgumentValueError, TypeError: ArgumentTypeError}
_TEXTS = ("activation", "backend", "reduction")
_INNER = re.compile(r"^(attention|attention_decode|rotary_embedding|flash_attn_\w+): (\w+)")


def _by_position(parameters):
    return [name for name, p in parameters.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]


def _refuse_nested(name, function, given):
    label = next(label for label, t in given.items() if is_nested(t))
    raise ArgumentTypeError(f"{name}: {label} must not be a nested tensor")


class Public:
    """The wrapper of one public function.

    Args:
        name: its name in messages and its key in _advice.py.
        tensors, numbers, integers, flags: names of the parameters that take a tensor, a number, an integer, or True or
            False. A tensor parameter written NAME? may be None although that is not its default.
        weights: those of `tensors` whose `__torch_function__` does not override the function itself. Instead,
            torch.nn.functional.linear calls it inside; weight subclasses implement that function.
        takes_pair: whether the first parameter also takes a pair of tensors.
        nested: (name, function, arguments by name) -> result, for calls with nested tensors; None passes these to the
            function itself.
        on_reference: the function on the reference backend, if it has no parameter `backend`.
        inner: for a function that calls other public functions: {name of a parameter there: name here}. Messages of
            the inner function are translated to the names of this one.
    """

    def __init__(
        self,
        name,
        *,
        tensors="",
        numbers="",
        integers="",
        flags="",
        weights="",
        takes_pair=False,
        nested=_refuse_nested,
        on_reference=None,
        inner=None,
    ):
        self.name, self.advice = name, ADVICE.get(name, {})
        self.tensors = tensors.replace("?", "").split()
        self.optional = [name[:-1] for name in tensors.split() if name.endswith("?")]
        self.numbers, self.integers, self.flags = numbers.split(), integers.split(), flags.split()
        self.weights = weights.split()
        also_tensors = {label: (torch.Tensor,) if label in self.tensors else () for label in self.integers}
        # {flag or integer: the types that need no further check}
        self.exact = {label: (int, type(None), *more) for label, more in also_tensors.items()}
        self.exact |= dict.fromkeys(self.flags, (bool, type(None)))
        self.takes_pair = takes_pair
        self.nested = nested
        self.on_reference = on_reference
        self.inner = inner

    def overridable(self, function: _Function) -> _Function:
        """Let `__torch_function__` of its arguments, or of a mode, override a function; explain wrong arguments.

        The `__torch_function__` of CausalBias and of jagged nested tensors is skipped: they support only torch's own
        functions.
        """
        parameters, takes_pair = inspect.signature(function).parameters, self.takes_pair
        by_position = _by_position(parameters)
        exact, first = self.exact, self._first_exact(by_position)

        @functools.wraps(function)
        def call(*args, **kwargs):
            values = args
            if kwargs:
                values = (*args, *kwargs.values())
                for label in kwargs:
                    if label in exact and type(kwargs[label]) not in exact[label]:
                        self._check_kind(parameters, label, kwargs[label])
            if len(args) > first:
                self._check_exact(parameters, dict(zip(by_position, args, strict=False)))
            if takes_pair and values and isinstance(values[0], (tuple, list)):
                values = (*values[0], *values[1:])
            # torch.compile recognises modes only by the first condition
            if _is_mode_enabled() or has_torch_function(values):
                given = dict(zip(by_position, args, strict=False)) | kwargs
                self._refuse_causal_bias(given)
                relevant = self._relevant(given)
                # under torch.compile the last condition is True even if overriding is disabled
                if _is_mode_enabled() or (torch._C._is_torch_function_enabled() and has_torch_function(relevant)):
                    return handle_torch_function(call, relevant, *args, **kwargs)
            try:
                if values[0].is_nested and len(args) <= len(by_position):
                    return self.nested(self.name, function, dict(zip(by_position, args, strict=False)) | kwargs)
                return function(*args, **kwargs)
            except Exception as error:
                otherwise = self._otherwise_or_raise(function, args, kwargs, error)
            return self._instead(otherwise)

        setattr(call, "explained", self.answering(function))  # noqa: B010  type checkers reject attributes of functions
        return cast(_Function, call)

    def answering(self, function: _Function) -> _Function:
        """Explain wrong arguments of a function or method, without `__torch_function__`."""
        parameters = inspect.signature(function).parameters
        by_position = _by_position(parameters)
        exact, first = self.exact, self._first_exact(by_position)
        # the search for __torch_function__ on a module would fail in Module.__getattr__, which takes 2 us
        skipped = 1 if by_position[:1] == ["self"] else 0

        @functools.wraps(function)
        def call(*args, **kwargs):
            if kwargs:
                for label in kwargs:
                    if label in exact and type(kwargs[label]) not in exact[label]:
                        self._check_kind(parameters, label, kwargs[label])
            if len(args) > first:
                self._check_exact(parameters, dict(zip(by_position, args, strict=False)))
            values = args[skipped:]
            if has_torch_function((*values, *kwargs.values()) if kwargs else values):
                self._refuse_causal_bias(dict(zip(by_position, args, strict=False)) | kwargs)
            try:
                return function(*args, **kwargs)
            except Exception as error:
                otherwise = self._otherwise_or_raise(function, args, kwargs, error)
            return self._instead(otherwise)

        return cast(_Function, call)

    def _first_exact(self, by_position):
        """How many positional arguments come before the first flag or integer."""
        return min((i for i, label in enumerate(by_position) if label in self.exact), default=len(by_position))

    def _check_exact(self, parameters, given):
        """Raise TypeError unless the flags and integers among the arguments have the right type."""
        for label, value in given.items():
            if label in self.exact and type(value) not in self.exact[label]:
                self._check_kind(parameters, label, value)

    def _raise_as_ours(self, error):
        """Raise ValueError and TypeError as the classes above, with the parameter names of this function."""
        kind = _KINDS.get(type(error))
        if kind is None and self.inner is not None and type(error) in _KINDS.values():
            kind = type(error)
        if kind is not None and not torch.compiler.is_compiling():
            args = error.args if self.inner is None else (_INNER.sub(self._in_our_words, str(error)),)
            raise kind(*args).with_traceback(error.__traceback__) from error.__cause__

    def _in_our_words(self, match):
        return f"{self.name}: {self.inner.get(match[2], match[2])}"

    def _relevant(self, given):
        """The arguments whose `__torch_function__` may override the function."""
        relevant = [t for name, t in given.items() if name not in self.weights]
        if self.takes_pair:
            relevant += [t for pair in relevant if isinstance(pair, (tuple, list)) for t in pair]
        return tuple(t for t in relevant if not is_causal_bias(t) and not is_jagged(t))

    def _otherwise_or_raise(self, function, args, kwargs, error):
        """The call that replaces one that failed with `error`. Without one, the error in the words of this function."""
        otherwise = self._otherwise(function, args, kwargs, error)
        if otherwise is None:
            self._raise_as_ours(error)
            raise error
        return otherwise

    def _refuse_causal_bias(self, given):
        """Raise TypeError where a CausalBias is given as an operand: it has a shape, but its memory holds nothing.

        Masks are checked where they are read.
        """
        for label, value in given.items():
            if label.endswith("mask") or (label == "bias" and self.name == "attention"):
                continue
            if any(is_causal_bias(t) for t in self._one_by_one(label, value)):
                raise ArgumentTypeError(
                    f"{self.name}: {label} must be a tensor that holds values, got a CausalBias, which holds none"
                )

    def _instead(self, call):
        try:
            return call()
        except Exception as error:
            self._raise_as_ours(error)
            raise

    def _otherwise(self, function, args, kwargs, error):
        """What to call instead of a failed call, or None. Raise TypeError if arguments have wrong names or types."""
        if torch.compiler.is_compiling() or (isinstance(error, TypeError) and str(error).startswith(f"{self.name}:")):
            return None
        parameters = inspect.signature(function).parameters
        try:
            given = inspect.signature(function).bind(*args, **kwargs).arguments
        except TypeError as mismatch:
            raise ArgumentTypeError(f"{self.name}: {self._about_names(parameters, args, kwargs) or mismatch}") from None
        for label, value in given.items():
            for one in self._one_by_one(label, value):
                self._check_kind(parameters, label, one)
        if isinstance(error, (AttributeError, TypeError)) and "_modules" in vars(given.get("self", object)):
            self._check_weights(given["self"])
        for label in _TEXTS:  # arrays cannot be compared with a string
            if hasattr(given.get(label), "shape"):
                raise ArgumentTypeError(f"{self.name}: {label} must be a string, got {describe(given[label])}")
        if given.get("backend") is not None:
            try:
                asked_for(given["backend"], f"{self.name}: backend")
            except ValueError as unknown:
                raise ArgumentValueError(*unknown.args) from None
        tensors = [
            (label, t)
            for label, value in given.items()
            for t in self._one_by_one(label, value)
            if isinstance(t, torch.Tensor)
        ]
        if any(t.is_nested for _, t in tensors):
            if self.nested is None and isinstance(error, RuntimeError):  # PyTorch's is about its own internals
                self._refuse_nested_mask(tensors)
            # a ValueError with our name comes from the checks of `nested` itself
            is_ours = isinstance(error, ValueError) and str(error).startswith(f"{self.name}:")
            serves = self.nested is not None and not is_ours
            return functools.partial(self.nested, self.name, function, given) if serves else None
        for label, t in tensors:
            if t.layout is not torch.strided and label not in self.weights:
                raise ArgumentTypeError(
                    f"{self.name}: {label} must be a dense tensor, got one of layout {t.layout}"
                ) from None
        nonplain = {label: nonplain_kind(t) for label, t in tensors if nonplain_kind(t)}
        for label, kind in nonplain.items():
            if label in self.weights and isinstance(error, (RuntimeError, TypeError)):
                raise ArgumentTypeError(
                    f"{self.name}: {label} must be a weight that torch.nn.functional.linear takes, got {kind}"
                ) from error
        if not nonplain or not isinstance(error, (NotImplementedError, TypeError)):
            return None
        return self._try_reference(function, given, "backend" in parameters, *next(iter(nonplain.items())))

    def _refuse_nested_mask(self, tensors):
        for label, t in tensors:
            if t.is_nested and label.endswith("mask"):
                raise ArgumentTypeError(f"{self.name}: {label} must not be a nested tensor") from None

    def _one_by_one(self, label, value):
        """The tensors of a pair, or the value itself."""
        return value if self.takes_pair and label == "x" and isinstance(value, (tuple, list)) else (value,)

    def _try_reference(self, function, given, has_backend, label, kind):
        """The call on the reference: Tensor subclasses without our operators may support those of PyTorch."""
        if asked_for(given.get("backend")) is not None or not (has_backend or self.on_reference):
            raise ArgumentTypeError(f"{self.name}: {label} must be a plain tensor here, got {kind}") from None

        def run():
            try:
                return function(**given | {"backend": "reference"}) if has_backend else self.on_reference(**given)
            except Exception as error:
                raise ArgumentTypeError(
                    f"{self.name}: {label} must be a tensor that the kernels or PyTorch's operators support, got {kind}"
                ) from error

        return run

    def _check_kind(self, parameters, label, value):
        """Raise TypeError unless a value has a type that the parameter takes."""
        if torch.compiler.is_compiling():
            return
        allowed = []
        if label in self.tensors:
            allowed.append(("a tensor", isinstance(value, torch.Tensor)))
        if label in self.numbers:
            allowed.append(("a number", is_number(value)))
        if label in self.integers:
            allowed.append(("an integer", is_integer(value)))
        if label in self.flags:
            allowed.append(("True or False", is_flag(value)))
        if allowed and (parameters[label].default is None or label in self.optional):
            allowed.append(("None", value is None))
        if allowed and not any(fits for _, fits in allowed):
            text = f"{self.name}: {label} must be {' or '.join(kind for kind, _ in allowed)}, got {describe(value)}"
            advice = self.advice.get(label)
            raise ArgumentTypeError(f"{text}: {advice}" if advice else text) from None

    def _check_weights(self, module):
        """Raise TypeError if a weight of a module or of its children is not a tensor.

        A missing in_proj_weight is an AssertionError, as in torch.
        """
        for path, child in module.named_modules():
            held = {**child.__dict__, **dict(child._parameters.items())}
            for label in ("weight", "bias", "in_proj_weight", "in_proj_bias"):
                value = held.get(label)
                needed = label in held and (
                    (label == "weight" and isinstance(child, torch.nn.Linear))
                    or (label == "in_proj_weight" and getattr(child, "_qkv_same_embed_dim", False))
                )
                if not isinstance(value, torch.Tensor) and (value is not None or needed):
                    where = f"{path}.{label}" if path else label
                    kind = AssertionError if value is None and label == "in_proj_weight" else ArgumentTypeError
                    raise kind(f"{self.name}: {where} must be a tensor, got {describe(value)}") from None

    def _about_names(self, parameters, args, kwargs):
        """What is wrong with the names or the number of arguments; None leaves it to Python's message."""
        known, by_position = [name for name in parameters if name != "self"], _by_position(parameters)
        unknown = next((name for name in kwargs if name not in known), None)
        if unknown is not None:
            advice = self.advice.get(unknown)
            if advice is None:
                close = difflib.get_close_matches(unknown, known, 1)
                advice = f"did you mean {close[0]}=" if close else f"it takes {', '.join(known)}"
            return f"there is no argument {unknown}: {advice}"
        if len(args) > len(by_position):
            others = ", ".join(f"{name}=" for name in known if name not in by_position)
            advice = self.advice.get("*", f"pass the others by name: {others}" if others else "there are no others")
            return f"takes {', '.join(by_position)} by position, got {len(args)} arguments: {advice}"
        return None
