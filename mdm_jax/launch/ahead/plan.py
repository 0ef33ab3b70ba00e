"""The compiler's plan of a run's programs on given devices, and the time that its figures imply."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from mdm_jax import rng, sharding, training
from mdm_jax.draws import iid
from mdm_jax.launch.ahead import collectives, stand_in, targets
from mdm_jax.launch.ahead.collectives import Collective
from mdm_jax.launch.ahead.program import Buffer, Module, count_flops
from mdm_jax.launch.ahead.targets import Chip
from mdm_jax.launch.alignment.experiment import aligned
from mdm_jax.launch.build import Experiment, make_experiment
from mdm_jax.types import Batch, PyTree


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one program needs of each device, in bytes and FLOPs a step.

    Attributes:
        mesh, rows, remat: what it was compiled for; ``rows`` of all devices.
        parameters: their number.
        arguments, temporaries, memory: bytes of the state and batch, of what the program holds
            besides, and of all with results that are not written over arguments.
        state: bytes of the state's parts, such as "params" and "opt_state".
        flops: of matrix products, recomputed ones included; an equal share of all devices'.
        unknown_loops: loops of unknown length, counted as if they ran once.
        host: bytes of what is offloaded to the host's memory.
        text: the compiled program.
    """

    program: str
    mesh: Mapping[str, int]
    rows: int
    remat: str
    parameters: int
    arguments: int
    temporaries: int
    memory: int
    state: Mapping[str, int]
    flops: float
    traffic: float
    collectives: Sequence[Collective]
    largest: Sequence[Buffer]
    unknown_loops: int
    compile_seconds: float
    text: str
    host: int = 0

    def seconds(self, chip: Chip) -> dict[str, float]:
        """Least seconds a step by each of a chip's published limits."""
        sent = sum(one.bytes_sent for one in self.collectives)
        return {
            "compute": self.flops / chip.flops,
            "memory": self.traffic / chip.bandwidth,
            "interconnect": sent / chip.links,
        }

    def fits(self, chip: Chip) -> bool:
        return not self.memory > chip.memory


