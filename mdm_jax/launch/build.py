"""Build an :class:`Experiment` from a config in one pass; refuses what cannot be built."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from mdm_jax import data, files, hub, rng, sharding, training
from mdm_jax.draws import DrawSpec
from mdm_jax.launch import config as launch_config
from mdm_jax.launch import names
from mdm_jax.launch import source as sources
from mdm_jax.launch.auto import chain as chains
from mdm_jax.launch.categorical.cdcd import cdcd
from mdm_jax.launch.categorical.cdtd import cdtd
from mdm_jax.launch.datasets import buckets, dataset, split_by_name
from mdm_jax.launch.families import TOKEN_FAMILIES, Family, final_likelihood
from mdm_jax.launch.gaussian_family import gaussian_family
from mdm_jax.launch.modes import sample
from mdm_jax.launch.names import lookup
from mdm_jax.launch.processes.partition import partition
from mdm_jax.launch.processes.parts import placed
from mdm_jax.launch.sampling.quality import check_quality
from mdm_jax.launch.start import scaled
from mdm_jax.launch.start.loop import loop_options
from mdm_jax.launch.start.optimizer import optimizer, recomputes_update
from mdm_jax.launch.workdir import check_source, open_workdir, read_config
from mdm_jax.models import lora
from mdm_jax.models.layers import check_policy
from mdm_jax.objectives.objective import Objective
from mdm_jax.training.checkpoints import CheckpointError
from mdm_jax.training.loop import BatchStream
from mdm_jax.training.step import TrainState
from mdm_jax.types import Array, ArrayLike, Batch, KeyedBatch, PyTree, worst_bias
from mdm_jax.variance.transform import VarianceTransform

FAMILIES = {**TOKEN_FAMILIES, "partition": partition, "gaussian": gaussian_family}
FAMILIES |= {"cdcd": cdcd, "cdtd": cdtd}
"""Value of ``config.process`` -> what builds its family."""


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """The objects of a run, built once and used by every mode.

    Attributes:
        chain, transform, spec: the variance chain by name and as built, and the shape of the global
            draw, whose rows are those of a step.
        monitors: running estimates that go to the metrics.
        held_out: name and rows of the final evaluation split.
        validate, evaluate: likelihood estimators, during training and in the end.
        generate: ``generate(params, key, canvas, documents) -> tokens`` of the configured sampler.
        jobs: canvases that samples fill in, none for pictures.
        clip_search: chooses the range of ``clipped_adaptive``; None without it.
        source: the model that the run begins from, without parameters; None without.
        adapter: what is trained beside the source's frozen parameters; None: all is trained.
        frozen: these parameters, once :meth:`with_frozen` has read them.
        has_reference: whether steps take a reference, as ``frozen``.
    """

    config: ConfigDict
    dataset: data.Dataset
    family: Family
    chain: chains.Chain
    transform: VarianceTransform
    optimizer: optax.GradientTransformation
    monitors: tuple[training.Monitor, ...]
    spec: DrawSpec
    mesh: jax.sharding.Mesh
    loop: training.LoopOptions
    held_out: tuple[str, data.RowSource]
    validate: Callable[..., Any]
    evaluate: Callable[..., Any]
    generate: Callable[..., Array]
    jobs: tuple[sample.Job, ...]
    clip_search: Callable[..., Any] | None
    source: hub.HubModel | None = None
    adapter: lora.Lora | None = None
    frozen: PyTree = None
    has_reference = False

    @property
    def model(self) -> nn.Module:
        return self.family.model

    @property
    def apply_fn(self) -> Callable[..., Any]:
        return self.family.apply_fn

    def apply_at(self, seed: ArrayLike, step: ArrayLike, _frozen: PyTree = None) -> Callable:
        """``apply_fn`` as a training step has it, whose attention mask may be annealed."""

        def annealed(*inputs: Any, **options: Any) -> Any:
            key = rng.stream(rng.step_key(seed, step), "anneal")
            return self.family.annealed(key, step)(*inputs, **options)

        return self.apply_fn if self.family.annealed is None else annealed

    @property
    def objective(self) -> Objective:
        return self.family.objective

    @functools.cached_property
    def step(self) -> Callable[..., tuple[TrainState, training.StepMetrics]]:
        """Pure step ``(state, batch, *constants)``, not jitted; seed and recipe may be left out."""

        places = {"mesh": self.mesh, "rules": sharding.LOGICAL_RULES}
        sharded = functools.partial(sharding.sharded_apply, **places)
        optimizer = self.optimizer._replace(update=sharded(self.optimizer.update))

        def make(seed: ArrayLike, frozen: PyTree, recipe: PyTree, number: ArrayLike, length: int):
            objective = self.objective if recipe is None else self.family.objective_of(recipe)
            return training.make_train_step(
                sharded(self.apply_at(seed, number, frozen)),
                objective,
                self.transform,
                optimizer,
                objective.spec(self.spec.batch_size, length),
                seed=seed,
                ema_decay=self.config.optimizer.ema_decay,
                num_microbatches=self.num_microbatches,
                monitors=self.monitors,
                variables=self.adapter
                and (lambda params, *key: lora.join(frozen, params, self.adapter, *key)),
                tokens_per_batch=self.buckets and self.spec.batch_size * self.buckets.mean_eligible,
                place=lambda tree: sharding.constrain_like(self.abstract_state().params, tree),
                recompute_update=recomputes_update(self.config, self.mesh),
            )

        for length in self.lengths:  # checks the settings
            make(self.config.seed, None, None, 0, length)

        def step(state: TrainState, batch: Batch, seed=None, frozen=None, recipe=None) -> tuple:
            seed = self.config.seed if seed is None else seed
            return make(seed, frozen, recipe, state.step, batch.tokens.shape[1])(state, batch)

        return step

    @functools.cached_property
    def buckets(self) -> data.Buckets | None:
        """Training rows by length (data.buckets); None where all batches have the longest."""
        return buckets(self.config, self.dataset, self.objective, self.spec, self.transform)

    @property
    def num_microbatches(self) -> int:
        """Parts of a batch, as configured or by the rule of ``scaled.num_microbatches``."""
        c, mesh, rows = self.config, self.mesh, self.spec.batch_size
        patch = c.model.patch_size**2 if c.process == "gaussian" else 1
        return c.train.num_microbatches or scaled.num_microbatches(
            rows // (mesh.shape["data"] * mesh.shape["fsdp"]),
            self.transform.views * self.dataset.length // patch,
            scaled.parameters(c.model.width, c.model.depth, self.dataset.vocab_size),
            mesh.devices.flat[0].platform,
        )

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of training batches, each of which has a compiled step."""
        return self.buckets.lengths if self.buckets else (self.dataset.length,)

    def with_chain(self, chain: chains.Chain) -> "Experiment":
        """This run under another chain; ValueError if that cannot be built."""
        if chain == self.chain:
            return self
        own = _parts_of_chain(self.config, self.dataset, self.family, chain)
        sharding.check_batch_size(
            self.mesh, own["spec"].batch_size, self.config.train.num_microbatches or 1
        )
        return dataclasses.replace(self, **own)

    @property
    def members(self) -> tuple[VarianceTransform, ...]:
        """The single transforms of the chain."""
        return self.transform.members

    def repeated(self, transform: VarianceTransform) -> VarianceTransform:
        """A chain as many times over as a step draws it."""
        return transform

    def measured_rows(self, params: PyTree, count: int, step: int) -> Batch:
        """Rows as training steps have them, on the host, for measurements; by seed and step.

        ``params`` as of ``variables``: of what writes the rows, where a model does.
        """
        del params
        generator = np.random.default_rng([self.config.seed, step])
        return data.sample_rows(self.dataset.train, count, generator)

    def with_noted_chain(self, notes: Any) -> "Experiment":
        """This run under the chain of a checkpoint's notes, where ``auto`` chose one."""
        noted = notes.get("chain") if isinstance(notes, dict) else None
        if noted is None or not chains.is_automatic(self.config):
            return self
        return self.with_chain(chains.chain_of(noted, "the checkpoint's notes"))

    def initial_state(self, params: PyTree | None = None) -> TrainState:
        """Sharded state at step 0, from parameters (which are donated), else the source's or new.

        New ones are a function of the config alone. Parameters are adapters, if these are trained.
        """
        if params is None and self.source is not None:
            params = self.source_params()
        if params is None:
            return sharding.init_sharded(self._new_state, self.mesh)[0]
        abstract = self.abstract_state()
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract)

        def make(params: PyTree) -> TrainState:  # averages may be wider
            own = jax.tree.map(lambda p, leaf: p.astype(leaf.dtype), params, abstract.params)
            return self._state_of(own)

        return jax.jit(make, out_shardings=places, donate_argnums=0)(params)

    def source_params(self) -> PyTree | None:
        """Parameters of the source, or adapters of ``adapter.init_from``; None: new adapters."""
        if self.adapter is None:
            return sources.load_params(self.config, self.mesh)
        start, places = self.config.adapter.init_from, self.abstract_state().params
        return start and hub.load_adapters(start, self.source, self.adapter, places) or None

    def with_frozen(self, workdir: files.Path) -> "Experiment":
        """This run with the parameters that it does not train; WorkdirError as ``load_frozen``."""
        if self.adapter is None or self.frozen is not None:
            return self
        frozen = sources.load_frozen(self.config, self.mesh, workdir)
        return dataclasses.replace(self, frozen=frozen)

    def variables(self, params: PyTree) -> PyTree:
        """What networks are applied to, of trained parameters."""
        return lora.join(self.frozen, params, self.adapter) if self.adapter else params

    def abstract_state(self) -> TrainState:
        return self._abstract_state

    @functools.cached_property
    def _abstract_state(self) -> TrainState:
        return sharding.abstract_sharded(self._new_state, self.mesh)

    def placed_seed(self) -> Array:
        return sharding.replicate(np.uint32(self.config.seed), self.mesh)

    @property
    def constants(self) -> tuple[PyTree, ...]:
        """Further arguments of a compiled step: runs that differ in these alone share a program."""
        recipe = jax.tree.map(np.float32, self.family.recipe)
        return self.placed_seed(), self.frozen, sharding.replicate(recipe, self.mesh)

    def train_batches(self, size: int | None = None) -> BatchStream:
        """Endless placed batches of ``size`` rows (None: a step's), prefetched; to be closed."""
        size, rows = size or self.spec.batch_size, sharding.batch_sharding(self.mesh)
        return data.train_iterator(
            self.dataset.train,
            size,
            self.config.seed,
            rows=sharding.local_rows(rows, size),
            prefetch=self.config.train.prefetch,
            place=functools.partial(sharding.place_batch, sharding=rows, batch_size=size),
            by_example=self.noise_by_example,
            buckets=self.buckets,
        )

    @property
    def noise_by_example(self) -> bool:
        """Whether the noise goes with examples, not with slots of the batch (train.noise_by)."""
        by, c = self.config.train.noise_by, self.config.data
        return by == "example" or (not by and (c.source == "chat" or bool(c.buckets)))

    def abstract_batch(self, length: int | None = None) -> Batch:
        """Shapes of a training batch; ``length`` None: of the longest."""
        size, rows = self.spec.batch_size, sharding.batch_sharding(self.mesh)
        row = data.gather(self.dataset.train, np.arange(1))
        row = Batch(*(field[:, :length] if field.ndim > 1 else field for field in row))
        if self.noise_by_example:
            row = KeyedBatch(*row, np.zeros((*row.tokens.shape, 2), np.uint32))
        return jax.tree.map(
            lambda field: jax.ShapeDtypeStruct(
                (size, *field.shape[1:]), jnp.asarray(field).dtype, sharding=rows
            ),
            row,
        )

    def batches(self, source: data.RowSource, max_rows: int) -> Iterator[Batch]:
        """Evaluation batches of a split, read by all processes together; ``max_rows`` 0: all."""
        size = self.config.evaluate.batch_size
        return data.evaluation_batches(source, size, max_rows or None, data.gather_together)

    def key(self, step: int, name: str) -> Array:
        return rng.stream(rng.step_key(self.config.seed, step), name)

    def bias(self) -> str:
        """The weaker of the objective's and the chain's bias labels."""
        return worst_bias(self.objective.bias, self.transform.bias)

    def describe(self) -> str:
        """Summary of the run for the terminal and the report."""
        whole = self.shapes()
        return "\n".join(
            [
                self.dataset.description,
                f"model: {training.num_params(whole):,} parameters, {type(self.model).__name__}, "
                f"rows of {self.dataset.length} elements, {self.dataset.vocab_size} ids",
                *sources.describe(self.source, self.dataset.length, whole, self.adapter),
                f"objective: {self.objective.name} over {self.objective.corruption.name}, "
                f"{self.family.levels_from}; variance: "
                f"{'auto, now ' * chains.is_automatic(self.config)}{self.transform.name}, "
                f"{self.transform.views} forward passes per row [{self.bias()}]",
                f"devices: {dict(self.mesh.shape)} of {jax.devices()[0].platform}"
                + (f" in {jax.process_count()} processes" if jax.process_count() > 1 else "")
                + f"; a step's {self.spec.batch_size} rows in {self.num_microbatches} parts",
                *([self.buckets.describe()] if self.buckets else []),
                *sharding.kept_whole(self._new_state, self.mesh),
                *sample.adaptations(self.jobs, self.config.sample, self.dataset.mask_id),
            ]
        )

    def _new_state(self) -> TrainState:
        return self._state_of(self._init(rng.stream(rng.step_key(self.config.seed, 0), "init")))

    def _state_of(self, params: PyTree) -> TrainState:
        dtype = names.DTYPES[self.config.optimizer.ema_dtype]
        own = self.optimizer, self.transform, self.spec, self.monitors
        return training.new_state(params, *own, dtype)

    def _init(self, key: Array) -> PyTree:
        """What is trained."""
        if self.adapter is None:
            return self.init_model(key)
        return lora.init(key, self.shapes(), self.adapter)

    def shapes(self) -> PyTree:
        """Shapes of all parameters, logical axes named."""
        return jax.eval_shape(self.init_model, jax.random.key(0))

    @functools.cached_property
    def init_model(self) -> Callable[[Array], PyTree]:
        """``init_model(key)``: new parameters, logical axes named; jitted, to be traced once."""
        init = training.linen_init(self.model, self.dataset.length, self.family.input_dtype)
        return jax.jit(init)


