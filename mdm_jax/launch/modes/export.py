"""A run's model alone, without its data: opened, and written in a layout of others."""

import dataclasses
import json
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from mdm_jax import distributed, files, hub, sharding, training
from mdm_jax.data.tokenizers import load_tokenizer
from mdm_jax.launch import source
from mdm_jax.launch.build import read_parameters
from mdm_jax.launch.modes.export_tokenizer import tokenizer_files
from mdm_jax.launch.processes.parts import network
from mdm_jax.launch.workdir import WorkdirError, read_config, saved_config
from mdm_jax.models import lora
from mdm_jax.training.checkpoints import CheckpointError
from mdm_jax.training.ema import AverageOffset
from mdm_jax.training.step import TrainState
from mdm_jax.types import PyTree


class Opened(NamedTuple):
    """A run's model: the step of its parameters, and adapters where these alone were trained.

    ``model`` has no parameters then; :func:`merged` gives it some.
    """

    step: int
    model: hub.HubModel
    config: ConfigDict
    mesh: jax.sharding.Mesh
    spec: lora.Lora | None = None
    adapters: PyTree = None


def open_run(
    workdir: files.Path,
    last: bool = False,
    layout: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    moved: str | None = None,
    uniform: bool = False,
) -> Opened:
    """The model of a run, which needs neither its data nor its source.

    The best averaged parameters, or those of the ``last`` step as they are, over ``mesh`` (None:
    sharded over all devices). ``moved``: where its source is now. WorkdirError without a run,
    CheckpointError without a checkpoint; with ``layout`` ValueError that names the settings which
    no layout of others can express. Runs of uniform noise are opened where they are asked for, or
    keep a source's layout.
    """
    if read_config(workdir) is None:
        raise WorkdirError(f"{workdir} holds no run (no config.json); name another --workdir")
    config = saved_config(workdir)
    if moved is not None:
        config.model.source = moved
    uniform = uniform or bool(layout and config.model.source)
    attention, size = {
        "masked": ("bidirectional", None),
        "block": ("block", config.block.size),
        "autoregressive": ("causal", None),
        **({"uniform": ("bidirectional", None)} if uniform else {}),
    }.get(config.process, (None, None))
    if attention is None or (layout and size and config.block.window):
        wrong = "process" if attention is None else "block.window"
        value = config.process if attention is None else config.block.window
        raise ValueError(f"{workdir}: models of others have nothing like {wrong}={value!r}")
    model, spec = source.read(config, workdir), source.adapter(config)
    if model is None:
        model = _own(config, workdir, attention, size, layout)
    else:
        traits = dataclasses.replace(model.traits, attention=attention, block_size=size)
        model = dataclasses.replace(model, traits=traits)

    def init() -> PyTree:
        params = training.linen_init(model.model, 8)(jax.random.key(0))
        return params if spec is None else lora.init(jax.random.key(0), params, spec)

    if mesh is None:
        mesh = _mesh(fsdp=jax.device_count(), tensor=1)
    params = sharding.abstract_sharded(init, mesh)
    dtype = config.optimizer.ema_dtype
    average = jax.tree.map(lambda leaf: leaf.update(dtype=dtype), params)
    average = AverageOffset(average) if dtype == "bfloat16" else average
    whole = jax.NamedSharding(mesh, jax.P())
    step = jax.ShapeDtypeStruct((), "int32", sharding=whole)
    found = read_parameters(workdir, TrainState(step, params, average, *[None] * 5), last)
    if found is None:
        if spec is not None or not config.model.source:
            raise CheckpointError(f"{workdir} has no checkpoint yet; run --mode=train first")
        found = 0, source.load_params(config, mesh)
    if spec is None:
        return Opened(found[0], dataclasses.replace(model, params=found[1]), config, mesh)
    return Opened(found[0], model, config, mesh, spec, found[1])


