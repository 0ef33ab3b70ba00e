"""Runs that begin from a model of others: ``model.source``."""

import copy
import dataclasses
import pathlib
import tempfile
from collections.abc import Collection
from typing import Any

import jax
from ml_collections import ConfigDict

from mdm_jax import distributed, files, hub, training
from mdm_jax.hub.files import NOTES, fingerprint
from mdm_jax.launch import config as launch_config
from mdm_jax.launch.workdir import WorkdirError, read_config, resolved, saved_config
from mdm_jax.models import lora
from mdm_jax.models.lora import Lora
from mdm_jax.types import PyTree

FOLDER = "source"
"""Below a workdir: what its run needs of the directory that it began from, but for weights."""

FREE = ("source", "attention", "dtype", "param_dtype", "remat", "scan_layers", "logits_at")
"""Settings of the section ``model`` that a source leaves free."""

TOKENIZER = "source"
"""``data.tokenizer`` of a run whose source has one."""

_PROCESSES = {
    "bidirectional": ("masked", "block"),
    "causal": ("autoregressive",),
    "block": ("block",),
}


def read(config: ConfigDict, workdir: files.Path | None = None) -> hub.HubModel | None:
    """The model that a run begins from, without parameters; None without ``model.source``.

    From the workdir, where the run has begun. A causal one is converted to its bidirectional
    counterpart unless the process is autoregressive. ValueError as ``hub.describe``, and for
    settings of ``convert`` that such a run does not read.
    """
    c = config.model
    if not c.source:
        _check_convert(config, None)
        return None
    folder = None if workdir is None else workdir / FOLDER
    begun = folder is not None and (folder / NOTES).exists()
    source = _with_mask(hub.describe(_local(folder) if begun else c.source, **_free(config)))
    _check_convert(config, source)
    return hub.bidirectional(source, config.convert.shift) if _converts(config, source) else source


def filled(
    config: ConfigDict,
    source: hub.HubModel | None,
    given: Collection[str] = (),
    workdir: files.Path | None = None,
) -> ConfigDict:
    """A copy of the config with all that the source fixes, and its range of masking rates.

    The range that BD3-LM was trained on becomes ``variance.clipped``, unless ``variance.order``
    or the law are set otherwise; the config of a run in ``workdir`` holds what was chosen.

    ValueError names settings that contradict it: those that differ from it and from the default, or
    are among ``given`` (paths such as "model.width").
    """
    if source is None:
        return config
    config, defaults = copy.deepcopy(config), launch_config.get_config()
    traits, wrong = source.traits, []
    fixed = {
        f"model.{name}": getattr(source.config, name, default)
        for name, default in defaults.model.items()
        if name not in (*FREE, "patch_size")
    }
    if source.tokenizer is not None:
        fixed["data.tokenizer"] = TOKENIZER
    processes = _PROCESSES[traits.attention]
    if traits.shift:
        processes = ("masked",)
    if source.family.name in ("duo", "udlm"):
        processes = ("uniform",)
    if config.process not in processes:
        fixed["process"] = processes[0]
    if traits.attention == "block":
        fixed["block.size"] = traits.block_size
    with config.unlocked():
        for path, value in fixed.items():
            *sections, name = path.split(".")
            section, default = config, defaults
            for part in sections:
                section, default = section[part], default[part]
            if section[name] != value and (section[name] != default[name] or path in given):
                wrong.append(f"{path}={section[name]!r} (it has {value!r})")
            section[name] = value
    if traits.clip is not None:
        _clip(config, traits.clip, given, workdir)
    if wrong:
        raise ValueError(
            f"model.source={config.model.source}, a model of the family {source.family.name}, "
            f"contradicts {', '.join(wrong)}; leave these settings out"
        )
    return config


def _clip(
    config: ConfigDict,
    clip: tuple[float, float],
    given: Collection[str],
    workdir: files.Path | None,
) -> None:
    """Train on masking rates in ``clip``, where the config does not say otherwise."""
    own, default = config.variance, launch_config.get_config()
    begun = workdir is not None and read_config(workdir) is not None
    stored = saved_config(workdir).variance if begun else None
    ranges = dict(zip(("low", "high"), clip))
    free = {
        name: "variance.clipped." + name not in given
        and own.clipped[name] == default.variance.clipped[name]
        and (stored is None or stored.clipped[name] != own.clipped[name])
        for name in ranges
    }
    if config.law.name != default.law.name:  # quantiles of another law are no masking rates
        return
    if (
        "variance.order" not in given
        and own.order == default.variance.order
        and (stored is None or stored.order != own.order)
    ):
        own.order = ("stratified", "clipped")
    if "clipped" in own.order:
        own.clipped.update({name: value for name, value in ranges.items() if free[name]})


def load_params(config: ConfigDict, mesh: jax.sharding.Mesh) -> PyTree:
    """Parameters of the source, each read where it belongs on the mesh."""
    return _with_mask(hub.load(config.model.source, mesh=mesh, **_free(config))).params


def load_frozen(config: ConfigDict, mesh: jax.sharding.Mesh, workdir: files.Path) -> PyTree:
    """:func:`load_params` for a run that keeps adapters alone; WorkdirError, in all processes, if
    the source has gone, or changed since the run was started."""
    problem = None
    if distributed.is_first():
        advice = (
            f"{workdir} holds adapters of it alone; put it back, or name where it is now: "
            "--config.model.source=DIR --allow_config_change"
        )
        try:
            directory = hub.resolve(config.model.source)
            notes = workdir / FOLDER / NOTES
            if notes.exists() and files.read_json(notes).get("fingerprint") != fingerprint(
                directory
            ):
                problem = f"model.source={directory} has changed, and {advice}"
        except ValueError as error:
            problem = f"model.source has gone ({error}), and {advice}"
    problem = distributed.from_first(problem)
    if problem is not None:
        raise WorkdirError(problem)
    return load_params(config, mesh)


