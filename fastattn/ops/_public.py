"""What stands around every public function: it can be overridden, as those of torch can, and it answers to mistakes.

A call pays for one look at the types of its arguments, and for no more unless it fails. Then the arguments are looked
at again: an argument of an unknown name, or of a kind that the function does not take, is named instead of the error
that it led to.
"""

import difflib
import functools
import inspect
import numbers
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.overrides import handle_torch_function, has_torch_function

from fastattn.ops._advice import ADVICE
from fastattn.ops._backends import asked_for
from fastattn.ops._kinds import is_causal_bias, is_jagged, is_nested, odd_kind

_Function = TypeVar("_Function", bound=Callable)
_is_mode_enabled = torch._C._is_torch_function_mode_enabled


class ArgumentValueError(ValueError, RuntimeError):
    """An argument has a wrong value. It is a RuntimeError too, which is what PyTorch and flash-attn raise."""


class ArgumentTypeError(TypeError, RuntimeError):
    """An argument has a wrong type or dtype; a RuntimeError for the same reason."""


_KINDS = {ValueError: ArgumentValueError, TypeError: ArgumentTypeError}


def _raise_as_ours(error):
    """Raise ValueError and TypeError as the classes above."""
    kind = _KINDS.get(type(error))
    if kind is not None and not torch.compiler.is_compiling():
        raise kind(*error.args).with_traceback(error.__traceback__) from error.__cause__


def _by_position(parameters):
    return [name for name, p in parameters.items() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]


def _refuse_nested(name, function, given):
    label = next(label for label, t in given.items() if is_nested(t))
    raise ArgumentTypeError(f"{name}: {label} must not be a nested tensor")


