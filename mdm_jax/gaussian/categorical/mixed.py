"""Diffusion of rows of numeric and categorical columns: network and loss (CDTD).

A cell is a vector of D numbers: an embedding of norm sqrt(D) of its category, or a standardised
number in the first place and zeros, which carry no noise. Mueller et al. 2025 (CDTD).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.corruption.process import Corrupted, Corruption
from mdm_jax.draws import Draw, DrawSpec, LossStats
from mdm_jax.gaussian.categorical.embedding import unit_embeddings
from mdm_jax.gaussian.objective import normal_noise
from mdm_jax.gaussian.parameterisations import edm
from mdm_jax.gaussian.paths import Path
from mdm_jax.models.transformer import TransformerConfig, level_condition, run_blocks
from mdm_jax.objectives.objective import Objective, flatten_views, repeat_views, unflatten_views
from mdm_jax.schedules.laws import Law
from mdm_jax.types import Array, Batch, ModelFn

_OUTPUT = edm(1.0)
"""Of numbers: the network's F, for standardised data."""


class Cells(NamedTuple):
    """The L columns of a table, as a network sees them.

    Attributes:
        sizes: categories of each column, 0 for numbers.
        offsets, scales: a number is ``offset + scale * code``, in standard deviations.
        entropies: of the categories' frequencies, nats; 1 for numbers.
        num_values: codes of a number.
    """

    sizes: tuple[int, ...]
    offsets: tuple[float, ...]
    scales: tuple[float, ...]
    entropies: tuple[float, ...]
    num_values: int

    @property
    def is_numeric(self) -> np.ndarray:
        """[L] bool."""
        return np.array(self.sizes) == 0

    @property
    def first(self) -> np.ndarray:
        """[L] number of each column's first category in the common table of all."""
        return np.cumsum((0, *self.sizes[:-1]))

    def active(self, size: int) -> np.ndarray:
        """[L, D] bool, numbers of a cell that carry data and noise."""
        return ~self.is_numeric[:, None] | (np.arange(size) == 0)

    def own(self) -> np.ndarray:
        """[L, K] bool, categories of each column in the common table; all for numbers."""
        number, first = np.arange(sum(self.sizes)), self.first[:, None]
        own = (number >= first) & (number < first + np.array(self.sizes)[:, None])
        return own | self.is_numeric[:, None]

    def index(self, codes: Array) -> Array:
        """[N, L] rows of the common table of codes [N, L]; 0 for numbers."""
        return jnp.where(self.is_numeric[None], 0, self.first[None] + codes)


class NoisyCells(NamedTuple):
    """Inputs of a :class:`TableTransformer`: ``alpha clean(codes) + noise``.

    ``codes`` [N, L] int32, -1 for a zero vector; ``noise`` [N, L, D].
    """

    codes: Array
    noise: Array


class Predicted(NamedTuple):
    """``values`` [N, L], the estimate of numbers; ``logits`` [N, L, K] of categories, those of
    other columns excluded; ``mean`` [N, L, D], the estimate of all cells (score interpolation)."""

    values: Array
    logits: Array
    mean: Array


