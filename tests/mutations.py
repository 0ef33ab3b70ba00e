"""Deliberate damage to quantities that move variance, speed or memory and never an expectation.

    python tests/mutations.py [part of a name ...]

Each mutation is a textual edit of a copy of the package in a temporary directory, where the tests
that should notice it are run. Prints the table of ``tests/README.md``; exit status 1 if the tests
fail undamaged, or if a mutation survives or breaks more than it should (an error instead of a
failed test). ``tests/test_mutations.py`` checks that every edit still fits its file.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]


class Mutation(NamedTuple):
    """Replace ``old``, which occurs once in ``mdm_jax/<file>``, by ``new``; run ``tests``."""

    name: str
    file: str
    old: str
    new: str
    tests: str


DENSITIES = "tests/unit/variance/test_variance_densities.py"
PPOTS = "tests/unit/variance/test_variance_ppots.py"
SLOPES = "tests/unit/variance/test_ppots_slopes.py"
COUPLINGS = "tests/unit/variance/test_variance_couplings.py"
STRATA = "tests/unit/variance/test_variance_strata.py"
VIEWS = "tests/unit/variance/test_variance_views.py"
BLOCKS = "tests/unit/variance/test_stratified_blocks.py"
ADAPTIVE = "tests/unit/variance/test_adaptive_levels.py"
LEARNING = "tests/unit/variance/test_learning_steps.py"
ZOO = "tests/laws/test_variance_zoo.py"
STEP = "tests/unit/training/test_training_step.py"
COMPILED = "tests/unit/training/test_compiled_loop.py"
OPTIMIZERS = "tests/unit/training/test_training_optimizers.py"
CROSS_ENTROPY = "tests/unit/models/test_cross_entropy.py"
CACHE = "tests/unit/models/test_kv_cache.py"
ATTENTION = "tests/unit/models/test_attention.py"
PIPELINE = "tests/unit/data/test_pipeline.py"
PACKING = "tests/unit/data/test_packing.py"
SOURCES = "tests/unit/data/test_rows.py"
DECODING = "tests/unit/hub/test_decoding.py"
POSITIONS = "tests/unit/samplers/test_samplers_positions.py"
GRIDS = "tests/unit/schedules/test_schedules_grids.py"
LIKELIHOOD = "tests/laws/test_likelihood.py"
SUBSETS = "tests/laws/test_subset_likelihood.py"
SEQUENTIAL = "tests/laws/test_sequential.py"
MONITORS = "tests/laws/test_monitors.py"
TOKEN_DEPENDENT = "tests/laws/test_token_dependent.py"
CHOICE = "tests/laws/test_choice.py"
STOPPING = "tests/unit/training/test_stopping.py"
PREFERENCE = "tests/laws/test_alignment_preference.py"
OF_ANSWERS = "tests/laws/test_alignment_variance.py"
ANSWERS = "tests/unit/alignment/test_alignment_training.py"
ALIGNMENT = "tests/unit/alignment/test_alignment_properties.py"
ALIGNED_RUNS = "tests/runs/test_alignment_runs.py"
ALIGNMENT_TABLES = "tests/unit/launch/test_alignment_tables.py"

MUTATIONS = [
    # What the default chain learns from.
    Mutation(
        "gradient norm at the logits: 1 - p for (1 - p)^2",
        "objectives/losses.py",
        "squares = jnp.square(jnp.expm1(-jax.lax.stop_gradient(nats)))",
        "squares = -jnp.expm1(-jax.lax.stop_gradient(nats))",
        SLOPES,
    ),
    Mutation(
        "gradient norm at the logits: weight per element not squared",
        "objectives/losses.py",
        "squares * jnp.square(factor)",
        "squares * factor",
        SLOPES,
    ),
    Mutation(
        "gradient norm of a row: no root",
        "variance/ppots.py",
        "jnp.sqrt(stats.gradient_norms) * stats.weight",
        "stats.gradient_norms * stats.weight",
        SLOPES,
    ),
    Mutation(
        "gradient norm of a row: no weight",
        "variance/ppots.py",
        "jnp.sqrt(stats.gradient_norms) * stats.weight",
        "jnp.sqrt(stats.gradient_norms)",
        SLOPES,
    ),
    # Densities and floors.
    Mutation(
        "density: the moment for its root",
        "variance/densities.py",
        "root = jnp.sqrt(jnp.maximum(moment, 0.0))",
        "root = jnp.maximum(moment, 0.0)",
        PPOTS,
    ),
    Mutation(
        "density: bin widths left out",
        "variance/densities.py",
        "share = widths * (root / jnp.max(root))",
        "share = root / jnp.max(root)",
        PPOTS,
    ),
    Mutation(
        "floor: half as high",
        "variance/densities.py",
        "jnp.asarray(widths), jnp.asarray(floor, jnp.float32))",
        "jnp.asarray(widths), jnp.asarray(floor / 2, jnp.float32))",
        f"{PPOTS} {SLOPES}",
    ),
    Mutation(
        "ceiling of the weights: narrow cells rounded down to the grid",
        "variance/densities.py",
        "jnp.maximum(jnp.ceil(floor * widths), 1.0)",
        "jnp.maximum(jnp.floor(floor * widths), 1.0)",
        DENSITIES,
    ),
    Mutation(
        "ceiling of the weights: no cell kept above its floor",
        "variance/densities.py",
        "jnp.maximum(jnp.ceil(floor * widths), 1.0)",
        "jnp.ones_like(widths)",
        DENSITIES,
    ),
    Mutation(
        "floor of the parametric density: none",
        "variance/ppots.py",
        "epr_curve(p, 1.0 - quantiles) @ weights, floor)",
        "epr_curve(p, 1.0 - quantiles) @ weights)",
        PPOTS,
    ),
    Mutation(
        "parametric curve: mean and variance added, not in squares",
        "variance/ppots.py",
        "return np.sqrt(mean**2 + variance)",
        "return np.abs(mean) + np.sqrt(variance)",
        PPOTS,
    ),
    Mutation(
        "edges: even in the rate, not in its logarithm",
        "variance/densities.py",
        "rates = np.geomspace(1.0, smallest_rate, num_bins)",
        "rates = np.linspace(1.0, smallest_rate, num_bins)",
        DENSITIES,
    ),
    Mutation(
        "target: level variance without g^2 taken off",
        "variance/densities.py",
        "jnp.maximum(jnp.asarray(moments.second) - jnp.square(moments.mean), 0.0)",
        "jnp.asarray(moments.second)",
        PPOTS,
    ),
    Mutation(
        "moments: not per eligible element",
        "variance/densities.py",
        "return _per_level(draw, stats.raw * stats.weight, stats.eligible)",
        "return _per_level(draw, stats.raw * stats.weight, jnp.sign(stats.eligible))",
        f"{PPOTS} {SLOPES}",
    ),
    Mutation(
        "moments: views at one level not averaged before squaring",
        "variance/densities.py",
        "joined = jnp.sum(same * value[None], axis=1) / views",
        "joined = value",
        PPOTS,
    ),
    Mutation(
        "moments: a pair of views counts twice",
        "variance/densities.py",
        "jnp.where(empty, 0.0, 1.0 / views)",
        "jnp.where(empty, 0.0, 1.0)",
        PPOTS,
    ),
    Mutation(
        "moments: a bin never visited counts as zero",
        "variance/ppots.py",
        "jnp.where(visited, state.weight, 1.0), average)",
        "jnp.where(visited, state.weight, 1.0), 0.0)",
        PPOTS,
    ),
    Mutation(
        "moments: the average over visited bins is not by weight",
        "variance/ppots.py",
        "average = jnp.sum(value) / jnp.where(total > 0, total, 1.0)",
        "average = jnp.mean(value / jnp.maximum(state.weight, 1e-9))",
        PPOTS,
    ),
    Mutation(
        "mixture of clipped and full rates: another share",
        "variance/warps.py",
        "piecewise_density(edges, masses[kept], share)",
        "piecewise_density(edges, masses[kept], share**2)",
        DENSITIES,
    ),
    Mutation(
        "learners: moved by batches that teach nothing",
        "variance/warps.py",
        "jnp.where(taught, new, old), changes, held)",
        "jnp.where(taught | True, new, old), changes, held)",
        ADAPTIVE,
    ),
    Mutation(
        "log-uniform rates: foot at twice the rate",
        "variance/warps.py",
        "return importance(LogUniformDensity(smallest_rate))",
        "return importance(LogUniformDensity(min(2 * smallest_rate, 0.99)))",
        f"{DENSITIES} {ZOO}",
    ),
    # Learning: warm-up, decay, histories.
    Mutation(
        "warm-up of P-POTS: a step too long",
        "variance/ppots.py",
        "state.steps < warmup_steps",
        "state.steps <= warmup_steps",
        PPOTS,
    ),
    Mutation(
        "warm-up of P-POTS: none",
        "variance/ppots.py",
        "share = jnp.where(state.steps < warmup_steps, 1.0, floor)",
        "share = jnp.float32(floor)",
        PPOTS,
    ),
    Mutation(
        "decay of P-POTS: per step, not per draw of a bin",
        "variance/ppots.py",
        'return running_bins("ppots", edges, lambda count: decay**count,',
        'return running_bins("ppots", edges, lambda count: decay ** jnp.minimum(count, 1),',
        PPOTS,
    ),
    Mutation(
        "decay of the default chain: per step, not per draw of a bin",
        "variance/ppots.py",
        "keep = lambda count: decay**count",
        "keep = lambda count: decay ** jnp.minimum(count, 1)",
        SLOPES,
    ),
    Mutation(
        "decay of EMA bins: of bins not visited, too",
        "variance/learned/bins.py",
        "return jnp.where(count > 0, decay, 1.0)",
        "return jnp.full_like(count, decay)",
        ADAPTIVE,
    ),
    Mutation(
        "EMA bins: the second moment for the squared mean",
        "variance/learned/bins.py",
        "target: Target = squared_mean,",
        "target: Target = lambda moments: moments.second,",
        ADAPTIVE,
    ),
    Mutation(
        "warm-up of the loss history: one full bin is enough",
        "variance/learned/bins.py",
        "jnp.where(jnp.all(state.count >= length), floor, 1.0)",
        "jnp.where(jnp.any(state.count >= length), floor, 1.0)",
        ADAPTIVE,
    ),
    Mutation(
        "loss history: the first values of a batch stay, not the latest",
        "variance/learned/bins.py",
        "stays = entered & (own > last[bins] - length)",
        "stays = entered & (own <= length)",
        ADAPTIVE,
    ),
    Mutation(
        "loss history: the mean for the root mean square",
        "variance/learned/bins.py",
        "jnp.mean(jnp.square(state.values), axis=1)",
        "jnp.square(jnp.mean(state.values, axis=1))",
        ADAPTIVE,
    ),
    Mutation(
        "learned quantile: no baseline in the score",
        "variance/learned/quantile_net.py",
        "state.net, relative - 1.0, losses.mean",
        "state.net, relative, losses.mean",
        LEARNING,
    ),
    Mutation(
        "learned quantile: normalised by this batch, not by the past",
        "variance/learned/quantile_net.py",
        "past = jnp.where(state.weight > 0, state.square / jnp.maximum(state.weight, 1e-30), mean)",
        "past = mean",
        LEARNING,
    ),
    Mutation(
        "learned quantile: the normaliser's decay",
        "variance/learned/quantile_net.py",
        "decay * state.square + (1 - decay) * mean",
        "(1 - decay) * state.square + decay * mean",
        LEARNING,
    ),
    Mutation(
        "time warping: misfit not divided by the density",
        "variance/learned/curves.py",
        "jnp.square(curve.value(parameters, xi) - loss) * jnp.exp(-drawn)",
        "jnp.square(curve.value(parameters, xi) - loss)",
        ADAPTIVE,
    ),
    Mutation(
        "time warping: no penalty on the noisy end",
        "variance/learned/curves.py",
        "_END_PENALTY = 3e-3",
        "_END_PENALTY = 0.0",
        ADAPTIVE,
    ),
    Mutation(
        "time warping: levels from the fitted curve, not from its average",
        "variance/learned/curves.py",
        "noise = per_level(curve.quantile, state.averages, 1.0 - current.u)",
        "noise = per_level(curve.quantile, state.curves, 1.0 - current.u)",
        ADAPTIVE,
    ),
    Mutation(
        "time warping: decay of the averages",
        "variance/learned/curves.py",
        "optax.incremental_update(curves, start[1], 1.0 - decay)",
        "optax.incremental_update(curves, start[1], decay)",
        LEARNING,
    ),
    Mutation(
        "time warping: Adam's second decay",
        "variance/learned/curves.py",
        "optax.adam(learning_rate, b2=0.99)",
        "optax.adam(learning_rate)",
        LEARNING,
    ),
    Mutation(
        "learned weighting: half the learning rate",
        "variance/learned/uncertainty.py",
        "optimizer = optax.adam(learning_rate)",
        "optimizer = optax.adam(learning_rate / 2)",
        LEARNING,
    ),
    Mutation(
        "learned quantile: half the learning rate",
        "variance/learned/quantile_net.py",
        "optimizer = optax.adam(learning_rate)",
        "optimizer = optax.adam(learning_rate / 2)",
        LEARNING,
    ),
    # Couplings and views.
    Mutation(
        "strata: in the order of the rows",
        "variance/couplings.py",
        'cells = permuted_rows(stream(key, "cells"), jnp.arange(rows), spec.num_levels)',
        "cells = jnp.broadcast_to(jnp.arange(rows)[:, None], (rows, spec.num_levels))",
        COUPLINGS,
    ),
    Mutation(
        "strata: drawn with replacement",
        "variance/couplings.py",
        'cells = permuted_rows(stream(key, "cells"), jnp.arange(rows), spec.num_levels)',
        'cells = jax.random.randint(stream(key, "cells"), (rows, spec.num_levels), 0, rows)',
        COUPLINGS,
    ),
    Mutation(
        "systematic levels: an offset per row",
        "variance/couplings.py",
        'offset = jax.random.randint(stream(key, "offset"), (1, spec.num_levels), 0, size)',
        'offset = jax.random.randint(stream(key, "offset"), (rows, spec.num_levels), 0, size)',
        COUPLINGS,
    ),
    Mutation(
        "antithetic pairs: the same rows in every batch",
        "variance/couplings.py",
        'return jax.random.permutation(stream(key, "pairs"), values, axis=0, independent=True)',
        "return values",
        STRATA,
    ),
    Mutation(
        "coarse strata: half as many cells",
        "variance/couplings.py",
        "math.isqrt(spec.batch_size) if cells is None else cells",
        "max(1, math.isqrt(spec.batch_size) // 2) if cells is None else cells",
        STRATA,
    ),
    Mutation(
        "strata over blocks: a row's blocks in one stratum",
        "variance/couplings.py",
        'permuted_rows(stream(key, "strata"), jnp.arange(rows), blocks)',
        'jnp.tile(permuted_rows(stream(key, "strata"), jnp.arange(rows), 1), (1, blocks))',
        BLOCKS,
    ),
    Mutation(
        "levels of a row: no strata of the row",
        "variance/views.py",
        'permuted_rows(stream(key, "strata"), strata, levels, axis=0)',
        'jax.random.randint(stream(key, "strata"), (*grid, levels), 0, views)',
        STRATA,
    ),
    Mutation(
        "complement: the same masks",
        "variance/couplings.py",
        "noise=jnp.concatenate([current.noise, 1.0 - current.noise])",
        "noise=jnp.concatenate([current.noise, current.noise])",
        VIEWS,
    ),
    Mutation(
        "MIRROR: the same view twice",
        "variance/views.py",
        "replicate_views(current, [current.noise, 1.0 - current.noise])",
        "replicate_views(current, [current.noise, current.noise])",
        f"{COUPLINGS} {VIEWS}",
    ),
    Mutation(
        "rotation: by half as much",
        "variance/views.py",
        "shifts = ((j << GRID_BITS) // views for j in range(views))",
        "shifts = ((j << GRID_BITS) // (2 * views) for j in range(views))",
        VIEWS,
    ),
    Mutation(
        "rotation of ranks: by one place",
        "variance/views.py",
        "index = (rank - view * size // views) % size",
        "index = (rank - view) % size",
        VIEWS,
    ),
    Mutation(
        "repetition: further views share their noise",
        "variance/views.py",
        'open_uniform(stream(key, f"view {i}"), noise.shape) for i in range(1, views)',
        'open_uniform(stream(key, "view"), noise.shape) for _ in range(1, views)',
        VIEWS,
    ),
    # The training step.
    Mutation(
        "EMA of the parameters: no shorter at first",
        "training/step.py",
        "decay = jnp.minimum(ema_decay, (1.0 + done) / (10.0 + done))",
        "decay = jnp.asarray(ema_decay)",
        STEP,
    ),
    Mutation(
        "EMA of the parameters: decay and gain exchanged",
        "training/ema.py",
        "a + (1 - decay) * (p - a)",
        "a + decay * (p - a)",
        STEP,
    ),
    Mutation(
        "EMA as an offset: moved the wrong way",
        "training/ema.py",
        "offset.astype(jnp.float32) + (before - after).astype(jnp.float32)",
        "offset.astype(jnp.float32) - (before - after).astype(jnp.float32)",
        "tests/unit/training",
    ),
    Mutation(
        "microbatches: each divided by its own tokens",
        "objectives/objective.py",
        "return jax.tree.map(jnp.add, total, (gradients, sums)), stats",
        "gradients = jax.tree.map(lambda g: g / jnp.maximum(sums.eligible, 1.0), gradients)\n"
        "        return jax.tree.map(jnp.add, total, (gradients, sums)), stats",
        STEP,
    ),
    Mutation(
        "microbatches: rows in contiguous parts, which moves them between devices",
        "draws.py",
        "shape = (*leaf.shape[:axis], rows // parts, parts, *leaf.shape[axis + 1 :])\n"
        "        return jnp.moveaxis(leaf.reshape(shape), axis + 1, 0)",
        "shape = (*leaf.shape[:axis], parts, rows // parts, *leaf.shape[axis + 1 :])\n"
        "        return jnp.moveaxis(leaf.reshape(shape), axis, 0)",
        "tests/unit/training",
    ),
    Mutation(
        "learning rate: no warm-up",
        "training/optimizers.py",
        "0.0 if warmup_steps else peak, peak, warmup_steps",
        "peak, peak, warmup_steps",
        OPTIMIZERS,
    ),
    Mutation(
        "learning rate: ends at zero",
        "training/optimizers.py",
        "total_steps, peak * final_fraction",
        "total_steps, 0.0",
        OPTIMIZERS,
    ),
    Mutation(
        "weight decay: of norms and biases, too",
        "training/optimizers.py",
        'bool({"kernel", "embedding", TRAINED} & _names(path))',
        "bool(_names(path))",
        OPTIMIZERS,
    ),
    Mutation(
        "Muon: of the output head, too",
        "training/optimizers.py",
        '"muon" if {"kernel", TRAINED} & names and "head" not in names else "adam"',
        '"muon" if {"kernel", TRAINED} & names else "adam"',
        OPTIMIZERS,
    ),
    Mutation(
        "Muon: matrices orthogonalised in shards",
        "training/optimizers.py",
        'map_stack(function, x, "matrices") if x.ndim == 3 else function(x)',
        "function(x)",
        OPTIMIZERS,
    ),
    Mutation(
        "scanned layers: the backward pass keeps derivatives of activations",
        "models/layers.py",
        "return jax.checkpoint(function, prevent_cse=False)",
        "return function",
        "tests/unit/models/test_rematerialisation.py",
    ),
    Mutation(
        "mixture: every device sorts the tokens of all",
        "models/moe.py",
        "return map_shards(self._mix, names, x.astype(self.dtype), router, bias, gate, up, down)",
        "return self._mix(x.astype(self.dtype), router, bias, gate, up, down)",
        "tests/unit/models/test_moe.py",
    ),
    Mutation(
        "mixture: blocks for equal experts alone",
        "models/moe.py",
        "count = min(rows, rows // block + experts)",
        "count = min(rows, rows // block + 2)",
        "tests/unit/models/test_moe.py",
    ),
    Mutation(
        "monitors: the baseline takes nothing off",
        "objectives/objective.py",
        "jnp.mean(baseline.mean) - jnp.exp(draw.log_weight) * level",
        "0.0 * level",
        f"{TOKEN_DEPENDENT} {MONITORS}",
    ),
    Mutation(
        "monitors: a bin not visited decays",
        "training/monitors.py",
        "keep = jnp.where(sums[4] > 0, decay, 1.0)",
        "keep = decay",
        MONITORS,
    ),
    # Data: order, prefetching, packing.
    Mutation(
        "data: in the order of the file",
        "data/pipeline.py",
        ".seed(part_seed(seed, number)).shuffle().repeat(None)",
        ".seed(part_seed(seed, number)).repeat(None)",
        PIPELINE,
    ),
    Mutation(
        "data: every epoch in the same order",
        "data/pipeline.py",
        ".shuffle().repeat(None)",
        ".shuffle().repeat(None, reseed_each_epoch=False)",
        PIPELINE,
    ),
    Mutation(
        "prefetch: a batch more than asked for",
        "data/pipeline.py",
        "prefetch_buffer_size=prefetch\n",
        "prefetch_buffer_size=prefetch + 1\n",
        PIPELINE,
    ),
    Mutation(
        "evaluation of some rows: the first ones",
        "data/pipeline.py",
        "selected = np.arange(count, dtype=np.int64) * size // count",
        "selected = np.arange(count, dtype=np.int64)",
        PIPELINE,
    ),
    Mutation(
        "packing: each piece in a row of its own",
        "data/packing.py",
        "numbers = first_fit(aligned(ends - starts, layout.align), length)",
        "numbers = np.arange(len(starts))",
        PACKING,
    ),
    Mutation(
        "packing: rows with a token to spare count as full",
        "data/packing.py",
        "room[node] -= size\n",
        "room[node] -= size + 1\n",
        PACKING,
    ),
    Mutation(
        "noise by example: every visit draws the same",
        "data/rows.py",
        "(visits[:, None] * count + numbers)",
        "(0 * visits[:, None] * count + numbers)",
        SOURCES,
    ),
    Mutation(
        "noise by example: sources draw the same",
        "data/rows.py",
        "(part << 24) | positions",
        "(0 * part << 24) | positions",
        SOURCES,
    ),
    Mutation(
        "random cuts: the same on every visit",
        "data/rows.py",
        "int(visits[i])",
        "0 * int(visits[i])",
        SOURCES,
    ),
    # Logits, attention and caches: what is computed, held and kept.
    Mutation(
        "cross-entropy: all positions, not the masked ones",
        "models/cross_entropy.py",
        "lax.fori_loop(0, jnp.max(-(-count // chunk)), add_chunk, empty)",
        "lax.fori_loop(0, order.shape[1] // chunk, add_chunk, empty)",
        CROSS_ENTROPY,
    ),
    Mutation(
        "cross-entropy: masked positions not brought to the front",
        "models/cross_entropy.py",
        "order = jnp.argsort(~where, axis=1, stable=True)",
        "order = jnp.argsort(where, axis=1, stable=True)",
        CROSS_ENTROPY,
    ),
    Mutation(
        "cross-entropy: chunks of a half of the positions",
        "models/cross_entropy.py",
        "-(-positions // 8)",
        "-(-positions // 2)",
        f"{CROSS_ENTROPY} tests/unit/models/test_readout.py",
    ),
    Mutation(
        "cross-entropy: chunks sixteen times the cache",
        "models/cross_entropy.py",
        "budget = 2**25 if",
        "budget = 2**29 if",
        f"{CROSS_ENTROPY} tests/unit/models/test_readout.py",
    ),
    Mutation(
        "cross-entropy: one group for all devices",
        "models/cross_entropy.py",
        "groups = math.gcd(readout.chunking.groups, where.shape[0])",
        "groups = 1",
        CROSS_ENTROPY,
    ),
    Mutation(
        "cross-entropy: always a second pass",
        "models/cross_entropy.py",
        "fits = jnp.all(jnp.abs(cotangent - scale * expected) <= 1e-6 * jnp.abs(cotangent))",
        "fits = jnp.zeros((), bool)",
        CROSS_ENTROPY,
    ),
    Mutation(
        "cross-entropy: loss weights never given",
        "models/cross_entropy.py",
        "if len(shapes) != 1 or not isinstance(shapes[0], Readout):",
        "if True:",
        "tests/unit/models/test_loss_weights.py",
    ),
    Mutation(
        "products: narrow batches in any layout",
        "models/products.py",
        "if left_batch and dtype.itemsize < 4:",
        "if False:",
        "tests/unit/models/test_products.py",
    ),
    Mutation(
        "attention: queries, keys and values as slices",
        "models/transformer.py",
        "jnp.split(y, len(names), axis=2)",
        "[y[:, :, i : i + 1] for i in range(len(names))]",
        "tests/unit/models/test_transformer.py",
    ),
    Mutation(
        "attention: all scores at once",
        "models/attention.py",
        "at_most = max(1, min(shard_rows, SCORES_AT_ONCE // scores))",
        "at_most = shard_rows",
        ATTENTION,
    ),
    Mutation(
        "attention: nothing kept for the backward pass",
        "models/attention.py",
        "policy = jax.checkpoint_policies.save_only_these_names(_KEPT)",
        "policy = jax.checkpoint_policies.nothing_saveable",
        ATTENTION,
    ),
    Mutation(
        "attention: on CPUs not by recomputation",
        "models/attention.py",
        'if backend == "cpu":\n        return "recompute"',
        'if backend == "cpu":\n        return "einsum"',
        ATTENTION,
    ),
    Mutation(
        "attention: block training as one square",
        "models/attention.py",
        "isinstance(rule, Rule) and isinstance(rule.pattern, BlockTraining):\n        y = _block",
        "isinstance(rule, str):\n        y = _block",
        ATTENTION,
    ),
    Mutation(
        "KV cache of blocks: a block too many",
        "models/decoders.py",
        "max(remembered - 1, 1) * block_size",
        "remembered * block_size",
        CACHE,
    ),
    Mutation(
        "KV cache of tokens: a token too many",
        "models/decoders.py",
        "cache = new_cache(model.config, num_rows, max(remembered - 1, 1))",
        "cache = new_cache(model.config, num_rows, remembered)",
        CACHE,
    ),
    Mutation(
        "KV cache of tokens: windows forgotten",
        "models/decoders.py",
        "remembered = length if window is None else min(window, length)",
        "remembered = length",
        CACHE,
    ),
    # Samplers and likelihoods: forward passes and designs.
    Mutation(
        "sampling: no early stop",
        "samplers/sampler.py",
        "return (index < num_steps) & ~jnp.all(sampler.finished(state, mask_id))",
        "return index < num_steps",
        "tests/laws/test_samplers.py tests/unit/samplers/test_samplers_canvas.py",
    ),
    Mutation(
        "ancestral sampling: a pass where nothing is revealed",
        "samplers/ancestral.py",
        "tokens = jax.lax.cond(jnp.any(reveal), fill, lambda tokens: tokens, state.tokens)",
        "tokens = fill(state.tokens)",
        "tests/laws/test_samplers.py",
    ),
    Mutation(
        "cached ancestral sampling: all rows in every step",
        "samplers/ancestral.py",
        "needed = jnp.any(reveal, axis=-1)",
        "needed = jnp.any(reveal, axis=-1) | True",
        "tests/unit/samplers/test_samplers_cached.py",
    ),
    Mutation(
        "ancestral sampling: logits of all positions",
        "samplers/ancestral.py",
        "return max(_MIN_POSITIONS, 2 * length // context.num_steps)",
        "return length",
        POSITIONS,
    ),
    Mutation(
        "filling blocks: logits of all positions",
        "samplers/by_score.py",
        "token_filter, best=best, size=block_size)",
        "token_filter, best=best, size=None)",
        POSITIONS,
    ),
    Mutation(
        "decoding: a program for every number of finished blocks",
        "hub/decoding.py",
        "min(sizes) // unit * unit",
        "min(sizes) // size * size",
        DECODING,
    ),
    Mutation(
        "ancestral sampling: positions read beyond those revealed",
        "samplers/sampler.py",
        "return repeat(-(-jnp.max(jnp.sum(where, axis=-1)) // size), run, initial)",
        "return repeat(-(-length // size), run, initial)",
        POSITIONS,
    ),
    Mutation(
        "approximate caches: a token that was written is never run again",
        "samplers/caching.py",
        "return masked | changed",
        "return masked",
        "tests/unit/samplers/test_approximate_caches.py",
    ),
    Mutation(
        "streams: a row begins at the step of the one before it",
        "samplers/stream.py",
        "(jnp.where(arriving, 0, count) for count in (batch.index, batch.steps))",
        "(batch.index, batch.steps)",
        "tests/unit/samplers/test_streams.py",
    ),
    Mutation(
        "remasking: a pass where nothing is revealed",
        "samplers/remasking.py",
        "filled, probability = jax.lax.cond(jnp.any(fill), run, skip, tokens)",
        "filled, probability = run(tokens)",
        "tests/laws/test_samplers_remdm.py",
    ),
    Mutation(
        "sampling of blocks: the last one is appended, too",
        "samplers/blocks.py",
        "index < num_blocks - 1,\n",
        "index < num_blocks,\n",
        "tests/laws/test_block_sampling.py",
    ),
    Mutation(
        "sampling of blocks: the prefix block by block",
        "samplers/blocks.py",
        "start = prefix // size * size",
        "start = 0 * prefix",
        "tests/laws/test_block_sampling.py",
    ),
    Mutation(
        "sampling of tokens: the prefix token by token",
        "samplers/next_token.py",
        "    if prefix == length:",
        "    prefix = 0\n    if prefix == length:",
        "tests/unit/samplers/test_next_token_sampling.py",
    ),
    Mutation(
        "likelihood: all views of a row with one count",
        "likelihood/subsets.py",
        "return 1 + (first_count - 1 + point * n // points) % n",
        "return 1 + (first_count - 1 + 0 * point * n // points) % n",
        LIKELIHOOD,
    ),
    Mutation(
        "likelihood: views of one count share a permutation",
        "likelihood/subsets.py",
        "return view - first_view",
        "return 0 * (view - first_view)",
        LIKELIHOOD,
    ),
    Mutation(
        "likelihood of subsets: fixed rows computed in every replicate",
        "likelihood/estimators.py",
        "for run in range(1 if fixed else replicates)",
        "for run in range(replicates)",
        SUBSETS,
    ),
    Mutation(
        "likelihood of uniform tokens: levels not stratified",
        "likelihood/subsets.py",
        "u = (point + open_uniform(own, ())) / points",
        "u = open_uniform(own, ())",
        "tests/laws/test_uniform_likelihood.py",
    ),
    Mutation(
        "likelihood of single tokens: as many passes as of blocks",
        "likelihood/bounds.py",
        "return every_subset(block_size) if short else design",
        "return design",
        "tests/laws/test_block_likelihood.py",
    ),
    # Grids.
    Mutation(
        "cosine grid: even times",
        "schedules/grids.py",
        "return _evaluate(schedule, lambda: schedule.logsnr(time, rest))",
        "return _evaluate(schedule, lambda: schedule.logsnr(left / n, done / n))",
        GRIDS,
    ),
    Mutation(
        "grid of a learned density: even quantiles",
        "schedules/grids.py",
        "mass = np.diff(edges) * np.exp(value - value.max())",
        "mass = np.diff(edges) * (value > -np.inf)",
        GRIDS,
    ),
    Mutation(
        "default chain: no strata",
        "launch/config.py",
        '("stratified", "ppots_slopes"),',
        '("ppots_slopes",),',
        LEARNING,
    ),
    Mutation(
        "default chain: a floor of a fiftieth",
        "variance/ppots.py",
        "floor: Floor = 0.2,",
        "floor: Floor = 0.02,",
        LEARNING,
    ),
    Mutation(
        "default chain: no warm-up",
        "variance/ppots.py",
        "warmup_steps: WarmupSteps = 50,",
        "warmup_steps: WarmupSteps = 0,",
        LEARNING,
    ),
    Mutation(
        "default chain: memory of ten draws",
        "variance/ppots.py",
        "decay: Decay = 0.99,",
        "decay: Decay = 0.9,",
        LEARNING,
    ),
    Mutation(
        "Rao-Blackwell weights: those of Bernoulli masks",
        "corruption/masked.py",
        'return _averaged_weight("rao_blackwell", mask_id, log_weight)',
        'return bernoulli(mask_id)._replace(name="rao_blackwell")',
        "tests/laws/test_corruption.py",
    ),
    Mutation(
        "harmonic counts: uniform ones",
        "likelihood/subsets.py",
        'return counts(passes, "harmonic", "independent")',
        'return counts(passes, "independent", "independent")',
        SUBSETS,
    ),
    Mutation(
        "likelihood of uniform tokens: levels even in the rate",
        "likelihood/bounds.py",
        "law = schedules.law_of(masked.power(3.0))",
        "law = schedules.law_of(masked.power(1.0))",
        "tests/laws/test_uniform_likelihood.py",
    ),
    Mutation(
        "likelihood: batches without an eligible token run, too",
        "likelihood/estimators.py",
        "if rows.batch_index.size:",
        "if rows is not None:",
        LIKELIHOOD,
    ),
    Mutation(
        "likelihood: one replicate for all",
        "likelihood/estimators.py",
        "jnp.broadcast_to(replicate, keys.shape)",
        "jnp.broadcast_to(0 * replicate, keys.shape)",
        LIKELIHOOD,
    ),
    Mutation(
        "sequential stopping: rows that are settled go on",
        "likelihood/stopping.py",
        "active = targets.rows(unsettled)",
        "active = targets.rows(unsettled | True)",
        SEQUENTIAL,
    ),
    Mutation(
        "sequential stopping: all of the level at the first look",
        "likelihood/stopping.py",
        "spent = level * math.log1p((math.e - 1) * size / looks[-1])",
        "spent = level",
        SEQUENTIAL,
    ),
    Mutation(
        "training loop: metrics fetched at every step",
        "training/loop.py",
        "loop.pending.append(metrics)",
        "loop.pending.append(metrics)\n                loop.collect()",
        COMPILED,
    ),
    Mutation(
        "training step: the old state is kept in memory",
        "training/step.py",
        "jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))",
        "jax.jit(step, out_shardings=(shardings, None))",
        COMPILED,
    ),
    Mutation(
        "narrow moments: decayed in bfloat16",
        "training/moments.py",
        "optimizer.update(updates, _cast(state, wide), params)",
        "optimizer.update(updates, state, params)",
        COMPILED,
    ),
    Mutation(
        "training step: updates are held until they are known to be finite",
        "training/step.py",
        "if recompute_update:",
        "if False:",
        STEP,
    ),
    Mutation(
        "gradients of the readout: all devices get all of them",
        "models/cross_entropy.py",
        "if weights.shape[1 + width] % ways or ways == 1:",
        "if True:",
        CROSS_ENTROPY,
    ),
    Mutation(
        "search of plans: offloading though something else fits",
        "launch/ahead/command.py",
        "(made.host > 0, _least(made, chip))",
        "(0, _least(made, chip))",
        "tests/runs/test_ahead.py",
    ),
    Mutation(
        "moments in 8 bits: rounded to the nearest code",
        "training/moments.py",
        "drawn = _uniform(key, x.shape)",
        "drawn = 0.5",
        "tests/unit/training/test_moments.py",
    ),
    Mutation(
        "sharded vocabulary: the readout is gathered",
        "models/cross_entropy.py",
        "axes = (VOCABULARY_AXIS, None) if tied else (None, VOCABULARY_AXIS)",
        "axes = (None, None)",
        CROSS_ENTROPY,
    ),
    Mutation(
        "rematerialisation: heads are not kept",
        "models/layers.py",
        "jax.checkpoint_policies.save_only_these_names(_HEADS)",
        "jax.checkpoint_policies.nothing_saveable",
        "tests/unit/models/test_rematerialisation.py",
    ),
    Mutation(
        "microbatches of a CPU: one for each row",
        "launch/start/scaled.py",
        "most = rows * length // CACHED_TOKENS",
        "most = rows",
        "tests/unit/launch/test_scaled.py",
    ),
    Mutation(
        "baseline: decay and gain exchanged",
        "objectives/objective.py",
        "new = jnp.where((count > 0) & finite, 1 - decay, 0.0)",
        "new = jnp.where((count > 0) & finite, decay, 0.0)",
        f"{TOKEN_DEPENDENT} {MONITORS}",
    ),
    Mutation(
        "gradient noise: no decay",
        "training/monitors.py",
        "keep = jnp.where(new > 0, jnp.minimum(decay, state.steps / (state.steps + 3)), 1.0)",
        "keep = 1.0",
        MONITORS,
    ),
    Mutation(
        "sampling: a readout is projected at all positions",
        "samplers/sampler.py",
        "if isinstance(denoise, Network):",
        "if isinstance(denoise, str):",
        POSITIONS,
    ),
    Mutation(
        "sliding windows: no overlap",
        "evaluation/windows.py",
        "end = min(scored + (stride if scored else window), len(tokens))",
        "end = min(scored + window, len(tokens))",
        "tests/unit/evaluation/test_sliding_windows.py",
    ),
    Mutation(
        "DPM-Solver++(2M): every step of first order",
        "gaussian/samplers/methods.py",
        "first_order |= context.index == context.num_steps - 1",
        "first_order |= context.index >= 0",
        "tests/unit/gaussian/test_gaussian_samplers.py",
    ),
    Mutation(
        "DPM-Solver++(3M): half of the second derivative",
        "gaussian/samplers/methods.py",
        "(h * h - 2 * (h + gone)) * bend",
        "(0.5 * h * h - (h + gone)) * bend",
        "tests/unit/gaussian/test_gaussian_samplers.py",
    ),
    Mutation(
        "grids: the search's luckiest draw is taken",
        "gaussian/samplers/step_search.py",
        "return min(found, key=second)",
        "return min(found, key=metric)",
        "tests/unit/gaussian/test_align_steps.py",
    ),
    Mutation(
        "Heun: Euler's steps",
        "gaussian/samplers/methods.py",
        "jax.lax.cond(clean, lambda: ahead, heun) if second_order else ahead",
        "ahead",
        "tests/laws/test_gaussian_flow_errors.py",
    ),
    Mutation(
        "Heun: a second call in the step to clean data",
        "gaussian/samplers/methods.py",
        "jax.lax.cond(clean, lambda: ahead, heun) if second_order else ahead",
        "jnp.where(clean, ahead, heun()) if second_order else ahead",
        "tests/unit/gaussian/test_gaussian_samplers.py",
    ),
    Mutation(
        "variance mode: adaptive methods measured without a warm-up",
        "launch/modes/measure.py",
        "itertools.islice(itertools.cycle(self.warm_up), self.settings.warm_up)",
        "()",
        "tests/runs/test_variance_mode.py",
    ),
    Mutation(
        "compilation cache: not used",
        "launch/command_line.py",
        'jax.config.update("jax_compilation_cache_dir", directory)',
        "pass",
        COMPILED,
    ),
    # What is chosen or ended by a measurement.
    Mutation(
        "choice of a chain: as many rows for two views as for one",
        "meter/choice.py",
        "size = passes // views",
        "size = passes",
        CHOICE,
    ),
    Mutation(
        "choice of a chain: intervals left out",
        "meter/choice.py",
        "tied = bool(difference <= reach * error)",
        "tied = False",
        CHOICE,
    ),
    Mutation(
        "choice of a chain: at any cost",
        "launch/auto/choose.py",
        "redraws = min((allowed - warm_up) // one, MOST_REDRAWS)",
        "redraws = MOST_REDRAWS",
        "tests/runs/test_auto.py",
    ),
    Mutation(
        "measured rows: sources of a mixture alike",
        "data/pipeline.py",
        "generator.choice(len(parts), count, p=weights)",
        "generator.choice(len(parts), count)",
        SOURCES,
    ),
    Mutation(
        "noise panel: after every step",
        "launch/reports/panel.py",
        "return math.ceil(settings.passes(group) / (settings.cost * size))",
        "return 1",
        "tests/unit/launch/test_report_page.py",
    ),
    Mutation(
        "noise panel: the first slots of every batch",
        "meter/panel.py",
        "jnp.lexsort((jax.random.uniform(key, eligible.shape), ~eligible))",
        "jnp.argsort(~eligible, stable=True)",
        "tests/laws/test_panel.py",
    ),
    Mutation(
        "batches of one length: divided by their own tokens",
        "training/step.py",
        "count = sums.eligible if tokens_per_batch is None else jnp.float32(tokens_per_batch)",
        "count = sums.eligible",
        "tests/unit/data/test_buckets.py",
    ),
    Mutation(
        "batches of one length: a row that just fits is put in the next",
        "data/rows.py",
        'ends = np.searchsorted(sizes[order], wanted, side="right")',
        'ends = np.searchsorted(sizes[order], [*wanted[:-1], wanted[-1] + 1], side="left")',
        "tests/unit/data/test_buckets.py",
    ),
    Mutation(
        "early stopping: the gain for its upper end",
        "training/stopping.py",
        "if self._largest(gain) <= self._settings.min_gain",
        "if gain.value <= self._settings.min_gain",
        STOPPING,
    ),
    # Preferences and rewards.
    Mutation(
        "alignment: a cross-fitted coefficient from all replicates",
        "alignment/preference.py",
        "others = (jnp.sum(fixed, axis=0, keepdims=True) - fixed) / (count - 1)",
        "others = jnp.broadcast_to(jnp.mean(fixed, axis=0, keepdims=True), fixed.shape)",
        f"{PREFERENCE}::test_cross_fitting_has_the_exact_direction_and_less_variance",
    ),
    Mutation(
        "alignment: the reference is evaluated on masks of its own",
        "launch/alignment/validation.py",
        "return self._likelihoods(self._reference, None)",
        'return [self._estimate(self._reference, stream(key, "own"), self._experiment.batches('
        "rows, self._experiment.config.evaluate.max_rows), None) for key, rows in self._answers]",
        f"{ALIGNED_RUNS}::test_policy_and_reference_are_evaluated_on_the_same_masks",
    ),
    Mutation(
        "alignment: updates of a round share a draw",
        "launch/alignment/rounds.py",
        "state = self._at(state, number * inner + j)",
        "state = self._at(state, number * inner)",
        f"{ALIGNED_RUNS}::test_every_update_of_every_round_has_a_draw_of_its_own",
    ),
    Mutation(
        "alignment: the old policy under the draw of the first update",
        "launch/alignment/rounds.py",
        "self._old(state, answers, number * inner + j, e.frozen)",
        "self._old(state, answers, number * inner, e.frozen)",
        f"{ALIGNED_RUNS}::test_every_update_of_every_round_has_a_draw_of_its_own",
    ),
    Mutation(
        "alignment: no gradient at a ratio of its clip",
        "alignment/policy.py",
        "advantages >= 0, ratio <= 1 + high, ratio >= 1 - low",
        "advantages >= 0, ratio < 1 + high, ratio > 1 - low",
        f"{ALIGNMENT}::test_ties_have_the_gradient_of_the_ratio",
    ),
    Mutation(
        "alignment: passes of an answer after the first step",
        "alignment/rollout.py",
        "return Written(tokens, steps, passes[-1])",
        "return Written(tokens, steps, passes[0])",
        f"{ANSWERS}::test_rollouts_write_as_the_sampler_does_and_record_the_step",
    ),
    Mutation(
        "alignment: a failed reward is not sent to other processes",
        "alignment/rewards.py",
        "            failure = error\n",
        "            raise error\n",
        f"{ANSWERS}::test_a_failed_reward_is_raised_in_every_process",
    ),
    Mutation(
        "alignment: scores of answers without weight are left out",
        "alignment/training.py",
        "stats, counted = _plain_stats(values, count), (count > 0).astype(values.dtype)",
        "stats, counted = _plain_stats(values, count), batch.weight * (count > 0)",
        f"{OF_ANSWERS}::test_scores_are_those_that_losses_are_made_of",
    ),
    Mutation(
        "alignment: errors of masks and levels as of independent parts",
        "meter/decompose.py",
        "noise = Estimate(*map(float, mean_over_rows(both, probes=both.ndim > 1)))",
        "noise = Estimate(float(both.mean()), math.hypot(*(float(mean_over_rows(part, "
        "probes=part.ndim > 1)[1]) for part in terms[:2])))",
        f"{OF_ANSWERS}::test_the_error_of_masks_and_levels_together",
    ),
    Mutation(
        "alignment: methods compared at the same draws, not passes",
        "launch/alignment/estimator_table.py",
        "cosine / math.sqrt(1 + noise * passes / budget)",
        "cosine / math.sqrt(1 + noise / budget)",
        f"{ALIGNMENT_TABLES}::test_methods_are_compared_at_the_same_passes",
    ),
    Mutation(
        "alignment: Monte Carlo errors without the factor of the jackknife",
        "alignment/held_out.py",
        "variances = (replicates - 1) * without.var(axis=0)",
        "variances = without.var(axis=0)",
        f"{PREFERENCE}::test_held_out_figures_and_their_errors",
    ),
]


def damage(mutation: Mutation, package: pathlib.Path) -> None:
    """Apply a mutation to the package in that folder; ValueError unless it fits exactly once."""
    path = package / mutation.file
    text = path.read_text("utf-8")
    if text.count(mutation.old) != 1:
        raise ValueError(f"{mutation.name}: found {text.count(mutation.old)} times in {path}")
    path.write_text(text.replace(mutation.old, mutation.new), "utf-8")


def run_tests(place: pathlib.Path, tests: str) -> tuple[int, str]:
    """Exit status of pytest in a copy of the repository, and the first test that failed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-rfE"]
    environment = os.environ | {"PYTHONPATH": str(place)}
    done = subprocess.run(
        [*command, *tests.split()], cwd=place, env=environment, capture_output=True, text=True
    )
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return done.returncode, failed[1] if failed else done.stdout[-2000:] + done.stderr[-2000:]