def adapter(config: ConfigDict) -> Lora | None:
    """What the section ``adapter`` describes; None where all parameters are trained.

    ValueError for settings that are not read, or contradict it.
    """
    c, default = resolved(config), resolved(launch_config.get_config())
    own = c["adapter"]
    if not own["name"]:
        unread = [f"{name}={value!r}" for name, value in own.items()
                  if value != default["adapter"][name]]  # fmt: skip
        if unread:
            raise ValueError(
                f"adapter.{', adapter.'.join(unread)} would not be read, as all parameters are "
                "trained; add --config.adapter.name=lora, or leave it out"
            )
        return None
    if not c["model"]["source"]:
        raise ValueError(
            "adapter.name=lora needs model.source, the model whose frozen parameters are read "
            "again whenever the run is; a run of your own becomes one by mdm export"
        )
    if c["train"]["init_from"]:
        raise ValueError(
            "adapter.name=lora does not read train.init_from; start from that run's model (mdm "
            "export, then model.source=DIR), or its adapters (mdm export --adapter, then "
            "adapter.init_from=DIR)"
        )
    if c["model"]["param_dtype"] != default["model"]["param_dtype"]:
        raise ValueError(
            f"model.param_dtype={c['model']['param_dtype']}: adapters are float32; "
            "adapter.base_dtype is of the frozen parameters"
        )
    return Lora(**{f.name: config.adapter[f.name] for f in dataclasses.fields(Lora)})


def describe(
    source: hub.HubModel | None, length: int, shapes: PyTree, spec: Lora | None
) -> list[str]:
    """Lines about a run's model: a warning about rows of more tokens than the source states, and
    what is trained of a network with parameters of these ``shapes``, if not all of it."""
    stated = None if source is None else source.traits.length
    lines = []
    if stated is not None and length > stated:
        lines.append(
            f"WARNING: rows of {length} tokens, of which config.json of the model states at most "
            f"{stated}; positions beyond are new to it"
        )
    if spec is None:
        return lines
    adapters = jax.eval_shape(lambda: lora.init(jax.random.key(0), shapes, spec))
    chosen = {path[-2] for path in lora.kernels(shapes, spec)}
    lines.append(
        f"trained: {training.num_params(adapters):,} parameters of adapters of rank {spec.rank}, "
        f"scale {spec.scale:g}, at {', '.join(sorted(chosen))}; the model's are frozen in "
        f"{source.config.param_dtype.name}"
    )
    return lines


def keep(config: ConfigDict, source: hub.HubModel | None, workdir: files.Path) -> None:
    """Write what a run needs of its source, with its fingerprint, below the workdir.

    WorkdirError if there is that of another one, which has changed since.
    """
    if source is None or not distributed.is_first():
        return
    directory, folder = hub.resolve(config.model.source), workdir / FOLDER
    now = fingerprint(directory)
    if (folder / NOTES).exists():
        if files.read_json(folder / NOTES).get("fingerprint") != now:
            raise WorkdirError(
                f"{directory} has changed since the run in {workdir} was started from it; name "
                "another --workdir, or put the model back"
            )
        return
    with tempfile.TemporaryDirectory() as made_in:
        hub.outline(pathlib.Path(made_in), source, source=config.model.source, fingerprint=now)
        folder.mkdir(parents=True, exist_ok=True)
        # The notes last: they tell that the rest is whole.
        for path in sorted(pathlib.Path(made_in).iterdir(), key=lambda path: path.name == NOTES):
            files.write(folder / path.name, path.read_bytes())


def _free(config: ConfigDict) -> dict[str, Any]:
    """Settings of the network that a source leaves free."""
    c = config.model
    free = {name: c[name] for name in ("attention", "dtype", "param_dtype", "remat", "scan_layers")}
    if config.adapter.name:
        free["param_dtype"] = config.adapter.base_dtype or "stored"
    return free


def _converts(config: ConfigDict, source: hub.HubModel) -> bool:
    return source.traits.attention == "causal" and config.process != "autoregressive"


def _check_convert(config: ConfigDict, source: hub.HubModel | None) -> None:
    given = [f"convert.{name}={value!r}" for name, value in config.convert.items() if value]
    if given and (source is None or not _converts(config, source)):
        raise ValueError(
            f"{', '.join(given)}: read where a causal model.source becomes process=masked or block;"
            f" this run has model.source={config.model.source!r}, process={config.process!r}; "
            "leave these settings out"
        )
    if config.convert.shift and config.process == "block":
        raise ValueError(
            "convert.shift: a block's first token would be predicted from the block before; block "
            "models (dllm's BD3-LM, SDAR) are not shifted, so leave it out, or take process=masked"
        )


def _with_mask(model: hub.HubModel) -> hub.HubModel:
    added = model.tokenizer is not None and model.tokenizer.mask_added
    return hub.with_mask_row(model) if added else model


def _local(folder: files.Path) -> pathlib.Path:
    """The folder, or a copy of one in a bucket."""
    if not files.is_remote(folder):
        return pathlib.Path(folder)
    copied = pathlib.Path(tempfile.mkdtemp())
    for path in folder.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    return copied