class Public:
    """The public side of one function.

    Args:
        name: what messages call it, and the key of what _advice.py has for it.
        tensors, numbers, integers: names of the parameters that take a tensor, a number or an integer; a tensor NAME?
            may be None without being so by default.
        weights: those of `tensors` that are not asked to take the place of the function: they are asked in it, by
            torch.nn.functional.linear, which their own kinds know.
        takes_pair: whether the first parameter takes a pair of tensors too.
        nested: (name, function, arguments by name) -> result, for calls with nested tensors; None leaves these to the
            function itself.
        on_reference: the function on the reference, where it has no parameter `backend`.
    """

    def __init__(
        self,
        name,
        *,
        tensors="",
        numbers="",
        integers="",
        weights="",
        takes_pair=False,
        nested=_refuse_nested,
        on_reference=None,
    ):
        self.name, self.advice = name, ADVICE.get(name, {})
        self.tensors = tensors.replace("?", "").split()
        self.optional = [name[:-1] for name in tensors.split() if name.endswith("?")]
        self.numbers, self.integers = numbers.split(), integers.split()
        self.weights = weights.split()
        self.takes_pair = takes_pair
        self.nested = nested
        self.on_reference = on_reference

    def overridable(self, function: _Function) -> _Function:
        """Let `__torch_function__` of its arguments, or of a mode, take the place of a function; answer to mistakes.

        A CausalBias and a jagged nested tensor have such a method too, but these know torch's own functions only.
        """
        by_position, takes_pair = _by_position(inspect.signature(function).parameters), self.takes_pair

        @functools.wraps(function)
        def call(*args, **kwargs):
            values = (*args, *kwargs.values()) if kwargs else args
            if takes_pair and values and isinstance(values[0], (tuple, list)):
                values = (*values[0], *values[1:])
            # torch.compile sees modes by the first question only
            if _is_mode_enabled() or has_torch_function(values):
                relevant = self._relevant(dict(zip(by_position, args, strict=False)) | kwargs)
                # torch.compile answers the last question with True even where overriding is turned off
                if _is_mode_enabled() or (torch._C._is_torch_function_enabled() and has_torch_function(relevant)):
                    return handle_torch_function(call, relevant, *args, **kwargs)
            try:
                if values[0].is_nested and len(args) <= len(by_position):
                    return self.nested(self.name, function, dict(zip(by_position, args, strict=False)) | kwargs)
                return function(*args, **kwargs)
            except Exception as error:
                otherwise = self._otherwise(function, args, kwargs, error)
                if otherwise is None:
                    _raise_as_ours(error)
                    raise
            return self._instead(otherwise)

        return call

    def answering(self, function: _Function) -> _Function:
        """Answer to mistakes only."""

        @functools.wraps(function)
        def call(*args, **kwargs):
            try:
                return function(*args, **kwargs)
            except Exception as error:
                otherwise = self._otherwise(function, args, kwargs, error)
                if otherwise is None:
                    _raise_as_ours(error)
                    raise
            return self._instead(otherwise)

        return call

    def _relevant(self, given):
        """The arguments whose `__torch_function__` may take the place of the function."""
        relevant = [t for name, t in given.items() if name not in self.weights]
        if self.takes_pair:
            relevant += [t for pair in relevant if isinstance(pair, (tuple, list)) for t in pair]
        return tuple(t for t in relevant if not is_causal_bias(t) and not is_jagged(t))

    @staticmethod
    def _instead(call):
        try:
            return call()
        except Exception as error:
            _raise_as_ours(error)
            raise

    def _otherwise(self, function, args, kwargs, error):
        """What to call instead of a call that failed, or None. TypeError if its arguments have wrong names or kinds."""
        if torch.compiler.is_compiling() or (isinstance(error, TypeError) and str(error).startswith(f"{self.name}:")):
            return None
        parameters = inspect.signature(function).parameters
        try:
            given = inspect.signature(function).bind(*args, **kwargs).arguments
        except TypeError as mismatch:
            raise ArgumentTypeError(f"{self.name}: {self._about_names(parameters, args, kwargs) or mismatch}") from None
        for label, value in given.items():
            for one in self._one_by_one(label, value):
                self._check_kind(label, one, parameters[label].default is None or label in self.optional)
        tensors = [
            (label, t)
            for label, value in given.items()
            for t in self._one_by_one(label, value)
            if isinstance(t, torch.Tensor)
        ]
        if any(t.is_nested for _, t in tensors):
            serves = self.nested is not None and not isinstance(error, ValueError)  # which its own checks raise
            return functools.partial(self.nested, self.name, function, given) if serves else None
        for label, t in tensors:
            if t.layout is not torch.strided and label not in self.weights:
                raise ArgumentTypeError(
                    f"{self.name}: {label} must be a dense tensor, got one of layout {t.layout}"
                ) from None
        odd = {label: odd_kind(t) for label, t in tensors if odd_kind(t)}
        for label, kind in odd.items():
            if label in self.weights and isinstance(error, (RuntimeError, TypeError)):
                raise ArgumentTypeError(
                    f"{self.name}: {label} must be a weight that torch.nn.functional.linear takes, got {kind}"
                ) from error
        if not odd or not isinstance(error, (NotImplementedError, TypeError)):
            return None
        return self._try_reference(function, given, "backend" in parameters, *next(iter(odd.items())))

    def _one_by_one(self, label, value):
        """The tensors of a pair, or the value itself."""
        return value if self.takes_pair and label == "x" and isinstance(value, (tuple, list)) else (value,)

    def _try_reference(self, function, given, has_backend, label, kind):
        """The call on the reference: subclasses of Tensor that know no operator of ours may know those of PyTorch."""
        if asked_for(given.get("backend")) is not None or not (has_backend or self.on_reference):
            raise ArgumentTypeError(f"{self.name}: {label} must be a plain tensor here, got {kind}") from None

        def run():
            try:
                return function(**given | {"backend": "reference"}) if has_backend else self.on_reference(**given)
            except Exception as error:
                raise ArgumentTypeError(
                    f"{self.name}: {label} must be a tensor that the kernels or PyTorch's operators know, got {kind}"
                ) from error

        return run

    def _check_kind(self, label, value, optional):
        allowed = []
        if label in self.tensors:
            allowed.append(("a tensor", torch.Tensor))
        if label in self.numbers:
            allowed.append(("a number", (numbers.Number, torch.Tensor, torch.SymInt, torch.SymFloat)))
        if label in self.integers:
            allowed.append(("an integer", (numbers.Integral, torch.Tensor, torch.SymInt)))
        if optional and allowed:
            allowed.append(("None", type(None)))
        if not allowed and isinstance(value, torch.Tensor) and value.dim() and not label.startswith("window"):
            raise ArgumentTypeError(f"{self.name}: {label} must not be a tensor, got one of shape {tuple(value.shape)}")
        if allowed and not any(isinstance(value, kind) for _, kind in allowed):
            text = (
                f"{self.name}: {label} must be {' or '.join(text for text, _ in allowed)}, got {type(value).__name__}"
            )
            advice = self.advice.get(label)
            raise ArgumentTypeError(f"{text}: {advice}" if advice else text) from None

    def _about_names(self, parameters, args, kwargs):
        """What is wrong with the names or the number of arguments, or None: then Python's own words say it."""
        known, by_position = list(parameters), _by_position(parameters)
        unknown = next((name for name in kwargs if name not in known), None)
        if unknown is not None:
            advice = self.advice.get(unknown)
            if advice is None:
                close = difflib.get_close_matches(unknown, known, 1)
                advice = f"did you mean {close[0]}=" if close else f"it takes {', '.join(known)}"
            return f"there is no argument {unknown}: {advice}"
        if len(args) > len(by_position):
            others = ", ".join(f"{name}=" for name in known if name not in by_position)
            advice = self.advice.get("*", f"name the others: {others}" if others else "there are no others")
            return f"takes {', '.join(by_position)} by position, got {len(args)} arguments: {advice}"
        return None
