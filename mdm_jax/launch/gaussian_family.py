"""The Gaussian process: recipe, sampling grids and family of a run of pictures."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mdm_jax import data, gaussian, schedules
from mdm_jax.checks import check_interval
from mdm_jax.gaussian import samplers as gaussian_samplers
from mdm_jax.gaussian.recipes import Recipe
from mdm_jax.gaussian.samplers import spacings
from mdm_jax.gaussian.schedules import truncated
from mdm_jax.gaussian.spectrum import radial_spectrum
from mdm_jax.launch import names
from mdm_jax.launch.families import Family, Record, number
from mdm_jax.launch.names import lookup, settings
from mdm_jax.launch.processes.parts import Generate, Watch, network
from mdm_jax.objectives import Objective
from mdm_jax.samplers.sampler import row_keys, row_streams
from mdm_jax.schedules import grids
from mdm_jax.types import Array

_TABLE_STEPS = 1000
"""Steps of the table of the run's law that the grids leading, linspace and trailing read."""

_SPECTRUM_ROWS = 4096


def gaussian_family(config: ConfigDict, dataset: data.Dataset, _source: None = None) -> Family:
    """Gaussian diffusion of pictures by recipe; ValueError for text or self-conditioning."""
    if dataset.event_shape is None:
        raise ValueError(
            'process="gaussian" needs pictures (data.source=digits, or tfds with kind=image); for '
            'text use process="masked"'
        )
    if config.model.self_conditioning:
        raise ValueError("process=gaussian does not take model.self_conditioning")
    c, g = config.sample, config.gaussian
    recipe = gaussian_recipe(g, dataset)
    guide = _guidance(config, dataset)
    if config.train.noise_by == "example" and g.conditional:
        raise ValueError("gaussian.conditional takes train.noise_by=slot, the default")
    num_values = dataset.vocab_size - 1  # without the mask
    values = gaussian.scaled_integers(num_values)
    model = gaussian.PictureTransformer(
        network(1, **config.model),
        dataset.event_shape,
        config.model.patch_size,
        dataset.num_classes if g.conditional else 0,
    )
    sampler = lookup(names.GAUSSIAN_SAMPLERS, c.sampler, "sample.sampler")(**settings(c, c.sampler))

    def apply_fn(params, inputs, logsnr, documents=None):
        """The recipe's output, from inputs scaled to unit variance."""
        scaled = gaussian.precondition(
            functools.partial(model.apply, params), recipe.path, g.sigma_data
        )
        return scaled(inputs, logsnr, documents)

    def likelihood_of(passes: int, replicates: int) -> Callable[..., gaussian.GaussianLikelihood]:
        return gaussian.make_gaussian_likelihood(
            apply_fn,
            output=recipe.output,
            path=recipe.path,
            decoder=gaussian.grey_value_decoder(num_values),
            low=g.low,
            high=g.high,
            passes=passes,
            replicates=replicates,
            values=values,
        )

    first = g.low if c.restore_from is None else c.restore_from

    def named_levels(grid: str, num_steps: int) -> Array:
        return gaussian_levels(grid, num_steps, {**g, "low": first}, recipe.law)

    def grey_values(pictures: Array, xp: Any = jnp) -> Array:
        top = num_values - 1
        return xp.clip(xp.round((pictures + 1) * top / 2), 0, top).astype(xp.int32)

    def noisy(key: Array, canvas: Array, row_offset: Array | int = 0) -> Array:
        """The pictures [B, L] with the noise of level ``sample.restore_from``, divided by alpha."""
        data = values(jnp.asarray(canvas))
        keys = row_streams(row_keys(key, row_offset, len(data)), "restored")
        noise = jax.vmap(lambda k: jax.random.normal(k, data.shape[1:], data.dtype))(keys)
        return data + math.exp(-0.5 * first) * noise

    def generator(num_steps: int, levels: Array | None = None, watch: Watch = None) -> Generate:
        watched = sampler
        if watch is not None:
            show, ordered = watch
            watched = gaussian_samplers.shown(
                sampler, lambda x: show(grey_values(x, np)), g.sigma_data, ordered
            )
        draw = gaussian_samplers.make_gaussian_generator(
            guide(apply_fn),
            watched,
            named_levels(c.grid, num_steps) if levels is None else levels,
            (dataset.length,),
            output=recipe.output,
            path=recipe.path,
            data_std=g.sigma_data,
        )

        def generate(params, key, canvas, documents=None, row_offset=0):
            """Grey values, of the canvas's shape."""
            known = documents if g.conditional else None
            start = None
            if c.restore_from is not None:
                start = recipe.path.alpha(first) * noisy(key, canvas, row_offset)
            drawn = draw(params, key, len(canvas), known, start, row_offset)
            return grey_values(drawn)

        return generate

    def objective_of(recipe: Recipe) -> Objective:
        dropout = g.class_dropout if g.conditional else 0.0
        return gaussian.gaussian_loss(recipe, values, class_dropout=dropout)

    return Family(
        objective=objective_of(recipe),
        model=model,
        apply_fn=apply_fn,
        likelihood=likelihood_of,
        generator=generator,
        takes_steps=True,
        levels_from=", ".join([f"recipe {g.recipe}", *_changes(g)]),
        degraded=None
        if c.restore_from is None
        else lambda *inputs: grey_values(noisy(*inputs), np),
        noise_axis="sigmoid(-logSNR)",
        levels=named_levels,
        rules=("law", "uniform_logsnr", "edm_rho", "cosine"),
        unread=("corruption", "law", "weighting"),
        recipe=recipe,
        objective_of=objective_of,
        input_dtype=jnp.float32,
        record=_gaussian_record,
        details=_gaussian_details,
    )


