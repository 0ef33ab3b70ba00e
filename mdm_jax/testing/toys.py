"""Models with known answers: the oracles of tests and notebooks.

:class:`Toy` has four positions, three tokens and mask token 3, with logits (cosine in radians)

    logit_i(v | z) = 0.3 cos(1 + i + 2 v)
                     + sum_{j != i visible} theta[(v - z_j) mod 3] / (1 + |i - j|) .

:func:`row_denoiser` is the ideal denoiser of a law on a few rows under uniform noise. With p_j the
probability of row x^j and 1 + e_l the likelihood ratio of the noisy token for being clean,

    P(x = x^j | z without z_i)  proportional to  p_j  prod_{l != i, z_l = x^j_l} (1 + e_l) .

:class:`GaussianMixture` has a closed-form ideal denoiser. For data from ``sum_j w_j N(mu_j, s^2)``
the rescaled noisy ``z = x0 + exp(-lambda / 2) eps`` is a mixture of variance ``v = s^2 +
exp(-lambda)``, and with the gain ``k = s^2 / v``

    E[x0 | z] = sum_j r_j (k z + (1 - k) mu_j) ,   r_j proportional to w_j N(z; mu_j, v) .

Averages over z are trapezoidal sums, right to 12 digits with ``jax.enable_x64``. Levels are logSNR;
functions of z and a level are elementwise, of one rank; elements are independent copies.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.types import Array, ArrayLike, Batch, ModelFn

LENGTH = 4
NUM_TOKENS = 3
MASK_ID = 3
THETA = (1.2, -0.4, 0.1)
ROWS = ((0, 0, 1, 0), (1, 1, 1, 2), (2, 2, 2, 2))
ROW_PROBABILITIES = (0.5, 0.3, 0.2)


class Toy(nn.Module):
    """``apply(params, inputs [N, 4], logsnr, documents) -> logits [N, 4, 3]`` of inputs alone."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, inputs: Array, logsnr: Array | None = None, documents: Array | None = None
    ) -> Array:
        del logsnr, documents
        theta = self.param("theta", lambda _: jnp.asarray(THETA, self.dtype))
        position, token = np.arange(LENGTH), np.arange(NUM_TOKENS)
        bias = 0.3 * np.cos(1.0 + position[:, None] + 2.0 * token[None, :])
        distance = np.abs(position[:, None] - position[None, :])
        reach = np.where(distance > 0, 1.0 / (1.0 + distance), 0.0)
        table = theta[(token[:, None] - token[None, :]) % NUM_TOKENS]
        visible = (inputs[..., None] == token.reshape(1, 1, -1)).astype(self.dtype)
        context = jnp.einsum("ij,njz,vz->niv", jnp.asarray(reach, self.dtype), visible, table)
        return jnp.asarray(bias, self.dtype)[None] + context


def toy_batch() -> Batch:
    """The three rows of the toy's data, all positions eligible; ROW_PROBABILITIES weighs them."""
    tokens = jnp.asarray(ROWS, jnp.int32)
    eligible = jnp.ones(tokens.shape, bool)
    units = jnp.full((len(ROWS),), LENGTH, jnp.int32)
    return Batch(tokens, eligible, eligible.astype(jnp.int32), units)


def toy_params(dtype: jnp.dtype = jnp.float32) -> dict:
    return {"params": {"theta": jnp.asarray(THETA, dtype)}}


