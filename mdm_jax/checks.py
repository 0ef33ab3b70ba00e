"""Argument checks: settings stated in signatures, numbers known at building, registry names.

A setting is stated beside its default, ``decay: Annotated[float, Real("[0, 1)", "per step",
"of the running mean")] = 0.99``: what is allowed, the unit, one line of meaning. :func:`checked`
holds every call to it, and the launcher's config, its check and its help are read from it.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.types import ArrayLike

Factory = TypeVar("Factory", bound=Callable[..., Any])


class Rule:
    """What a setting may be; ``several``: a sequence is checked element by element.

    ``check(name, value)`` raises TypeError or ValueError that says what is allowed.
    """

    meaning: str
    unit: str = ""
    several: bool = False

    def check(self, name: str, value: Any) -> None:
        for each in value if self.several and isinstance(value, tuple | list) else (value,):
            self.check_one(name, each)

    def explained(self) -> str:
        words = ", ".join(filter(None, (self.unit, self.meaning)))
        return f" ({words})" if words else ""


@dataclasses.dataclass(frozen=True)
class Real(Rule):
    """Numbers of an interval with finite ends such as "(0, 1]"; a traced one passes."""

    interval: str
    unit: str = ""
    meaning: str = ""
    several: bool = False
    kind = "a number"

    @functools.cached_property
    def ends(self) -> tuple[float, float]:
        low, high = self.interval[1:-1].split(",")
        return float(low), float(high)

    @property
    def allowed(self) -> str:
        return f"{self.kind} in {self.interval}"

    def check_one(self, name: str, value: Any) -> None:
        try:
            number = as_parameter(value, name)
        except OverflowError:
            number = math.inf
        if is_concrete(number) and not self._holds(number):
            raise ValueError(f"{name} must be {self.allowed}, got {value}{self.explained()}")

    def _holds(self, value: float) -> bool:
        low, high = self.ends
        above = value >= low if self.interval[0] == "[" else value > low
        below = value <= high if self.interval[-1] == "]" else value < high
        return above and below  # NaN is neither


class Whole(Real):
    """Integers of an interval."""

    kind = "a whole number"

    def check_one(self, name: str, value: Any) -> None:
        super().check_one(name, value)
        if not (isinstance(value, int) or jnp.issubdtype(jnp.result_type(value), jnp.integer)):
            raise ValueError(f"{name} must be {self.allowed}, got {value!r}{self.explained()}")


@dataclasses.dataclass(frozen=True)
class Name(Rule):
    """One of some names."""

    names: tuple[str, ...]
    meaning: str = ""
    several: bool = False

    @property
    def allowed(self) -> str:
        return " | ".join(name or "''" for name in self.names)

    def check_one(self, name: str, value: Any) -> None:
        if not isinstance(value, str):
            raise TypeError(f"{name} must be {self.allowed}, got {value!r}{self.explained()}")
        if value not in self.names:
            error = unknown_name(value, self.names, "name")
            raise ValueError(f"{name}: {error}{self.explained()}")


@dataclasses.dataclass(frozen=True)
class NameOrChain(Name):
    """One of some names, or several of ``parts`` with commas between them."""

    parts: tuple[str, ...] = ()

    @property
    def allowed(self) -> str:
        return f"{super().allowed}, or a chain such as {', '.join(self.parts[:2])}"

    def check_one(self, name: str, value: Any) -> None:
        if value in self.names or not isinstance(value, str):
            return super().check_one(name, value)
        for part in (part.strip() for part in value.split(",")):
            if part not in self.parts:
                error = unknown_name(part, {*self.names, *self.parts}, "name")
                raise ValueError(f"{name}: {error}{self.explained()}")
        return None


@dataclasses.dataclass(frozen=True)
class Plain(Rule):
    """A switch, or free text."""

    type: type
    meaning: str = ""
    several: bool = False

    @property
    def allowed(self) -> str:
        return {bool: "True | False", str: "text"}[self.type]

    def check_one(self, name: str, value: Any) -> None:
        if not isinstance(value, self.type):
            raise TypeError(f"{name} must be {self.allowed}, got {value!r}{self.explained()}")


Bins = Annotated[int, Whole("[1, 1e5]", "bins", "of equal width")]
Decay = Annotated[float, Real("[0, 1)", "per step", "of running averages; 0: the latest value")]
LearningRate = Annotated[float, Real("(0, 10]", "learning rate", "of Adam for what is learned")]
Rate = Annotated[ArrayLike, Real("[0, 1]", "masking rate", "an end of the range")]
PositiveRate = Annotated[ArrayLike, Real("(0, 1]", "masking rate", "an end of the range")]
Logsnr = Annotated[ArrayLike, Real("[-100, 100]", "logSNR", "an end of the range")]


def rule_of(parameter: inspect.Parameter) -> Rule | None:
    """What is stated for a parameter, by ``Annotated`` or ``Literal``.

    A text in ``Annotated`` is the meaning of a ``Literal``, a ``bool`` or a ``str``.
    """
    annotation = parameter.annotation
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    for part in typing.get_args(annotation) if union else (annotation,):
        meaning, kind = "", part
        for stated in getattr(part, "__metadata__", ()):
            if isinstance(stated, Rule):
                return stated
            if isinstance(stated, str):
                meaning, kind = stated, part.__origin__
        if typing.get_origin(kind) is typing.Literal:
            return Name(typing.get_args(kind), meaning)
        if meaning and kind in (bool, str):
            return Plain(kind, meaning)
    return None


def checked(factory: Factory) -> Factory:
    """Decorate a factory or dataclass: its arguments must keep to the rules of its signature."""
    if inspect.isclass(factory):
        factory.__init__ = checked(factory.__init__)
        return factory
    signature, name = inspect.signature(factory), factory.__qualname__.removesuffix(".__init__")
    rules = {
        key: (rule, type(None) in typing.get_args(parameter.annotation))
        for key, parameter in signature.parameters.items()
        if (rule := rule_of(parameter)) is not None
    }

    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            arguments = signature.bind_partial(*args, **kwargs).arguments
        except TypeError:
            return factory(*args, **kwargs)  # raises it with its own name
        for key, value in arguments.items():
            rule, optional = rules.get(key, (None, False))
            if rule is not None and not (optional and value is None):
                rule.check(f"{name}: {key}", value)
        return factory(*args, **kwargs)

    return call


def as_parameter(value: ArrayLike, name: str) -> ArrayLike:
    """A known number as a float, a traced scalar as it is.

    TypeError unless numeric; ValueError unless scalar (batch with ``jax.vmap``).
    """
    if isinstance(value, bool | str) or value is None:
        raise TypeError(f"{name} must be a number, got {value!r}")
    if isinstance(value, int | float | np.number):
        return float(value)
    if not hasattr(value, "shape"):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if value.shape != ():
        raise ValueError(f"{name} must be a scalar, got shape {value.shape}; batch with jax.vmap")
    return float(value) if is_concrete(value) else value


def is_concrete(*values: ArrayLike) -> bool:
    """Whether no value is traced, or in part in other processes."""
    return all(
        not isinstance(value, jax.core.Tracer) and getattr(value, "is_fully_addressable", True)
        for value in values
    )


def check_interval(name: str, low: ArrayLike, high: ArrayLike, what: str = "logSNR") -> None:
    """Raise ValueError unless low < high. NaN fails, infinite ends pass."""
    if is_concrete(low, high) and not low < high:
        raise ValueError(f"{name} needs low < high ({what}), got low={low}, high={high}")


def check_finite(name: str, **values: ArrayLike) -> None:
    """Raise ValueError for the first named value that is known and not finite."""
    for key, value in values.items():
        if is_concrete(value) and not np.isfinite(value):
            raise ValueError(f"{name} needs a finite {key}, got {value}")


def parameters(
    name: str, requirement: str, holds: Callable[..., bool], /, **values: ArrayLike
) -> tuple[ArrayLike, ...]:
    """Check a factory's parameters, each by :func:`as_parameter`, where they are known.

    ValueError for a value that is not finite, or if ``holds(*values)``, in words the
    ``requirement``, is False.
    """
    checked = {key: as_parameter(value, key) for key, value in values.items()}
    check_finite(name, **checked)
    if is_concrete(*checked.values()) and not holds(*checked.values()):
        got = ", ".join(f"{key}={value}" for key, value in checked.items())
        raise ValueError(f"{name} needs {requirement}, got {got}")
    return tuple(checked.values())


def log_positive(name: str, what: str, value: ArrayLike) -> ArrayLike:
    """log of a parameter; ValueError if it is known and not finite and positive."""
    value = as_parameter(value, what)
    check_finite(name, **{what: value})
    if not is_concrete(value):
        return jnp.log(value)
    if not value > 0:
        raise ValueError(f"{name} needs {what} > 0, got {value}")
    return math.log(value)


def missing_package(what: str, extra: str, error: ImportError) -> ImportError:
    """The error where an optional package is not installed; it names the extra with the package."""
    return ImportError(f"{what} needs more packages ({error}): pip install 'mdm_jax[{extra}]'")


def unknown_name(
    name: str,
    known: Iterable[str],
    kind: str,
    elsewhere: Mapping[str, str] | None = None,
) -> ValueError:
    """The error for an unknown name, with close matches; ``elsewhere`` maps names to their home."""
    known = sorted(known)
    message = f"unknown {kind} {name!r}; "
    if elsewhere and name in elsewhere:
        message += f"{name!r} is {elsewhere[name]}; "
    if near := difflib.get_close_matches(name, known, n=3, cutoff=0.4):
        message += f"did you mean {' or '.join(map(repr, near))}? "
    return ValueError(f"{message}known: {', '.join(name or repr(name) for name in known)}")
