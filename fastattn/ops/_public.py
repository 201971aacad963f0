"""What stands around every public function: it can be overridden, as those of torch can, and it answers to mistakes.

A call pays for one look at the types of its arguments, and for no more unless it fails. Then the arguments are looked
at again: an argument of an unknown name, or of a kind that the function does not take, is named instead of the error
that it led to.
"""

import difflib
import functools
import inspect
import numbers

import torch
from torch.overrides import handle_torch_function, has_torch_function

from fastattn.ops._advice import ADVICE
from fastattn.ops._kinds import is_causal_bias

_is_mode_enabled = torch._C._is_torch_function_mode_enabled


class ArgumentValueError(ValueError, RuntimeError):
    """An argument has a wrong value. It is a RuntimeError too, which is what PyTorch and flash-attn raise."""


class ArgumentTypeError(TypeError, RuntimeError):
    """An argument has a wrong type or dtype; a RuntimeError for the same reason."""


_KINDS = {ValueError: ArgumentValueError, TypeError: ArgumentTypeError}


class Public:
    """The public side of one function.

    Args:
        name: what messages call it, and the key of its advice in _advice.py.
        tensors, numbers: names of the parameters that take a tensor, or a number; NAME? may be None without being so
            by default.
        weights: those of `tensors` that are not asked to take the place of the function: they are asked in it, by
            torch.nn.functional.linear, which their own kinds know.
        takes_pair: whether the first parameter takes a pair of tensors too.
    """

    def __init__(self, name, *, tensors="", numbers="", weights="", takes_pair=False):
        self.name = name
        self.tensors = tensors.replace("?", "").split()
        self.optional = [name[:-1] for name in tensors.split() if name.endswith("?")]
        self.numbers = numbers.split()
        self.weights = weights.split()
        self.takes_pair = takes_pair

    def overridable(self, function):
        """Let `__torch_function__` of its arguments, or of a mode, take the place of a function; answer to mistakes.

        A CausalBias has such a method too, but it knows torch's own attention only: ours reads the class itself.
        """

        names, takes_pair = list(inspect.signature(function).parameters), self.takes_pair

        @functools.wraps(function)
        def call(*args, **kwargs):
            values = (*args, *kwargs.values()) if kwargs else args
            if takes_pair and values and isinstance(values[0], (tuple, list)):
                values = (*values[0], *values[1:])
            # torch.compile sees modes by the first question only
            if _is_mode_enabled() or has_torch_function(values):
                relevant = self._relevant(dict(zip(names, args, strict=False)) | kwargs)
                # torch.compile answers the last question with True even where overriding is turned off
                if _is_mode_enabled() or (torch._C._is_torch_function_enabled() and has_torch_function(relevant)):
                    return handle_torch_function(call, relevant, *args, **kwargs)
            try:
                return function(*args, **kwargs)
            except Exception as error:
                self._answer(function, args, kwargs, error)
                raise

        return call

    def _relevant(self, given):
        """The arguments whose `__torch_function__` may take the place of the function."""
        relevant = [t for name, t in given.items() if name not in self.weights and not is_causal_bias(t)]
        if self.takes_pair:
            relevant += [t for pair in relevant if isinstance(pair, (tuple, list)) for t in pair]
        return tuple(relevant)

    def answering(self, function):
        """Answer to mistakes only."""

        @functools.wraps(function)
        def call(*args, **kwargs):
            try:
                return function(*args, **kwargs)
            except Exception as error:
                self._answer(function, args, kwargs, error)
                raise

        return call

    def _answer(self, function, args, kwargs, error):
        """Raise what the caller is to see instead of `error`, if that is something else."""
        self._name_mistake(function, args, kwargs, error)
        kind = _KINDS.get(type(error))
        if kind is not None and not torch.compiler.is_compiling():
            raise kind(*error.args).with_traceback(error.__traceback__) from error.__cause__

    def _name_mistake(self, function, args, kwargs, error):
        """Raise TypeError where a call failed by the names or kinds of its arguments, if `error` does not say so."""
        if torch.compiler.is_compiling() or (isinstance(error, TypeError) and str(error).startswith(f"{self.name}:")):
            return
        parameters = inspect.signature(function).parameters
        try:
            given = inspect.signature(function).bind(*args, **kwargs).arguments
        except TypeError as mismatch:
            raise ArgumentTypeError(f"{self.name}: {self._about_names(parameters, args, kwargs) or mismatch}") from None
        for label, value in given.items():
            values = value if self.takes_pair and label == "x" and isinstance(value, (tuple, list)) else (value,)
            for one in values:
                self._check_kind(label, one, parameters[label].default is None or label in self.optional)

    def _check_kind(self, label, value, optional):
        allowed = []
        if label in self.tensors:
            allowed.append(("a tensor", torch.Tensor))
        if label in self.numbers:
            allowed.append(("a number", (numbers.Number, torch.Tensor, torch.SymInt, torch.SymFloat)))
        if optional and allowed:
            allowed.append(("None", type(None)))
        if allowed and not any(isinstance(value, kind) for _, kind in allowed):
            text = (
                f"{self.name}: {label} must be {' or '.join(text for text, _ in allowed)}, got {type(value).__name__}"
            )
            advice = ADVICE[self.name].get(label)
            raise ArgumentTypeError(f"{text}: {advice}" if advice else text) from None

    def _about_names(self, parameters, args, kwargs):
        """What is wrong with the names or the number of arguments, or None: then Python's own words say it."""
        known = list(parameters)
        by_position = [name for name in known if parameters[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        unknown = next((name for name in kwargs if name not in known), None)
        if unknown is not None:
            advice = ADVICE[self.name].get(unknown)
            if advice is None:
                close = difflib.get_close_matches(unknown, known, 1)
                advice = f"did you mean {close[0]}=" if close else f"it takes {', '.join(known)}"
            return f"there is no argument {unknown}: {advice}"
        if len(args) > len(by_position):
            others = ", ".join(f"{name}=" for name in known if name not in by_position)
            advice = ADVICE[self.name].get("*", f"name the others: {others}" if others else "there are no others")
            return f"takes {', '.join(by_position)} by position, got {len(args)} arguments: {advice}"
        return None
