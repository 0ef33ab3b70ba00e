"""The data of a run, from the section ``data`` of its config."""

import inspect
import pathlib
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from mdm_jax import data, hub, tasks
from mdm_jax.data.tokenizers import load_tokenizer
from mdm_jax.draws import DrawSpec
from mdm_jax.launch import config as launch_config
from mdm_jax.launch import names
from mdm_jax.launch.names import lookup, settings
from mdm_jax.objectives.objective import Objective
from mdm_jax.variance.transform import VarianceTransform

_OWN = ("char", "byte", "bpe")
"""Values of ``data.tokenizer`` that are no paths."""


def dataset(config: ConfigDict, model: hub.HubModel | None = None) -> data.Dataset:
    """Data of a run; ValueError if a setting that its source does not read was changed.

    Texts get the tokenizer of the ``model`` that the run begins from, or must have its size.
    """
    values = config.data.to_dict()
    source, _ = values.pop("source"), values.pop("buckets")  # of the run: build.Experiment
    if source == "tfds":
        source = lookup({"text": "tfds_text", "image": "tfds_images"}, values["kind"], "data.kind")
    factory = lookup(names.DATA, source, "data.source")
    known = set(inspect.signature(factory).parameters) & set(values)
    if source.startswith("task"):
        known = known - {"answer_padding"} | {"task"}  # which has one of its own
    # As plain values: two ConfigDicts with the same settings are unequal if one of them is locked.
    defaults = launch_config.get_config().data.to_dict()
    if model is not None and model.tokenizer is not None:
        values["tokenizer"] = defaults["tokenizer"] = model.tokenizer
    elif values["tokenizer"] not in _OWN and pathlib.Path(values["tokenizer"]).is_dir():
        values["tokenizer"] = _read(values["tokenizer"])
    unread = [
        f"data.{name}={value!r} (leave it at {defaults[name]!r})"
        for name, value in values.items()
        if name != "kind" and name not in known and value != defaults[name]
    ]
    if unread:
        raise ValueError(
            f"data.source={source!r} does not read {', '.join(unread)}; it reads "
            f"{', '.join(sorted(known)) or 'no settings'}"
        )
    for name in ("path", "name"):
        if name in known and not values[name]:
            raise ValueError(f"data.source={source!r} needs --config.data.{name}=...")
    arguments = {name: value for name, value in values.items() if name in known}
    for name in {"data_dir", "cache", "valid_path", "test_path"} & arguments.keys():
        arguments[name] = arguments[name] or None
    if source == "chat":
        codec = arguments["tokenizer"]
        if str(codec).endswith(".json"):
            codec = arguments["tokenizer"] = load_tokenizer(codec)
        arguments["renderer"] = chat_template(codec)
    if source.startswith("task"):
        made = _task_dataset(factory, arguments.pop("task"), **arguments)
    else:
        made = factory(**arguments)
    if model is not None:
        own = made.vocab_size, made.mask_id
        wanted = model.traits.vocab_size, model.traits.mask_id
        if model.tokenizer is not None:
            wanted = wanted[0], model.tokenizer.mask_id
        if own[0] != wanted[0] or wanted[1] not in (None, own[1]):
            raise ValueError(
                f"the data have {own[0]} token ids with mask token {own[1]}, the model "
                f"{config.model.source} has {wanted[0]} with mask token {wanted[1]}; choose data "
                "of text and, where the model has no tokenizer, a data.tokenizer of as many ids"
            )
    return made


def buckets(
    config: ConfigDict,
    dataset: data.Dataset,
    objective: Objective,
    spec: DrawSpec,
    transform: VarianceTransform,
) -> data.Buckets | None:
    """Training rows by length (``data.buckets``); None where all batches have the longest.

    ``spec`` is of the draw of a batch of the longest. ValueError as ``data.bucketed``, and for a
    transform whose state depends on the length.
    """
    lengths = tuple(config.data.buckets)
    if not lengths:
        return None
    align = config.block.size if config.process == "block" else 1
    found = data.bucketed(dataset.train, lengths, spec.batch_size, align)
    specs = [objective.spec(spec.batch_size, length) for length in found.lengths]
    shapes = {str(jax.eval_shape(lambda own=own: transform.init(own))) for own in specs}
    if len(shapes) > 1:
        raise ValueError(
            f"data.buckets={lengths}: {transform.name} learns for each level of a row by itself, "
            "of which shorter rows have fewer; leave out the buckets, or choose another "
            "variance.order"
        )
    return found


def chat_template(codec: Any) -> hub.ChatRenderer | None:
    """The chat template of a tokenizer of others; None without one, for the plain template."""
    return hub.ChatRenderer(codec) if getattr(codec, "templates", None) else None


def _read(directory: str) -> hub.HubTokenizer:
    """The tokenizer of a model's directory; one without a mask token gets it at the first free id.

    ValueError names what is wrong.
    """
    try:
        return hub.HubTokenizer.read(directory, mask_token=hub.MASK_TOKEN)
    except ValueError as error:
        raise ValueError(f"data.tokenizer: {error}") from error


def _task_dataset(
    factory: Callable[..., data.Dataset], section: dict[str, Any], **arguments: Any
) -> data.Dataset:
    """``task_dataset`` or ``task_file_dataset``; ValueError for numbers of rows of files."""
    name = section["name"]
    task = lookup(names.TASKS, name, "data.task.name")(**settings(section, name))
    if section["noise_every"]:
        task = tasks.Noisy(task, section["noise_every"])
    read, defaults = inspect.signature(factory).parameters, launch_config.get_config().data.task
    for row in launch_config.TASK_ROWS:
        if row in read:
            arguments[row] = section[row]
        elif section[row] != defaults[row]:
            raise ValueError(
                f"data.source='task_file' has the rows of its files, but data.task.{row} is "
                f"{section[row]}; leave it at {defaults[row]}"
            )
    return factory(task, **arguments)


def split_by_name(dataset: data.Dataset, split: str) -> tuple[str, data.RowSource]:
    """A split by name, or the validation split if it is empty; its name and rows."""
    splits = {"valid": dataset.valid, "test": dataset.test}
    source = lookup(splits, split, "evaluate.final_split")
    if len(source):
        return split, source
    if len(dataset.valid):
        return "valid", dataset.valid
    if len(dataset.test):
        raise ValueError(
            f"evaluate.final_split={split!r}: the data have no validation rows, only "
            f"{len(dataset.test)} test rows; take --config.evaluate.final_split=test, or give "
            "data.fractions a second part"
        )
    raise ValueError(
        f"evaluate.final_split={split!r}: the data have neither test nor validation rows to "
        "evaluate on"
    )
