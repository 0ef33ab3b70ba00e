"""Turns a config into objects: tables from names to factories, and nothing else."""

import difflib
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from mdm_jax import data, meter, models, objectives, schedules, tasks, training, variance
from mdm_jax.launch import config as launch_config
from mdm_jax.variance.moments import level_variance, second_moment

TASKS = {
    "sudoku": tasks.Sudoku,
    "chain": tasks.Chain,
    "run": tasks.Run,
    "add": tasks.Add,
    "countdown": tasks.Countdown,
}


def task_dataset(task: ConfigDict, prompt_length: int, answer_length: int) -> data.Dataset:
    """Generated problems; ``task`` is the config of that name."""
    chosen = lookup(TASKS, task.name, "data.task.name")(**settings(task, task.name))
    if task.noise_every:
        chosen = tasks.Noisy(chosen, task.noise_every)
    names = ("answer_padding", "train_rows", "valid_rows", "test_rows")
    return tasks.task_dataset(
        chosen,
        prompt_length=prompt_length,
        answer_length=answer_length,
        **{name: task[name] for name in names},
    )


DATA = {
    "embedded": data.embedded_text,
    "text": data.text,
    "jsonl": data.jsonl,
    "documents": data.documents,
    "tfds_text": data.tfds_text,
    "tfds_images": data.tfds_images,
    "digits": data.digits,
    "task": task_dataset,
}
VARIANCE = {
    "identity": variance.identity,
    "stratified": variance.stratified,
    "systematic": variance.systematic,
    "antithetic_pairs": variance.antithetic_pairs,
    "coarse_strata": variance.coarse_strata,
    "stratified_blocks": variance.stratified_blocks,
    "stratified_levels": variance.stratified_levels,
    "complement": variance.complement,
    "ppots": variance.ppots,
    "ppots_level_variance": functools.partial(variance.ppots, target=level_variance),
    "ppots_parametric": variance.ppots_parametric,
    "ppots_slopes": variance.ppots_slopes,
    "ema_bins": variance.ema_bins,
    "ema_bins_second_moment": functools.partial(variance.ema_bins, target=second_moment),
    "loss_history": variance.loss_history,
    "learned_quantile": variance.learned_quantile,
    "uncertainty_weighting": variance.uncertainty_weighting,
    "cdcd_warp": variance.cdcd_warp,
    "cdtd_warp": variance.cdtd_warp,
    "log_uniform": variance.log_uniform,
    "clipped": variance.clipped,
    "clipped_adaptive": variance.clipped_adaptive,
    "clipped_mixture": variance.clipped_mixture,
    "mirror": variance.mirror,
    "rotate": variance.rotate,
    "rotate_ranks": variance.rotate_ranks,
    "repeat": variance.repeat,
}
CLIP_CRITERIA = {
    "gradient_noise_to_signal": meter.gradient_noise_to_signal,
    "relative_variance": meter.relative_variance,
    "raw_variance": meter.raw_variance,
}
OPTIMIZERS = {"adamw": training.adamw, "muon": training.muon}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def lookup(table: Mapping[str, Any], name: str, field: str) -> Any:
    """``table[name]``; ValueError with the field and the nearest valid names otherwise."""
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(f"{field}: unknown name {name!r}; {hint}known are {', '.join(sorted(table))}")


def settings(config: ConfigDict, name: str) -> dict[str, Any]:
    """The sub-config that belongs to a named thing, empty if it has none."""
    return dict(config.get(name, {}))


def dataset(config: ConfigDict) -> data.Dataset:
    """The data of a run. A setting that its source does not know must keep its default."""
    chosen = dict(config.data)
    source = chosen.pop("source")
    kind = chosen.pop("kind")
    if source == "tfds":
        kinds = {"text": "tfds_text", "image": "tfds_images"}
        source = lookup(kinds, kind, "data.kind")
    factory = lookup(DATA, source, "data.source")
    known = inspect.signature(factory).parameters
    # As plain values: two ConfigDicts with the same settings are unequal if one of them is locked.
    given, defaults = config.data.to_dict(), launch_config.get_config().data.to_dict()
    unused = {k: v for k, v in given.items() if k in chosen and k not in known and v != defaults[k]}
    if unused:
        raise ValueError(
            f"data.source={source!r} does not read "
            + ", ".join(f"data.{name}={value!r}" for name, value in unused.items())
            + f"; it reads {', '.join(sorted(known)) or 'no settings'}"
        )
    for name in ("path", "name"):
        if name in known and not chosen[name]:
            raise ValueError(f"data.source={source!r} needs --config.data.{name}=...")
    optional = ("data_dir", "valid_path", "test_path")
    arguments = {k: None if k in optional and v == "" else v for k, v in chosen.items()}
    return factory(**{k: v for k, v in arguments.items() if k in known})


def check_unread(config: ConfigDict, sections: Sequence[str]) -> None:
    """Raises ValueError where a name that the run's process does not look at was changed."""
    defaults = launch_config.get_config()
    changed = [name for name in sections if config[name].name != defaults[name].name]
    if changed:
        raise ValueError(
            f"process={config.process!r} does not read "
            + ", ".join(
                f"{name}.name={config[name].name!r}, leave it at {defaults[name].name!r}"
                for name in changed
            )
        )


def network(config: ConfigDict, vocab_size: int) -> models.TransformerConfig:
    """Shape and arithmetic of the network's blocks."""
    fields = {k: v for k, v in config.model.items() if k not in ("patch_size", "logits_at")}
    for name in ("dtype", "param_dtype"):
        fields[name] = lookup(DTYPES, fields[name], f"model.{name}")
    return models.TransformerConfig(vocab_size=vocab_size, **fields)


def transform(config: ConfigDict, law: schedules.Law) -> variance.VarianceTransform:
    """The variance chain, in the configured order.

    Members work on quantiles; those that want to know the level of one are told the run's law.
    """
    members = []
    for name in config.variance.order:
        factory, chosen = lookup(VARIANCE, name, "variance.order"), settings(config.variance, name)
        known = inspect.signature(factory).parameters
        if "coordinate" in known:
            chosen["coordinate"] = lambda u: -law.icdf(u) / 8  # EDM2's log(sigma) / 4
        if "log_factor" in known and config.process == "gaussian":
            chosen["log_factor"] = lambda u: -law.icdf(u)  # to the error of the clean data
        members.append(factory(**chosen))
    return variance.chain(*members)


def monitors(config: ConfigDict, objective: objectives.Objective) -> list[training.Monitor]:
    """The running estimates that go to the metrics.

    Raises:
        ValueError: for an unknown name, or one that does not go with the run's chain.
    """
    chain = transform(config, objective.law)
    table = {
        "levels": functools.partial(training.level_monitor, objective),
        "gradient_noise": training.gradient_noise_monitor,
        "baseline": functools.partial(training.baseline_monitor, chain=chain),
    }
    return [
        lookup(table, name, "train.monitors")(**settings(config.monitors, name))
        for name in config.train.monitors
    ]


def optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """The optax chain, with warm-up and cosine."""
    c = config.optimizer
    schedule = training.warmup_cosine(c.peak, c.warmup_steps, config.train.steps, c.final_fraction)
    factory = lookup(OPTIMIZERS, c.name, "optimizer.name")
    common = {"b1": c.b1, "b2": c.b2, "weight_decay": c.weight_decay}
    return factory(schedule, clip_norm=c.clip_norm or None, **common, **settings(c, c.name))