def make_experiment(
    config: ConfigDict,
    workdir: files.Path | None = None,
    given: Collection[str] = (),
    devices: Sequence[jax.Device] | None = None,
    read: Callable[[ConfigDict, hub.HubModel | None], data.Dataset] = dataset,
) -> Experiment:
    """Build a run's objects; raises ValueError, OSError, ImportError or WorkdirError.

    ``workdir`` holds what a run that has begun needs of its source (``model.source``); ``given``
    are settings that count though they are defaults (``source.filled``). ``devices`` None: all of
    this run; others need not be there, if the step is only compiled. ``read`` makes the data.
    """
    launch_config.check_config(config)
    adapter, source = sources.adapter(config), sources.read(config, workdir)
    config = sources.filled(config, source, given, workdir)
    config = scaled.filled(config, workdir and read_config(workdir))
    rows = read(config, source)
    config = scaled.with_lengths(config, rows.layout)
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    family = lookup(FAMILIES, config.process, "process")(placed(config, mesh), rows, source)
    _check_unread(config, family.unread)
    c, e, s = config.train, config.evaluate, config.sample
    sharding.check_batch_size(mesh, c.batch_size, c.num_microbatches or 1)
    sharding.check_num_heads(mesh, config.model.num_heads)
    check_policy(mesh.devices.flat[0], config.model.remat)
    chain = chains.current(config, workdir)
    held_out = split_by_name(rows, e.final_split)
    validate = evaluate = family.likelihood(e.passes, e.replicates)
    if e.width or (e.final_passes, e.final_replicates) != (e.passes, e.replicates):
        evaluate = final_likelihood(family, **e)
    experiment = Experiment(
        config=config,
        dataset=rows,
        family=family,
        optimizer=optimizer(config),
        mesh=mesh,
        held_out=held_out,
        validate=validate,
        evaluate=evaluate,
        generate=family.generator(s.num_steps),
        jobs=sample.make_jobs(
            rows,
            held_out[1],
            num_samples=s.num_samples,
            gap=s.gap,
            prompts=s.prompts,
            **sample.order(config),
            **sample.pictures(config, rows),
        ),
        clip_search=chains.clip_search(rows, family, e.batch_size, **config.clip_search)
        if "clipped_adaptive" in config.variance.order
        else None,
        source=source,
        adapter=adapter,
        **_parts_of_chain(config, rows, family, chain),
    )
    experiment.step  # noqa: B018  (checks the step's settings, data.buckets among them)
    if adapter is not None:
        lora.kernels(experiment.shapes(), adapter, hub.projection_names(experiment.source))
    for split, source in (held_out, *[("valid", rows.valid)] * bool(len(rows.valid))):
        batches = experiment.batches(source, e.max_rows)
        if not any(np.any(batch.units) for batch in batches):  # as a rule the first one has some
            raise ValueError(
                f"evaluate.max_rows={e.max_rows}: the rows of the {split} split that are evaluated "
                f"hold no {rows.unit}, so there is no bound per {rows.unit}; evaluate more rows"
            )
    if s.judge:
        check_source(files.as_path(s.judge), rows.tokenizer, "sample.judge")
    if s.prompts and rows.tokenizer is None:
        raise ValueError("sample.prompts is about text, and this run's data are pictures")
    if s.quality_steps:
        check_quality(experiment.config, experiment.dataset, experiment.family)
    return experiment


