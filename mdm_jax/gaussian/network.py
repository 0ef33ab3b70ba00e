"""A transformer over patches of a picture, for Gaussian diffusion."""

import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from mdm_jax.models.layers import Linear
from mdm_jax.models.transformer import TransformerConfig, level_condition, run_blocks
from mdm_jax.types import Array


class PictureTransformer(nn.Module):
    """Diffusion transformer (Peebles & Xie 2022): ``apply(params, inputs, logsnr) -> [N, L]``.

    Noisy pictures are rows [N, L], L = H W C, with one logSNR each [N, 1]; the result is float32.
    adaLN-zero conditioning, learned positions, and a zero head: a new network outputs zero.
    With ``num_classes`` a learned vector of the picture's class is added to that of the level;
    ``documents`` [N, L] name the classes (``types.Batch``), None and 1 are unknown ones. Else they
    are ignored, as is ``config.vocab_size``. ``event_shape`` is (H, W, C) or (H, W). ValueError if
    ``patch_size`` does not divide H and W, or rows have another length.
    """

    config: TransformerConfig
    event_shape: tuple[int, ...]
    patch_size: int = 2
    num_classes: int = 0

    @nn.compact
    def __call__(
        self, inputs: Array, logsnr: Array | None = None, documents: Array | None = None
    ) -> Array:
        c, p = self.config, self.patch_size
        height, width, channels = (*self.event_shape, 1)[:3]
        if inputs.shape[-1] != math.prod(self.event_shape):
            raise ValueError(
                f"rows must have {math.prod(self.event_shape)} numbers, a picture of shape "
                f"{self.event_shape}; got {inputs.shape}"
            )
        if p < 1 or height % p or width % p:
            raise ValueError(f"patches of side {p} do not divide pictures of {height} x {width}")
        rows, columns, size = height // p, width // p, p * p * channels
        pictures = inputs.reshape(-1, rows, p, columns, p, channels)
        patches = jnp.swapaxes(pictures, 2, 3).reshape(-1, rows * columns, size)
        project = {"dtype": c.dtype, "param_dtype": c.param_dtype, "use_bias": True}
        x = Linear(c.width, axes=(None, "embed"), name="embed", **project)(patches)
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, None, "embed"))
        x = x + self.param("positions", init, (1, rows * columns, c.width), c.param_dtype)
        # One level per picture: segments of a row of numbers are not runs of patches.
        condition = level_condition(c, logsnr, 1)
        if self.num_classes:
            init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, "embed"))
            classes = self.param("classes", init, (self.num_classes + 1, c.width), c.param_dtype)
            first = jnp.ones(len(inputs), jnp.int32) if documents is None else documents[:, 0]
            known = jnp.clip(first - 1, 0, self.num_classes)  # 0 where it is unknown
            condition = condition + classes[known][:, None].astype(condition.dtype)
        x, _ = run_blocks(c, x, None, np.arange(rows * columns), condition)
        zeros = nn.initializers.zeros
        y = Linear(size, axes=("embed", None), kernel_init=zeros, name="head", **project)(x)
        y = jnp.swapaxes(y.reshape(-1, rows, columns, p, p, channels), 2, 3)
        return y.reshape(inputs.shape)
