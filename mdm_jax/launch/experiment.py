"""Everything that a config describes, built once and used by every mode."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from mdm_jax import data, rng, training
from mdm_jax import sharding as mdm_jax_sharding
from mdm_jax.draws import DrawSpec
from mdm_jax.launch import (
    build,
    build_autoregressive,
    build_block,
    build_gaussian,
    build_masked,
    build_uniform,
)
from mdm_jax.likelihood.result import Likelihood
from mdm_jax.objectives.objective import Objective
from mdm_jax.training.checkpoint_store import CheckpointError
from mdm_jax.training.loop import BatchStream
from mdm_jax.training.state import TrainState
from mdm_jax.types import Array, ArrayLike, Batch, PyTree, worst_bias
from mdm_jax.variance.transform import VarianceTransform

PROCESSES = {
    "masked": build_masked,
    "block": build_block,
    "uniform": build_uniform,
    "autoregressive": build_autoregressive,
    "gaussian": build_gaussian,
}
"""What builds the parts of a run that depend on its process."""


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """The objects of a run.

    Attributes:
        config: resolved config.
        dataset: data and tokenizer.
        model: network.
        apply_fn: ``apply_fn(params, inputs, logsnr, documents)``, as objectives see it.
        objective, transform: what is estimated, and how its variance is reduced.
        monitors: running estimates that go to the metrics.
        spec: shape of the global draw.
        mesh: device mesh.
    """

    config: ConfigDict
    dataset: data.Dataset
    model: nn.Module
    apply_fn: Callable[..., Array]
    objective: Objective
    transform: VarianceTransform
    monitors: tuple[training.Monitor, ...]
    spec: DrawSpec
    mesh: jax.sharding.Mesh

    @property
    def process(self):
        """The builder of the run's process."""
        return PROCESSES[self.config.process]

    def initial_state(self) -> TrainState:
        """The sharded state at step 0, a function of the config alone."""
        return mdm_jax_sharding.init_sharded(self._new_state, self.mesh)[0]

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the state."""
        return mdm_jax_sharding.abstract_sharded(self._new_state, self.mesh)

    def train_step(self) -> Callable[..., tuple[TrainState, training.StepMetrics]]:
        """The pure step ``(state, batch, seed=the config's)``, not yet jitted.

        A seed that is passed is no part of the program, which is then one for all seeds.
        """

        def make(seed: ArrayLike) -> Callable[[TrainState, Batch], tuple]:
            return training.make_train_step(
                self._sharded_apply(),
                self.objective,
                self.transform,
                _optimizer(self.config),
                self.spec,
                seed=seed,
                ema_decay=self.config.optimizer.ema_decay,
                num_microbatches=self.config.train.num_microbatches,
                monitors=self.monitors,
            )

        own = make(self.config.seed)

        def step(state: TrainState, batch: Batch, seed: Array | None = None) -> tuple:
            return (own if seed is None else make(seed))(state, batch)

        return step

    def placed_seed(self) -> Array:
        """The seed on every device."""
        everywhere = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())
        return jax.device_put(np.uint32(self.config.seed), everywhere)

    def train_batches(self) -> BatchStream:
        """Endless placed batches, prefetched, with a position that can be saved; to be closed."""
        c, sharding = self.config, mdm_jax_sharding.batch_sharding(self.mesh)
        place = functools.partial(
            mdm_jax_sharding.place_batch, sharding=sharding, batch_size=c.train.batch_size
        )
        return data.train_iterator(
            self.dataset.train,
            c.train.batch_size,
            c.seed,
            prefetch=c.train.prefetch,
            rows=mdm_jax_sharding.local_rows(sharding, c.train.batch_size),
            place=place,
        )

    def abstract_batch(self) -> Batch:
        """Shapes, dtypes and shardings of a training batch."""
        size, sharding = self.config.train.batch_size, mdm_jax_sharding.batch_sharding(self.mesh)
        row = data.gather(self.dataset.train, np.arange(1))
        return jax.tree.map(
            lambda field: jax.ShapeDtypeStruct(
                (size, *field.shape[1:]), jnp.asarray(field).dtype, sharding=sharding
            ),
            row,
        )

    def held_out(self, split: str) -> tuple[str, data.RowSource]:
        """A split by name, or the validation split where that one is empty; its name and rows.

        Raises:
            ValueError: if the name is unknown, or that split and the validation split are empty.
        """
        sources = {"valid": self.dataset.valid, "test": self.dataset.test}
        source = build.lookup(sources, split, "evaluate.final_split")
        if len(source):
            return split, source
        if len(self.dataset.valid):
            return "valid", self.dataset.valid
        if len(self.dataset.test):
            raise ValueError(
                f"evaluate.final_split={split!r}: the data have no validation rows, only "
                f"{len(self.dataset.test)} test rows; take --config.evaluate.final_split=test, or "
                "give data.fractions a second part"
            )
        raise ValueError(
            f"evaluate.final_split={split!r}: the data have neither test nor validation rows to "
            "evaluate on"
        )

    def batches(self, source: data.RowSource, max_rows: int) -> Iterator[Batch]:
        """Evaluation batches of a split."""
        size = self.config.evaluate.batch_size
        return data.evaluation_batches(source, size, max_rows or None)

    def likelihood(self, passes: int, replicates: int) -> Callable[..., Likelihood]:
        """The fixed estimator, whatever chain the run trains with."""
        return self.process.likelihood(self.config, self.dataset, self.apply_fn, passes, replicates)

    def generator(self) -> Callable:
        """``generate(params, key, canvas, documents) -> tokens`` with the configured sampler."""
        return self.process.generator(self.config, self.dataset, self.model, self.apply_fn)

    def key(self, step: int, name: str) -> Array:
        """Key of a named stream at a step."""
        return rng.stream(rng.step_key(self.config.seed, step), name)

    def bias(self) -> str:
        """The worse of the objective's and the chain's bias labels."""
        return worst_bias(self.objective.bias, self.transform.bias)

    def describe(self) -> str:
        """What is about to be trained, for the terminal and the report."""
        counts = training.num_params(jax.eval_shape(self._parameters))
        return "\n".join(
            [
                self.dataset.description,
                f"model: {counts:,} parameters, {type(self.model).__name__}, rows of "
                f"{self.dataset.length} elements, {self.dataset.vocab_size} ids",
                f"objective: {self.objective.name} over {self.objective.corruption.name}, "
                f"{self.source_of_levels()}; variance: {self.transform.name}, "
                f"{self.transform.views} forward passes per row [{self.bias()}]",
                f"devices: {dict(self.mesh.shape)} of {jax.devices()[0].platform}"
                + (f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""),
                *mdm_jax_sharding.kept_whole(self._new_state, self.mesh),
            ]
        )

    def source_of_levels(self) -> str:
        """Law or recipe that the levels come from, for people."""
        if self.config.process == "autoregressive":
            return "no noise"
        if self.config.process != "gaussian":
            return f"law {self.config.law.name}"
        c = self.config.gaussian
        return f"recipe {c.recipe}" + (f", law {c.law}" if c.law else "")

    def _sharded_apply(self) -> Callable[..., Array]:
        return mdm_jax_sharding.sharded_apply(
            self.apply_fn, self.mesh, mdm_jax_sharding.LOGICAL_RULES
        )

    def _new_state(self) -> TrainState:
        key = rng.stream(rng.step_key(self.config.seed, 0), "init")
        params = self._init()(key)
        dtype = build.lookup(build.DTYPES, self.config.optimizer.ema_dtype, "optimizer.ema_dtype")
        return training.new_state(
            *(params, _optimizer(self.config), self.transform, self.spec, self.monitors), dtype
        )

    def _parameters(self) -> PyTree:
        return nn.meta.unbox(self._init()(jax.random.key(0)))

    def _init(self) -> Callable[[Array], PyTree]:
        dtype = jnp.float32 if self.config.process == "gaussian" else jnp.int32
        return training.linen_init(self.model, self.dataset.length, dtype)


def make_experiment(config: ConfigDict) -> Experiment:
    """Builds what a config describes.

    Raises:
        ValueError, FileNotFoundError, ImportError: with a message for the user, wherever settings
            or data do not fit.
    """
    dataset = build.dataset(config)
    process = build.lookup(PROCESSES, config.process, "process")
    build.check_unread(config, process.UNREAD)
    objective, model = process.objective(config, dataset), process.model(config, dataset)
    mesh = mdm_jax_sharding.make_mesh(**config.mesh)
    c = config.train
    mdm_jax_sharding.check_batch_size(mesh, c.batch_size, c.num_microbatches)
    mdm_jax_sharding.check_num_heads(mesh, config.model.num_heads)
    _optimizer(config)  # raises early where its settings do not fit the number of steps
    return Experiment(
        config=config,
        dataset=dataset,
        model=model,
        apply_fn=process.apply_fn(config, model, dataset),
        objective=objective,
        transform=build.transform(config, objective.law),
        monitors=tuple(build.monitors(config, objective)),
        spec=objective.spec(c.batch_size, dataset.length),
        mesh=mesh,
    )


def _optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """The configured optimiser, its moments in the configured dtypes."""
    c = config.optimizer
    first, second = (
        build.lookup(build.DTYPES, c[name], f"optimizer.{name}")
        for name in ("first_moment_dtype", "second_moment_dtype")
    )
    return training.store_moments(build.optimizer(config), first, second, c.b2)


def is_conditional(dataset: data.Dataset) -> bool:
    """Whether rows have a part that is given, such as a prompt."""
    rows = data.gather(dataset.train, np.arange(min(64, len(dataset.train))))
    return bool(np.any((np.asarray(rows.documents) > 0) & ~np.asarray(rows.eligible)))


def checkpoint_directory(workdir: str | pathlib.Path) -> pathlib.Path:
    """Where the checkpoints of a run are."""
    return pathlib.Path(workdir) / "checkpoints"


def open_workdir(workdir: str | pathlib.Path) -> training.CheckpointReader:
    """The checkpoints of a run, for looking at; it may be missing, or still training."""
    return training.CheckpointReader(checkpoint_directory(workdir))


def load_parameters(experiment: Experiment, workdir: pathlib.Path) -> tuple[int, PyTree]:
    """(step, averaged parameters) of a run: the best by validation loss, else the last.

    The run may have had another optimiser and another variance chain than ``experiment``.

    Raises:
        CheckpointError: if the directory has neither, or they are of another network.
    """
    checkpoints = open_workdir(workdir)
    try:
        abstract = experiment.abstract_state()
        if checkpoints.best_metrics() is not None:
            params = checkpoints.restore_best(training.averaged(abstract))
            # Of a run that is training these may be others than a moment ago.
            return int(checkpoints.best_metrics()["step"]), params
        restored = checkpoints.restore_last_fields(abstract, ("step", "params", "ema"))
    finally:
        checkpoints.close()
    if restored is None:
        raise CheckpointError(f"{workdir} has no checkpoint yet; run --mode=train first")
    return int(restored.step), training.averaged(restored)