def row_denoiser(
    rows: ArrayLike = ROWS,
    probabilities: ArrayLike = ROW_PROBABILITIES,
    num_tokens: int = NUM_TOKENS,
) -> ModelFn:
    """``model_fn(inputs [N, L], logsnr [N, S]) -> log P(x_i | z without z_i)`` [N, L, K].

    The dtype is that of the levels, one for each of S contiguous segments of equal length;
    impossible tokens have a large negative logit. ``rows`` [J, L] are distinct, with
    ``probabilities`` [J] and tokens below ``num_tokens``; ValueError otherwise.
    """
    rows, probabilities = np.asarray(rows), np.asarray(probabilities, np.float64)
    if rows.ndim != 2 or probabilities.shape != rows.shape[:1] or rows.max() >= num_tokens:
        raise ValueError(
            f"row_denoiser needs rows [J, L] of tokens below {num_tokens} and J probabilities, "
            f"got shapes {rows.shape} and {probabilities.shape}, tokens up to {rows.max()}"
        )
    clean = rows[..., None] == np.arange(num_tokens)

    def model_fn(inputs: Array, logsnr: Array, documents: Array | None = None) -> Array:
        del documents
        logsnr = jnp.repeat(logsnr, inputs.shape[-1] // logsnr.shape[-1], axis=-1)
        own = jax.nn.softplus(logsnr + math.log(num_tokens))[:, None]
        evidence = jnp.where(inputs[:, None] == rows[None], own, 0.0)  # [N, J, L]
        others = jnp.sum(evidence, axis=-1, keepdims=True) - evidence
        prior = jnp.log(jnp.asarray(probabilities, logsnr.dtype))
        shares = jax.nn.softmax(others + prior[None, :, None], axis=1)
        probs = jnp.einsum("njl,jlk->nlk", shares, jnp.asarray(clean, logsnr.dtype))
        return jnp.log(jnp.maximum(probs, jnp.finfo(logsnr.dtype).tiny))

    return model_fn


_REACH = 10.0
_NODES = 801


@pytree_dataclass
class GaussianMixture:
    """Mixture of normal laws: weights [J], means [J] and a common std []. Methods are jit-able."""

    weights: Array
    means: Array
    std: ArrayLike

    def sample(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Independent draws, of the default float dtype."""
        which, noise = jax.random.split(key)
        index = jax.random.choice(which, len(self.weights), shape, p=jnp.asarray(self.weights))
        return jnp.asarray(self.means)[index] + self.std * jax.random.normal(noise, shape)

    def log_density(self, x: ArrayLike) -> Array:
        """log p(x), nats."""
        x = _as_float(x)
        return self.noisy_log_density(x, jnp.full_like(x, jnp.inf))

    def noisy_log_density(self, z: ArrayLike, logsnr: ArrayLike) -> Array:
        """log density of ``x0 + exp(-lambda / 2) eps`` at z, nats."""
        return jax.nn.logsumexp(self._log_joint(_as_float(z), _as_float(logsnr)), axis=0)

    def denoise(self, z: ArrayLike, logsnr: ArrayLike) -> Array:
        """E[x0 | z]."""
        z, logsnr = _as_float(z), _as_float(logsnr)
        return jnp.sum(self._shares(z, logsnr) * self._component_means(z, logsnr), axis=0)

    def predict_noise(self, z: ArrayLike, logsnr: ArrayLike) -> Array:
        """E[eps | z], without the cancellation of ``(z - denoise) exp(lambda / 2)``."""
        z, logsnr = _as_float(z), _as_float(logsnr)
        distance = jnp.sum(self._shares(z, logsnr) * (z[None] - _stack(self.means, z)), axis=0)
        # exp(lambda / 2) (1 - k), without the large factor.
        scale = jnp.exp(0.5 * (logsnr + 2 * jax.nn.log_sigmoid(-self._shifted(logsnr))))
        return scale * distance

    def posterior_variance(self, z: ArrayLike, logsnr: ArrayLike) -> Array:
        """Var[x0 | z]."""
        return self._posterior(z, logsnr)[0]

    def mmse(self, logsnr: ArrayLike) -> Array:
        """``E (x0 - D)^2``, the ideal denoiser's error."""
        return self._average(lambda z, level: self._posterior(z, level)[0], logsnr)

    def fourth_moment(self, logsnr: ArrayLike) -> Array:
        """``E (x0 - D)^4``."""
        return self._average(lambda z, level: self._posterior(z, level)[1], logsnr)

    def eps_mse(self, logsnr: ArrayLike) -> Array:
        """``E (eps - eps_hat)^2 = exp(lambda) mmse``."""
        return jnp.exp(logsnr) * self.mmse(logsnr)

    def entropy(self, logsnr: ArrayLike = jnp.inf) -> Array:
        """Differential entropy of ``x0 + exp(-lambda / 2) eps``, nats; of the data by default."""
        return -self._average(self.noisy_log_density, logsnr)

    def _posterior(self, z: ArrayLike, logsnr: ArrayLike) -> tuple[Array, Array]:
        z, logsnr = _as_float(z), _as_float(logsnr)
        shares, component = self._shares(z, logsnr), self._component_means(z, logsnr)
        inner = jnp.square(self.std) * jax.nn.sigmoid(-self._shifted(logsnr))
        square = jnp.square(component - jnp.sum(shares * component, axis=0)[None])
        variance = inner + jnp.sum(shares * square, axis=0)
        fourth = jnp.sum(shares * (jnp.square(square) + 6 * square * inner[None]), axis=0)
        return variance, 3 * jnp.square(inner) + fourth

    def _average(self, function: Callable[[Array, Array], Array], logsnr: ArrayLike) -> Array:
        """E over z of a function of (z, logSNR), at each level."""
        nodes = jnp.linspace(-_REACH, _REACH, _NODES)[None]
        mass = jnp.exp(-0.5 * jnp.square(nodes))
        mass = jnp.asarray(self.weights, mass.dtype)[:, None] * (mass / jnp.sum(mass))

        def at(level: Array) -> Array:
            std = jnp.exp(0.5 * self._log_variance(level))
            z = jnp.asarray(self.means, mass.dtype)[:, None] + std * nodes
            return jnp.sum(mass * function(z, jnp.full_like(z, level)))

        logsnr = _as_float(logsnr)
        return jax.vmap(at)(logsnr.reshape(-1)).reshape(logsnr.shape)

    def _log_joint(self, z: Array, logsnr: Array) -> Array:
        """log w_j + log N(z; mu_j, v), [J, *z.shape]."""
        log_variance = self._log_variance(logsnr)[None]
        square = jnp.square(z[None] - _stack(self.means, z)) * jnp.exp(-log_variance)
        log_weights = jnp.log(_stack(self.weights, z))
        return log_weights - 0.5 * (square + log_variance + math.log(2 * math.pi))

    def _component_means(self, z: Array, logsnr: Array) -> Array:
        """E[x0 | z, component], [J, *z.shape]."""
        shifted = self._shifted(logsnr)[None]
        means = _stack(self.means, z)
        return jax.nn.sigmoid(shifted) * z[None] + jax.nn.sigmoid(-shifted) * means

    def _shares(self, z: Array, logsnr: Array) -> Array:
        return jax.nn.softmax(self._log_joint(z, logsnr), axis=0)

    def _shifted(self, logsnr: Array) -> Array:
        return logsnr + 2 * jnp.log(jnp.asarray(self.std, logsnr.dtype))

    def _log_variance(self, logsnr: Array) -> Array:
        log_std = jnp.log(jnp.asarray(self.std, logsnr.dtype))
        return jnp.logaddexp(-logsnr, jnp.broadcast_to(2 * log_std, logsnr.shape))


def standard_normal() -> GaussianMixture:
    """N(0, 1): its eps error is sigmoid(lambda) at every level."""
    return normal(0.0, 1.0)


def narrow_normal() -> GaussianMixture:
    """N(0.3, 0.5^2)."""
    return normal(0.3, 0.5)


def symmetric_pair() -> GaussianMixture:
    """Two equal components at -0.96 and 0.96 with std 0.28: unit variance."""
    return GaussianMixture(np.array([0.5, 0.5]), np.array([-0.96, 0.96]), 0.28)


def skewed_pair() -> GaussianMixture:
    """Components at -1 (probability 0.3) and 0.5 (0.7) with std 0.25."""
    return GaussianMixture(np.array([0.3, 0.7]), np.array([-1.0, 0.5]), 0.25)


def normal(mean: float, std: float) -> GaussianMixture:
    """One normal law; ValueError unless std > 0."""
    if not std > 0:
        raise ValueError(f"normal needs std > 0, got {std}")
    return GaussianMixture(np.array([1.0]), np.array([float(mean)]), float(std))


def _as_float(values: ArrayLike) -> Array:
    return jnp.asarray(values, jnp.result_type(values, float))


def _stack(per_component: ArrayLike, like: Array) -> Array:
    """[J] -> [J, 1, ..., 1], to broadcast against [J, *like.shape]."""
    values = jnp.asarray(per_component, like.dtype)
    return values.reshape(-1, *(1,) * like.ndim)
