"""The last product of a network, held back until it is known which logits are wanted.

Logits of a whole batch, [N, L, K] in float32, are the largest arrays of a training step by far, and
a loss reads them at some of the positions only. So a network may return a :class:`Readout` in
their place, of which :func:`~mdm_jax.models.position_losses` computes what a loss asks for.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from mdm_jax.models.products import product
from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.typing import Array, PyTree


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Projection:
    """How features become logits.

    Attributes:
        tied: the weights are an embedding table [K, D] instead of a kernel [D, K].
        dtype: of the operands of the products; they accumulate in float32.
    """

    tied: bool
    dtype: Any

    def __call__(self, features: Array, weights: Array) -> Array:
        """Logits [..., K] float32 from features [..., D]."""
        return self._product("...d,kd->...k", "...d,dk->...k", features, weights)

    def to_features(self, slopes: Array, weights: Array) -> Array:
        """The transpose: [..., D] from slopes [..., K]."""
        return self._product("...k,kd->...d", "...k,dk->...d", slopes, weights)

    def to_weights(self, slopes: Array, features: Array) -> Array:
        """The transpose: [G, K, D] or [G, D, K] from slopes [G, C, K] and features [G, C, D]."""
        if self.tied:
            return self._product("gck,gcd->gkd", "", slopes, features)
        return self._product("", "gcd,gck->gdk", features, slopes)

    def _product(self, tied: str, untied: str, left: Array, right: Array) -> Array:
        return product(tied if self.tied else untied, left, right, self.dtype)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Chunking:
    """How many logits exist at a time. It changes what a loss costs, never its value.

    Attributes:
        groups: G, the devices that rows are spread over (data times fsdp). A group is a contiguous
            part of the rows, and no position leaves its group. Where G does not divide the number
            of rows their greatest common divisor is taken.
        positions: of each group whose logits exist at a time; None chooses by the backend: 32 MiB
            of logits on CPUs, whose caches hold them, 512 MiB elsewhere, and at most an eighth of
            the positions.

    Raises:
        ValueError: for numbers below 1.
    """

    groups: int = 1
    positions: int | None = None

    def __post_init__(self):
        for name in ("groups", "positions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Chunking needs {name} of at least 1, got {value}")

    def size(self, positions: int, num_tokens: int) -> int:
        """C, of a group of so many positions and of so many logits each."""
        if self.positions is not None:
            return min(self.positions, positions)
        budget = 2**25 if jax.default_backend() == "cpu" else 2**29
        return max(1, min(budget // (4 * num_tokens), -(-positions // 8)))


@pytree_dataclass
class Readout:
    """Logits as a product that is still to be taken.

    Attributes:
        features: [N, L, D] what the last layer says, float.
        weights: of the vocabulary, [K, D] or [D, K] as ``projection`` says.
        projection: see :class:`Projection`.
        chunking: see :class:`Chunking`.
    """

    features: Array
    weights: Array
    projection: Projection
    chunking: Chunking = Chunking()

    @property
    def num_tokens(self) -> int:
        """K."""
        return self.weights.shape[0 if self.projection.tied else 1]

    def logits(self) -> Array:
        """All of them, [N, L, K] float32."""
        return self.projection(self.features, self.weights)


@pytree_dataclass
class ForeseenReadout(Readout):
    """A readout of whose losses it is known what they will be multiplied with.

    Then their gradient can be computed along with them, from the same logits. It changes what a
    loss costs, never its value: gradients that come out otherwise are computed anew.

    Attributes:
        expected: [N, L] float32, in proportion to the loss's slopes with respect to those of single
            positions.
    """

    expected: Array | None = None


@pytree_dataclass
class GivenLosses(Readout):
    """Stands for a network whose losses of single positions are these, whatever is asked of it.

    Attributes:
        losses: [N, L] float32.
    """

    losses: Array | None = None


def as_logits(outputs: Array | Readout) -> Array:
    """What a network returned, as logits [N, L, K]; an array is handed back as it is."""
    return outputs.logits() if isinstance(outputs, Readout) else outputs


def finish(readout: Readout, chunking: Chunking | None) -> Array | Readout:
    """Logits, or the readout itself where a chunking says how a loss is to go through it."""
    return readout.logits() if chunking is None else dataclasses.replace(readout, chunking=chunking)


def readout_apply(model: Any, chunking: Chunking | None = None) -> Callable[..., Readout]:
    """The network for objectives: as ``model.apply``, with a readout in place of the logits.

    Block and autoregressive models take the chunking themselves (``models.block_apply``,
    ``models.causal_apply``).

    Args:
        model: a ``models.Transformer``.
        chunking: of the losses.

    Returns:
        ``apply_fn(params, inputs [N, L], logsnr, documents, estimate=None) -> Readout``.
    """
    chosen = Chunking() if chunking is None else chunking

    def apply_fn(params: PyTree, *inputs: Array | None, **further: Array) -> Readout:
        return finish(model.apply(params, *inputs, **further, method="readout"), chosen)

    return apply_fn