def merged(run: Opened, workdir: files.Path, exactly: bool = False) -> hub.HubModel:
    """The model of a run with parameters, adapters merged; WorkdirError if their source is gone.

    Merged kernels are rounded to the dtype of the frozen ones, or stay float32 if ``exactly``.
    """
    if run.spec is None:
        return run.model
    base = source.load_frozen(run.config, run.mesh, workdir)
    dtype = "float32" if exactly else None
    return dataclasses.replace(run.model, params=lora.merge(base, run.adapters, run.spec, dtype))


def export(
    workdir: files.Path,
    to: str,
    last: bool = False,
    dtype: str | None = None,
    adapter: bool = False,
    moved: str | None = None,
) -> tuple[int, str]:
    """Write a run to a new directory in the layout of its source, or of Qwen3, Qwen2 or Llama.

    With ``adapter`` the adapters alone, in the layout of PEFT. ``moved``: where the source, whose
    frozen parameters are merged with adapters, is now. Returns the step, and the layout. A
    tokenizer of ours is written as theirs. Raises as :func:`open_run`, :func:`merged`,
    ``hub.save``, :func:`tokenizer_files` and ``hub.save_adapters``; ValueError for a run without
    adapters.
    """
    run = open_run(workdir, last, layout=True, moved=moved)
    if adapter and run.spec is None:
        raise ValueError(f"{workdir}: without adapters (adapter.name=''); leave out --adapter")
    if adapter:
        options = {"base": run.config.model.source, "dtype": dtype or None}
        hub.save_adapters(to, run.model, run.adapters, run.spec, **options)
        return run.step, "PEFT"
    model = merged(run, workdir, exactly=bool(dtype))
    own, made = workdir / "tokenizer.json", {}
    if model.tokenizer is None and own.exists():
        made = tokenizer_files(load_tokenizer(own), model.traits)
    directory = hub.save(to, model, dtype=dtype or None)
    if distributed.is_first():
        for name, content in made.items():
            files.write(directory / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return run.step, model.family.name


def chat_mesh(config: ConfigDict, given: bool = False) -> jax.sharding.Mesh:
    """Devices that share the parameters of a run; a conversation is one row, so without copies.

    All of them where there are fewer than the run had; ValueError if its mesh was ``given``.
    """
    fsdp, tensor, devices = config.mesh.fsdp, config.mesh.tensor, jax.device_count()
    if fsdp * tensor <= devices:
        return _mesh(fsdp, tensor)
    if given:
        raise ValueError(
            f"mesh.fsdp={fsdp} times mesh.tensor={tensor} needs more than the {devices} devices at "
            f"hand; give --config.mesh=fsdp={devices},tensor=1"
        )
    return _mesh(devices, tensor=1)


def _mesh(fsdp: int, tensor: int) -> jax.sharding.Mesh:
    devices = np.array(jax.devices()[: fsdp * tensor])
    return jax.sharding.Mesh(devices.reshape(1, fsdp, tensor), sharding.AXES)


def _own(
    config: ConfigDict, workdir: files.Path, attention: str, size: int | None, layout: bool
) -> hub.HubModel:
    """The network of a run that began from no source."""
    path = workdir / "tokenizer.json"
    if not path.exists():
        raise ValueError(f"{workdir}: a run over pictures has no layout of others")
    codec = load_tokenizer(path)
    traits = hub.Traits(
        vocab_size=codec.vocab_size,
        mask_id=codec.mask_id,
        eos_id=codec.eos_id,
        pad_id=codec.pad_id,
        bos_id=codec.mask_id if attention == "causal" else None,  # what such rows begin with
        attention=attention,
        block_size=size,
        length=config.data.prompt_length + config.data.answer_length or config.data.length,
    )
    network_config = network(codec.vocab_size, **config.model)
    try:
        return hub.of_transformer(network_config, traits, check=layout)
    except hub.Unsupported as error:
        raise ValueError(f"{workdir}: {error}; these are settings of the section model") from error
