"""mdm_jax: masked diffusion models in JAX, trained with far less variance.

``import mdm_jax as mdm``, then ``mdm.variance.mirror()``, ``mdm.corruption.fixed_count(mask_id)``.
Packages that load more than JAX are imported by name, such as ``mdm_jax.training``.
"""

from mdm_jax import corruption, draws, models, objectives, rng, samplers, schedules, variance

__version__ = "0.1.0"
