"""mdm_jax: masked diffusion models in JAX, trained with far less variance.

``import mdm_jax as mdm``, then ``mdm.variance.mirror()``, ``mdm.corruption.fixed_count(mask_id)``
and so on. The data layer, which brings Grain and TFDS, is imported by ``import mdm_jax.data``.
"""

from mdm_jax import corruption as corruption
from mdm_jax import draws as draws
from mdm_jax import models as models
from mdm_jax import objectives as objectives
from mdm_jax import rng as rng
from mdm_jax import samplers as samplers
from mdm_jax import schedules as schedules
from mdm_jax import variance as variance

__version__ = "0.1.0"