def _check_unread(config: ConfigDict, sections: tuple[str, ...]) -> None:
    """Raise ValueError where a name that the run's process does not read was changed."""
    defaults = launch_config.get_config()
    changed = [
        f"{name}.{own}={config[name][own]!r}, leave it at {defaults[name][own]!r}"
        for name in sections
        for own in ("name", "clamp")
        if own in config[name] and config[name][own] != defaults[name][own]
    ]
    if changed:
        raise ValueError(f"process={config.process!r} does not read {', '.join(changed)}")


def _parts_of_chain(
    config: ConfigDict, dataset: data.Dataset, family: Family, chain: chains.Chain
) -> dict[str, Any]:
    """Fields of an :class:`Experiment` that follow from its chain."""
    transform = chains.transform(config, family.objective.law, chain)
    c, rows = config.train, chains.rows_of(config, transform)
    bias = worst_bias(family.objective.bias, transform.bias)
    return {
        "chain": chain,
        "transform": transform,
        "monitors": chains.monitors(c.monitors, config.monitors, family.objective, transform),
        "spec": family.objective.spec(rows, dataset.length),
        "loop": loop_options(config, dataset, transform.views, bias),
    }


def load_parameters(experiment: Experiment, workdir: files.Path) -> tuple[int, PyTree]:
    """(step, averaged parameters) of a run: the best by validation loss, else the last.

    Those of adapters are with the frozen ones (``Experiment.variables``). Of the model that it
    begins from, where it has not begun. Its optimiser and variance chain may differ.
    CheckpointError if there are none of this network.
    """
    found = read_parameters(workdir, experiment.abstract_state())
    if found is None and experiment.source is not None:
        found = 0, experiment.initial_state().params
    if found is None:
        raise CheckpointError(f"{workdir} has no checkpoint yet; run --mode=train first")
    return found[0], experiment.with_frozen(workdir).variables(found[1])


def read_parameters(
    workdir: files.Path, abstract: TrainState, last: bool = False
) -> tuple[int, PyTree] | None:
    """:func:`load_parameters`, or with ``last`` those of the last step as they are; None: none."""
    checkpoints = open_workdir(workdir)
    try:
        if not last and checkpoints.best_metrics() is not None:
            params = checkpoints.restore_best(training.averaged(abstract))
            # Of a run that is training these may be others than a moment ago.
            return int(checkpoints.best_metrics()["step"]), params
        restored = checkpoints.restore_last_fields(abstract, ("step", "params", "ema"))
    finally:
        checkpoints.close()
    if restored is None:
        return None
    state = restored.state
    return int(state.step), state.params if last else training.averaged(state)
