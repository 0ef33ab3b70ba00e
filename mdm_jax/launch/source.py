"""Runs that begin from a model of others: ``model.source``."""

import copy
import pathlib
import tempfile
from collections.abc import Collection

import jax
from ml_collections import ConfigDict

from mdm_jax import distributed, files, hub
from mdm_jax.hub.files import NOTES, fingerprint
from mdm_jax.launch import config as launch_config
from mdm_jax.launch.workdir import WorkdirError, read_config, saved_config
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
    counterpart unless the process is autoregressive. ValueError as ``hub.describe``.
    """
    c = config.model
    if not c.source:
        return None
    folder = None if workdir is None else workdir / FOLDER
    begun = folder is not None and (folder / NOTES).exists()
    free = {name: c[name] for name in ("attention", "dtype", "param_dtype", "remat", "scan_layers")}
    source = _with_mask(hub.describe(_local(folder) if begun else c.source, **free))
    converted = source.traits.attention == "causal" and config.process != "autoregressive"
    return hub.bidirectional(source) if converted else source


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
    c = config.model
    kinds = {name: c[name] for name in ("attention", "dtype", "param_dtype", "remat")}
    return _with_mask(hub.load(c.source, mesh=mesh, scan_layers=c.scan_layers, **kinds)).params


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