def compile_plan(config: ConfigDict, devices: Sequence[jax.Device], program: str = "train") -> Plan:
    """The plan of a program of :data:`PROGRAMS` on these devices, which are not used.

    ValueError and others as of ``make_experiment``, and where the compiler fails, such as for want
    of its tools; MemoryError if it finds no plan.
    """
    with stand_in.with_outline(config) as config:
        experiment = make_experiment(config, devices=devices, read=stand_in.dataset)
    config = experiment.config
    function, arguments, donated = PROGRAMS[program](experiment)
    started = time.monotonic()
    try:
        traced = function.trace(*arguments)
    except RuntimeError as error:
        if "cuDNN" not in str(error):
            raise
        raise ValueError(
            "model.attention: cuDNN's kernel, the choice for GPUs, cannot be compiled where its "
            "library is not; --config.model.attention=recompute keeps as little"
        ) from error
    flops = count_flops(traced.jaxpr) / len(devices)
    try:
        options = targets.compiler_options(devices[0].platform)
        if program == "train":
            options |= training.compiler_options(devices[0].platform)
        compiled = traced.lower().compile(compiler_options=options or None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise ValueError(f"the compiler of {devices[0].platform} failed: {error}") from error
        raise MemoryError(str(error).splitlines()[0]) from error
    seconds = time.monotonic() - started
    memory, text = compiled.memory_analysis(), compiled.as_text()
    module = Module(text, len(devices))
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Plan(
        program=program,
        mesh=dict(experiment.mesh.shape),
        rows=_rows(config, program),
        remat=config.model.remat,
        parameters=training.num_params(experiment.shapes()),
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        memory=memory.argument_size_in_bytes + memory.temp_size_in_bytes + fresh,
        state={name: bytes_per_device(part) for name, part in donated.items()},
        flops=flops,
        traffic=module.traffic(),
        collectives=collectives.find(module),
        largest=module.largest(),
        unknown_loops=module.unknown_loops,
        compile_seconds=seconds,
        text=text,
        host=memory.host_temp_size_in_bytes,
    )


def bytes_per_device(tree: PyTree) -> int:
    """Of abstract arrays with shardings."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def meshes(devices: int, heads: int, rows: int) -> Iterator[dict[str, int]]:
    """Meshes of so many devices that divide heads and rows; least communication first, as a rule:
    few tensor shards, then few fsdp shards."""
    for tensor in (n for n in range(1, devices + 1) if devices % n == 0 and heads % n == 0):
        ways = devices // tensor
        if rows % ways == 0:
            for fsdp in (n for n in range(1, ways + 1) if ways % n == 0):
                yield {"data": ways // fsdp, "fsdp": fsdp, "tensor": tensor}


def rows_that_fit(small: Plan, large: Plan, memory: float) -> int:
    """Rows of all devices that fit a device's memory, by a line through two plans.

    A multiple of the smaller plan's number of rows; 0 if none fit.
    """
    per_row = (large.memory - small.memory) / (large.rows - small.rows)
    if per_row <= 0:
        raise ValueError("the larger plan needs no more memory than the smaller one")
    rows = small.rows + (memory - small.memory) / per_row
    return max(0, int(rows // small.rows) * small.rows)


Lowerable = tuple[Callable[..., Any], tuple, Mapping[str, PyTree]]
"""A jitted function, its abstract arguments, and parts of these by name."""


def _train(experiment: Experiment) -> Lowerable:
    """The training step as the launcher runs it."""
    experiment = aligned(experiment)
    state, batch = experiment.abstract_state(), experiment.abstract_batch()
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    function = jax.jit(experiment.step, donate_argnums=0, out_shardings=(places, None))
    parts = {name: getattr(state, name) for name in ("params", "opt_state", "ema", "monitors")}
    seed = _replicated(experiment, (), np.uint32)
    if experiment.adapter is None and not experiment.has_reference:
        return function, (state, batch, seed), parts
    frozen = _parameters(experiment)
    return function, (state, batch, seed, frozen), parts | {"frozen": frozen}


def _evaluate(experiment: Experiment) -> Lowerable:
    """One pass of the objective over an evaluation batch, forward alone."""
    params, rows = _parameters(experiment), experiment.config.evaluate.batch_size
    batch = jax.tree.map(
        lambda leaf: _by_rows(experiment, (rows, *leaf.shape[1:]), leaf.dtype),
        experiment.abstract_batch(),
    )
    spec = experiment.objective.spec(rows, experiment.dataset.length)
    apply_fn = _sharded(experiment, experiment.apply_fn)

    def evaluate(params: PyTree, batch: Batch, seed: jax.Array) -> jax.Array:
        draw = iid(rng.step_key(seed, 0), spec)
        return experiment.objective.loss(functools.partial(apply_fn, params), batch, draw).raw

    seed = _replicated(experiment, (), np.uint32)
    return jax.jit(evaluate), (params, batch, seed), {"params": params}


def _sample(experiment: Experiment) -> Lowerable:
    """A whole generation of ``sample.num_samples`` rows by the configured sampler."""
    params, rows = _parameters(experiment), experiment.config.sample.num_samples
    tokens = _by_rows(experiment, (rows, experiment.dataset.length), np.int32)
    generate = _sharded(experiment, experiment.generate)

    def sample(params: PyTree, seed: jax.Array, canvas: jax.Array, documents: jax.Array) -> Any:
        return generate(params, rng.step_key(seed, 0), canvas, documents)

    seed = _replicated(experiment, (), np.uint32)
    return jax.jit(sample), (params, seed, tokens, tokens), {"params": params}


def _parameters(experiment: Experiment) -> PyTree:
    """Abstract parameters of the network, adapters merged."""
    return sharding.abstract_sharded(
        lambda: experiment.init_model(jax.random.key(0)), experiment.mesh
    )


def _sharded(experiment: Experiment, apply_fn: Callable[..., Any]) -> Callable[..., Any]:
    return sharding.sharded_apply(apply_fn, experiment.mesh, sharding.LOGICAL_RULES)


def _by_rows(experiment: Experiment, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    where = sharding.batch_sharding(experiment.mesh)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)


def _replicated(experiment: Experiment, shape: tuple[int, ...], dtype: Any) -> Any:
    where = NamedSharding(experiment.mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)


PROGRAMS = {"train": _train, "evaluate": _evaluate, "sample": _sample}
"""By name; each is given an experiment whose mesh is of the target's devices."""


def _rows(config: ConfigDict, program: str) -> int:
    return {
        "train": config.train.batch_size,
        "evaluate": config.evaluate.batch_size,
        "sample": config.sample.num_samples,
    }[program]