class TableTransformer(nn.Module):
    """Transformer over the cells of a row: ``apply(params, inputs, logsnr) -> Predicted``.

    ``inputs`` are :class:`NoisyCells`, or clean codes [N, L]; ``logsnr`` [N, 1 or L] drives each
    column's norms (adaLN-zero). Every column has projections of its own in and out; the numbers'
    output is EDM's F. ``size`` is D, ``noising`` the path. :meth:`clean` embeds codes.
    """

    config: TransformerConfig
    cells: Cells
    size: int
    noising: Path

    def setup(self) -> None:
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", None))
        shape = (max(sum(self.cells.sizes), 1), self.size)
        self.table = self.param("embedding", init, shape, self.config.param_dtype)

    def embeddings(self) -> Array:
        """[K, D] embeddings of the categories of all columns."""
        return unit_embeddings(self.table, -1)

    def clean(self, codes: Array) -> Array:
        """[..., L, D] vectors of codes [..., L]; zero where the code is negative."""
        cells, number = self.cells, jnp.maximum(codes, 0)
        offset, scale = (np.array([a], np.float32) for a in (cells.offsets, cells.scales))
        values = (offset + scale * number)[..., None] * cells.active(self.size)[None]
        vectors = self.embeddings()[cells.index(number)]
        vectors = jnp.where(cells.is_numeric[None, :, None], values, vectors)
        return jnp.where(codes[..., None] >= 0, vectors, 0.0)

    @nn.compact
    def __call__(
        self,
        inputs: NoisyCells | Array,
        logsnr: Array | None = None,
        documents: Array | None = None,
    ) -> Predicted:
        del documents
        c, cells = self.config, self.cells
        if not isinstance(inputs, NoisyCells):
            inputs = NoisyCells(inputs, jnp.zeros((*inputs.shape, self.size), jnp.float32))
        length = len(cells.sizes)
        level = jnp.repeat(logsnr, length // logsnr.shape[-1], axis=-1)
        x = self.noising.alpha(level)[..., None] * self.clean(inputs.codes) + inputs.noise
        scale = jnp.exp(0.5 * jax.nn.log_sigmoid(level) - self.noising.log_alpha(level))

        def kernel(name: str, *shape: int, axes: tuple, init=nn.initializers.zeros) -> Array:
            named = nn.with_logical_partitioning(init, axes)
            return self.param(name, named, shape, c.param_dtype)

        normal = nn.initializers.normal(self.size**-0.5)
        shape, axes = (length, self.size, c.width), (None, None, "embed")
        h = jnp.einsum(
            "nld,ldw->nlw",
            scale[..., None] * x,
            kernel("kernel_in", *shape, axes=axes, init=normal),
        )
        small = nn.initializers.normal(0.02)
        h = h + kernel("columns", length, c.width, axes=(None, "embed"), init=small)[None]
        h, _ = run_blocks(c, h, None, np.arange(length), level_condition(c, logsnr, length))
        f = jnp.einsum(
            "nlw,lw->nl", h, kernel("head_numbers", length, c.width, axes=(None, "embed"))
        )
        values = _OUTPUT.to_x0(self.noising, level, f, x[..., 0])
        own = cells.own()
        shape, axes = (length, c.width, own.shape[1]), (None, "embed", "vocab")
        logits = jnp.einsum("nlw,lwk->nlk", h, kernel("head", *shape, axes=axes))
        logits = jnp.where(own[None], logits, jnp.finfo(jnp.float32).min)
        mean = jax.nn.softmax(logits, axis=-1) @ self.embeddings() if own.shape[1] else 0.0 * x
        numbers = values[..., None] * cells.active(self.size)[None]
        mean = jnp.where(cells.is_numeric[None, :, None], numbers, mean)
        return Predicted(values, logits, mean)


def cell_losses(cells: Cells, predicted: Predicted, clean: Array, codes: Array) -> Array:
    """[N, L]: squared error of standardised numbers; cross-entropy over the column's entropy.

    Both rise with the noise to about 1, the loss of what is known without the row.
    """
    square = jnp.square(predicted.values - clean[..., 0])
    if not sum(cells.sizes):
        return square
    index = cells.index(codes)
    log_probs = jax.nn.log_softmax(predicted.logits, axis=-1)
    nats = -jnp.take_along_axis(log_probs, index[..., None], axis=-1)[..., 0]
    entropies = np.array([cells.entropies], np.float32)
    return jnp.where(cells.is_numeric[None], square, nats / entropies)


def cdtd_loss(law: Law, path: Path, cells: Cells, size: int) -> Objective:
    """Denoising loss of a table's rows, a noise level per column; "biased", no bound.

    ``raw`` is :func:`cell_losses`; ``weight`` is EDM's for numbers (that of the error of the
    network's own output) and 1 for categories. The levels should rise together, as those of
    ``variance.cdtd_warp`` do, which makes one warp for all columns, for each type, or for each.
    Stats are [V, B, L], the base noise of a row [L, D]. ValueError from ``spec`` for rows of
    another length. Mueller et al. 2025 (CDTD).
    """
    length = len(cells.sizes)
    process = Corruption(f"cells_{path.name}", _no_corruption, lambda n: (n, size), None)

    def loss(model_fn: ModelFn, batch: Batch, draw: Draw) -> LossStats:
        views = draw.u.shape[0]
        codes = repeat_views(jnp.asarray(batch.tokens), views)
        scored = repeat_views(jnp.asarray(batch.eligible), views)
        logsnr = flatten_views(law.icdf(draw.u))
        eps = normal_noise(flatten_views(draw.noise)) * cells.active(size)[None]
        inputs = NoisyCells(codes, path.sigma(logsnr)[..., None] * eps)
        predicted, clean = model_fn(inputs, logsnr, repeat_views(batch.documents, views))
        raw = jnp.where(scored, cell_losses(cells, predicted, clean, codes), 0.0)
        weight = jnp.exp(_OUTPUT.log_eps_weight(path, logsnr) + logsnr)
        weight = jnp.where(cells.is_numeric[None], weight, 1.0)
        raw, weight, count = (unflatten_views(a, views) for a in (raw, weight, scored))
        return LossStats(raw, weight, count.astype(jnp.float32), count.astype(jnp.int32))

    def spec(batch_size: int, row: int) -> DrawSpec:
        if row != length:
            raise ValueError(f"cdtd_loss is of rows of {length} columns, got {row}")
        return DrawSpec(batch_size, length, process.event_shape(row))

    return Objective("cdtd_loss", law, process, spec, loss, "biased")


def table_apply(model: TableTransformer):
    """``apply_fn(params, inputs: NoisyCells, logsnr, documents) -> (Predicted, clean vectors)``."""

    def apply_fn(params, inputs, logsnr=None, documents=None) -> tuple[Predicted, Array]:
        predicted = model.apply(params, inputs, logsnr, documents)
        codes = inputs.codes if isinstance(inputs, NoisyCells) else inputs
        return predicted, model.apply(params, codes, method="clean")

    return apply_fn


def cells_of(columns: Sequence[Any], num_values: int) -> Cells:
    """:class:`Cells` of ``data.Column``, of ``num_values`` codes of a number."""
    numbers = [c.is_numeric for c in columns]
    return Cells(
        tuple(len(c.categories) for c in columns),
        tuple((c.low - c.mean) / c.std if n else 0.0 for c, n in zip(columns, numbers)),
        tuple(c.step / c.std if n else 1.0 for c, n in zip(columns, numbers)),
        tuple(1.0 if n else c.entropy for c, n in zip(columns, numbers)),
        num_values,
    )


def _no_corruption(*_: Array) -> Corrupted:
    raise NotImplementedError("cdtd_loss: the network embeds cells and adds the noise")
