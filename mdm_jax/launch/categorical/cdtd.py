"""The process ``cdtd``: Gaussian diffusion of rows of numbers and categories."""

from ml_collections import ConfigDict

from mdm_jax import data, likelihood
from mdm_jax.data.tables import NUM_VALUES
from mdm_jax.gaussian import categorical
from mdm_jax.launch import names
from mdm_jax.launch.categorical.cdcd import law_and_path, refuse_unread
from mdm_jax.launch.families import Family, Record, number
from mdm_jax.launch.families import token_record as shared_record
from mdm_jax.launch.gaussian_family import gaussian_levels
from mdm_jax.launch.names import lookup, settings
from mdm_jax.launch.processes.parts import (
    Generate,
    Watch,
    evaluation_by,
    network,
    refuse_guidance,
)
from mdm_jax.types import Array


def cdtd(config: ConfigDict, dataset: data.Dataset, _source: None = None) -> Family:
    """CDTD (Mueller et al. 2025); ValueError for other data than tables, or foreign settings."""
    if not dataset.columns:
        raise ValueError("process=cdtd is of tables: data.source=table with data.path, or diabetes")
    if not config.model.condition_on_logsnr or config.model.self_conditioning:
        raise ValueError(
            "process=cdtd needs --config.model.condition_on_logsnr=True and takes no "
            "model.self_conditioning"
        )
    c, g, size = config.sample, config.gaussian, config.cdcd.size
    law, path = law_and_path(g, "cdtd")
    refuse_unread(config, "cdtd")
    refuse_guidance(config)
    cells = categorical.cells_of(dataset.columns, NUM_VALUES)
    model = categorical.TableTransformer(network(1, **config.model), cells, size, path)
    sampler = lookup(names.GAUSSIAN_SAMPLERS, c.sampler, "sample.sampler")(**settings(c, c.sampler))

    def named_levels(grid: str, num_steps: int) -> Array:
        return gaussian_levels(grid or "uniform_logsnr", num_steps, g, law)

    def generator(num_steps: int, levels: Array | None = None, watch: Watch = None) -> Generate:
        if watch is not None:
            raise ValueError("process=cdtd: a table being drawn cannot be shown; leave out --gif")
        levels = named_levels(c.grid, num_steps) if levels is None else levels
        return categorical.make_table_generator(model, sampler, levels)

    def estimator(passes: int, _replicates: int) -> likelihood.Estimator:
        return categorical.table_estimator(model, low=g.low, high=g.high, passes=passes)

    return Family(
        objective=categorical.cdtd_loss(law, path, cells, size),
        model=model,
        apply_fn=categorical.table_apply(model),
        likelihood=evaluation_by(estimator),
        estimator=estimator,
        generator=generator,
        takes_steps=True,
        levels_from=f"law {g.law or 'uniform_logsnr'}",
        noise_axis="share of the logSNR range, clean to noisy",
        levels=named_levels,
        follows_warp=True,
        unread=("corruption", "law", "weighting"),
        record=shared_record,
        details=_details,
    )


def _details(record: Record) -> list[str]:
    value, error = record["nats_per_element"], record["standard_error_nats_per_element"]
    shown = f"{value:.3f} ± {number(error)}"
    return [
        f"  {shown} nats per cell: a bound at one noise level of all columns;",
        "  numbers count by their density in standard deviations, so that it can be negative",
    ]
