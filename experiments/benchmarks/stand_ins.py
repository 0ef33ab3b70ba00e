"""Lets the library be imported where only jax, flax, optax, orbax and chex are installed.

``mdm_jax.training`` names its metric writer, whose module imports packages for the display of
metrics. No benchmark writes any, so where such a package is missing an empty module takes its
place. Import this module before ``mdm_jax.training``.
"""

import importlib.util
import sys
import types

for _name in ("tensorboardX", "tqdm"):
    if _name not in sys.modules and importlib.util.find_spec(_name) is None:
        sys.modules[_name] = types.ModuleType(_name)