def _guidance(config: ConfigDict, dataset: data.Dataset) -> Callable[[Callable], Callable]:
    """What ``sample.guidance`` makes of an ``apply_fn``; ValueError where classes are unknown."""
    c, g = config.sample, config.gaussian
    guided = c.guidance not in (0.0, 1.0)
    if g.conditional and not dataset.num_classes:
        raise ValueError(
            "gaussian.conditional needs pictures with classes: data.source=digits, or TFDS with "
            "--config.data.label_field=label"
        )
    if (guided or c.classes) and not g.conditional:
        name = f"sample.guidance={c.guidance:g}" if guided else f"sample.classes={c.classes}"
        raise ValueError(f"{name} is for models of classes: train with gaussian.conditional=True")
    if guided and not g.class_dropout:
        raise ValueError(
            f"sample.guidance={c.guidance:g} needs a model that was trained without classes too: "
            "gaussian.class_dropout above 0"
        )
    if wrong := [each for each in c.classes if each >= dataset.num_classes]:
        raise ValueError(
            f"sample.classes: {wrong[0]} is none of the classes 0 to {dataset.num_classes - 1}"
        )
    own = dict(c.class_guidance)
    check_interval("sample.class_guidance", own["low"], own["high"])
    if not guided:
        return lambda apply_fn: apply_fn

    def guide(apply_fn: Callable[..., Array]) -> Callable[..., Array]:
        def guided_fn(params, inputs, logsnr, documents=None):
            """The output, guided towards the class."""
            both = gaussian_samplers.guided(
                lambda x, level, known: apply_fn(params, x, level, known),
                lambda x, level, _known: apply_fn(params, x, level, None),
                c.guidance,
                **own,
            )
            return both(inputs, logsnr, documents)

        return guided_fn

    return guide


def gaussian_recipe(section: Mapping[str, Any], dataset: data.Dataset | None = None) -> Recipe:
    """The configured recipe, with the parts that are set by name in place of its own.

    The law is changed by the modifiers in order and truncated to [low, high]; below ``low`` reaches
    only ``zero_terminal``. A weighting by name that refers to a law, such as ``unit_output`` or
    ``min_snr``, takes the law before that truncation; "" keeps the recipe's W under any law;
    "spectrum" reads training pictures of ``dataset``. ValueError for unknown names and parts that
    do not fit.
    """
    name, low, high = section["recipe"], section["low"], section["high"]
    recipe = _build("gaussian.recipe", names.RECIPES, name, settings(section, name))
    law, other = recipe.law, section["law"]
    if other:
        law = _build("gaussian.law", names.GAUSSIAN_LAWS, other, settings(section, other))
    for modifier in section["modifiers"]:
        if modifier == "zero_terminal":  # moves the law's lowest level to pure noise
            law, low = truncated_to(law, low, high), -np.inf
        own = settings(section, modifier)
        law = _build("gaussian.modifiers", names.GAUSSIAN_MODIFIERS, modifier, own, base=law)
    parts = {"law": law, "path": recipe.path, "output": recipe.output}
    for part, table in (("path", names.PATHS), ("output", names.OUTPUTS)):
        if section[part]:
            own = {"sigma_data": section["sigma_data"]}
            parts[part] = _build(f"gaussian.{part}", table, section[part], {}, **own)
    weighting, name = recipe.weighting, section["weighting"]
    if name:
        parts["sigma_data"] = section["sigma_data"]
        if name == "spectrum":
            parts["spectrum"] = _spectrum(dataset)
        table, own = names.GAUSSIAN_WEIGHTINGS, settings(section, name)
        weighting = _build("gaussian.weighting", table, name, own, **parts)
    elif low == -np.inf and float(weighting.support[0]) > low:
        raise ValueError(
            f"gaussian.modifiers: zero_terminal draws levels below {float(weighting.support[0]):g},"
            f" where the weighting of recipe {section['recipe']} is zero; set "
            "--config.gaussian.weighting, as in unit_output"
        )
    return Recipe(truncated_to(law, low, high), weighting, parts["output"], parts["path"])