def main(parts: list[str]) -> int:
    chosen = [m for m in MUTATIONS if not parts or any(part in m.name for part in parts)]
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder) / "repository"
        place.mkdir()
        for name in ("mdm_jax", "tests", "experiments", "docs", "notebooks"):
            shutil.copytree(ROOT / name, place / name)
        for path in ROOT.glob("*.*"):
            if path.is_file():
                shutil.copy2(path, place)
        whole = sorted({test for m in chosen for test in m.tests.split()})
        status, failed = run_tests(place, " ".join(whole))
        if status:
            print(f"undamaged, the tests fail: {failed}", file=sys.stderr)
            return 1
        print("| damage | in | caught by |\n|---|---|---|", flush=True)
        clean, survivors = place / "mdm_jax", 0
        for mutation in chosen:
            shutil.rmtree(clean)
            shutil.copytree(ROOT / "mdm_jax", clean)
            damage(mutation, clean)
            status, failed = run_tests(place, mutation.tests)
            if status != 1:
                survivors += 1
                failed = "**survived**" if status == 0 else f"**broken** {failed}"
            path, _, test = failed.partition("::")
            test = f"`{pathlib.Path(path).name}::{test.partition('[')[0]}`" if test else failed
            print(f"| {mutation.name} | `{mutation.file}` | {test} |", flush=True)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
