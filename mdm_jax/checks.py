"""Argument checks: numbers known when an object is built, and registry names."""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.types import ArrayLike


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
    """Whether no value is traced."""
    return not any(isinstance(value, jax.core.Tracer) for value in values)


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
        message += f"did you mean {' or '.join(near)}? "
    return ValueError(f"{message}known: {', '.join(known)}")