def _spectrum(dataset: data.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Of the first training pictures, in the units of the model."""
    rows = data.gather(dataset.train, np.arange(min(_SPECTRUM_ROWS, len(dataset.train))))
    values = gaussian.scaled_integers(dataset.vocab_size - 1)(rows.tokens)
    return radial_spectrum(np.asarray(values).reshape(-1, *dataset.event_shape))


def gaussian_levels(
    grid: str, num_steps: int, section: Mapping[str, Any], law: schedules.Law
) -> np.ndarray:
    """[n + 1] levels of a named grid: from ``low``, or pure noise if ``law`` begins there, to data.

    The last step goes from the last but one level to the denoiser's estimate, +inf. ``grid``: "law"
    for equal times of the run's ``law``, a Gaussian schedule, "edm", "uniform_" and a quantity of
    ``spacings.QUANTITIES``, or "leading", "linspace" or "trailing" in a table of the law; "" is
    "cosine". ValueError for other names.
    """
    low, high, grid = section["low"], section["high"], grid or "cosine"
    quantity = grid.removeprefix("uniform_")
    if grid in spacings.TABLE_SPACINGS:
        table = np.asarray(grids.from_law(law, _TABLE_STEPS))[-2::-1]
        return np.array(spacings.from_table(table, num_steps, grid))
    if grid == "edm":
        levels = spacings.edm(num_steps, np.exp(-high / 2), np.exp(-low / 2))
    elif quantity != grid and quantity in spacings.QUANTITIES:
        levels = spacings.uniform_in(quantity, num_steps, low, high)
    elif grid == "law":
        levels = spacings.uniform_time(law, num_steps)
    else:
        known = dict.fromkeys(names.GAUSSIAN_GRIDS) | names.GAUSSIAN_LAWS
        named = _build("sample.grid", known, grid, settings(section, grid))
        levels = spacings.uniform_time(truncated_to(named, low, high), num_steps)
    return open_levels(levels, law)


def open_levels(levels: Array, law: schedules.Law) -> np.ndarray:
    """The levels with the last, and the first if the law begins at pure noise, made infinite."""
    levels = np.array(levels)
    levels[-1] = np.inf
    if float(law.support[0]) == -np.inf:
        levels[0] = -np.inf
    return levels


def _build(
    field: str,
    table: Mapping[str, Callable[..., Any]],
    name: str,
    own: Mapping[str, Any],
    **of_run: Any,
) -> Any:
    """``table[name](**own)``, with those of ``of_run`` that it takes; ValueError with the field."""
    factory = lookup(table, name, field)
    known = inspect.signature(factory).parameters
    try:
        return factory(**{k: v for k, v in of_run.items() if k in known}, **own)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{field}: {error}") from error


def _changes(section: Mapping[str, Any]) -> list[str]:
    """What a run changes of its recipe, for display."""
    parts = [f"{part} {section[part]}" for part in PARTS if section[part]]
    return parts + [f"law {name}" for name in section["modifiers"]]


PARTS = ("law", "weighting", "output", "path")


def truncated_to(law: schedules.Law, low: float, high: float) -> schedules.Law:
    """The law, truncated to [low, high] where it reaches further."""
    first, last = (float(end) for end in law.support)
    if first >= low and last <= high:
        return law
    return truncated(law, max(low, first), min(high, last))


def _gaussian_record(result: gaussian.GaussianLikelihood) -> Record:
    """As :func:`token_record`, for pictures."""
    shared = {
        "nats_per_element": "nats_per_dimension",
        "standard_error_nats_per_element": "standard_error_nats_per_dimension",
        "bits_per_unit": "bits_per_dimension",
        "standard_error_bits_per_unit": "standard_error_bits_per_dimension",
        "data_standard_error_bits_per_unit": "data_standard_error_bits_per_dimension",
    }
    record = result.to_dict()
    return record | {name: record[own] for name, own in shared.items()}


def _gaussian_details(record: Record) -> list[str]:
    parts = record["parts_bits_per_dimension"]
    errors = record["standard_error_parts_bits_per_dimension"]
    terms = (f"{name} {value:.3f} ± {number(errors[name])}" for name, value in parts.items())
    return ["  of which " + ", ".join(terms)]
