"""mdm_jax: masked diffusion models in JAX, trained with far less variance.

``import mdm_jax as mdm``, then ``mdm.variance.mirror()``, ``mdm.corruption.fixed_count(mask_id)``.
Packages that load more than JAX are imported by name, such as ``mdm_jax.training``.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mdm_jax import corruption, draws, models, objectives, rng, samplers, schedules, variance

__version__ = "0.1.0"
"""The version: packaging reads it here."""

_LAZY = ("corruption", "draws", "models", "objectives", "rng", "samplers", "schedules", "variance")


def __getattr__(name: str) -> Any:
    """Import a part when it is first used, so that ``mdm --help`` loads no JAX."""
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
