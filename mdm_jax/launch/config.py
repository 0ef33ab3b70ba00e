"""Every setting of a run: default, allowed values, unit, and one line of meaning.

A config is data: a name refers to :mod:`~mdm_jax.launch.names`, a section of that name holds its
settings, and the command line can set any: ``--config.variance.order="('stratified',)"``. Settings
of a factory come from its signature (:mod:`mdm_jax.checks`); here stand those of the launcher, and
defaults that differ. :func:`get_config` makes the config, :func:`check_config` holds it to them.
"""

import dataclasses
import difflib
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from mdm_jax import data, models, samplers, training
from mdm_jax.checks import Name, NameOrChain, Plain, Real, Whole, checked
from mdm_jax.gaussian import categorical
from mdm_jax.gaussian.samplers import guided
from mdm_jax.launch import names
from mdm_jax.launch.alignment.settings import AlignmentSettings
from mdm_jax.launch.auto.settings import AutoSettings, FitSettings
from mdm_jax.launch.names import Setting, defaults, sections
from mdm_jax.launch.start.scaled import RULES
from mdm_jax.likelihood.subsets import LEVELS, MASKS
from mdm_jax.meter.panel import PanelSettings
from mdm_jax.models.lora import Lora

TASK_ROWS = ("answer_padding", "train_rows", "valid_rows", "test_rows")
"""Settings of the rows of any task."""
LOOP_OWN = ("views", "unit", "biased", "profile_directory")
"""Options of the loop that follow from other settings."""

_COUNT, _NATURAL = "[1, 2e9]", "[0, 2e9]"


@checked
@dataclasses.dataclass(frozen=True)
class MeasureSettings:
    """How much the mode ``variance`` measures."""

    rows: Annotated[int, Whole("[2, 1e6]", "rows", "of the decomposition")] = 32
    levels_per_row: Annotated[int, Whole("[2, 1e6]", "", "noise levels of a row")] = 4
    masks_per_level: Annotated[int, Whole("[2, 1e6]", "", "masks of a row at a level")] = 2
    probes: Annotated[int, Whole("[1, 1e6]", "", "random projections of the gradient")] = 2
    grid_rows: Annotated[int, Whole("[2, 1e6]", "rows", "of the statistics by level")] = 16
    grid_levels: Annotated[int, Whole("[6, 1e6]", "", "levels of the statistics by level")] = 12
    grid_masks: Annotated[int, Whole("[2, 1e6]", "", "masks of a row at each of these")] = 4
    groups: Annotated[int, Whole("[2, 1e6]", "", "of redraws, for standard errors")] = 8
    redraws: Annotated[int, Whole("[2, 1e6]", "", "of the batch gradient, in a group")] = 12
    data_batches: Annotated[
        int, Whole("[1, 1e6]", "", "errors cover the choice of batches if there is one a group")
    ] = 8
    warm_up: Annotated[
        int, Whole("[0, 1e6]", "batches", "that an adaptive transform learns from first")
    ] = 50
    chunk: Annotated[int, Whole("[1, 1e6]", "rows", "of a forward pass")] = 32


def get_config() -> ConfigDict:
    """Defaults: the embedded text, a small transformer, stratified fixed counts, P-POTS."""

    def values(section: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: values(entry)
            if isinstance(entry, Mapping)
            else placeholder(int if isinstance(entry.rule, Whole) else float)
            if entry.default is None
            else entry.default
            for name, entry in section.items()
        }

    return ConfigDict(values(settings()))


def check_config(config: ConfigDict) -> None:
    """Raise ValueError or TypeError for a setting, read or not, that its rule does not allow."""
    for path, setting in flat_settings().items():
        value: Any = config
        for part in path.split("."):
            if not isinstance(value, ConfigDict) or part not in value:
                raise ValueError(f"the config has no setting {path}; start from its get_config()")
            value = value[part]
        if value is None and setting.default is None:
            continue
        if isinstance(setting.default, tuple) != isinstance(value, tuple | list):
            kind = "a tuple" if isinstance(setting.default, tuple) else "one value"
            raise TypeError(f"{path} must be {kind}, such as {setting.default!r}, got {value!r}")
        if setting.rule is not None:
            setting.rule.check(path, value)
    for path in _paths(config):
        if path not in flat_settings():
            raise ValueError(unknown(path))


def unknown(path: str) -> str:
    """The error for a path that names no setting, with close matches."""
    near = difflib.get_close_matches(path, flat_settings(), n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"{path} is no setting of this release{hint}"


def _paths(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    for name in config:
        value = config[name]
        if isinstance(value, ConfigDict):
            yield from _paths(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


@functools.cache
def flat_settings() -> Mapping[str, Setting]:
    """All settings by path, as in "train.steps"."""

    def flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Setting]]:
        for name, entry in section.items():
            if isinstance(entry, Mapping):
                yield from flat(entry, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", entry

    return dict(flat(settings()))


@functools.cache
def settings() -> Mapping[str, Any]:
    """All settings, in sections as those of the config."""
    return {
        "seed": _whole(0, "[0, 4294967295]", "", "of parameters, order of the data, and noise"),
        "process": _name("masked", names.PROCESSES, "model class"),
        "data": _data(),
        "model": _model(),
        "adapter": {
            "name": _name("", ("", "lora"), "what is trained beside model.source; '': all of it"),
            **defaults(Lora),
            "base_dtype": _name(
                "", ("", *names.DTYPES), "of the frozen parameters; '': as in the source's files"
            ),
            "init_from": _text("", "directory of adapters in the layout of PEFT to start from"),
        },
        # From a causal model.source to process=masked or block (docs/finetune.md).
        "convert": {
            "anneal_steps": _whole(
                0, _NATURAL, "steps", "until later tokens are all visible; 0: from the start"
            ),
            "shift": Setting(False, Plain(bool, "logits at i - 1 go on predicting token i")),
        },
        "block": {
            "size": _whole(16, _COUNT, "tokens", "a divisor of data.length; 1: autoregressive"),
            "window": _whole(0, _NATURAL, "blocks", "attended to, own included; 0: all"),
        },
        "partition": defaults(models.Partition),
        "gaussian": _gaussian(),
        # Gaussian diffusion of embeddings (text: cdcd, tables: cdtd); levels, path: of "gaussian".
        "cdcd": {
            "size": _whole(64, "[1, 1e6]", "", "of an embedding"),
            "given": defaults(categorical.cdcd_loss)["given"],
        },
        "corruption": {
            "name": _name("fixed_count", names.CORRUPTIONS, "how a row is masked at a rate"),
            **sections(
                names.CORRUPTIONS,
                rao_blackwell_clipped={"low": 0.001, "high": 1.0},  # with a law of the same rates
                bernoulli_shifted_logit={"rare_share": _RARE, "shift": 1.0, "max_shifted": 8},
                bernoulli_shifted_rate={"rare_share": _RARE},
            ),
        },
        "law": {
            "name": _name(
                "linear", names.LAWS, "of the masking rate; Gaussian schedules: gaussian.law"
            ),
            **sections(
                names.LAWS,
                power={"exponent": 2.0},
                geometric={"sigma_min": 0.001, "sigma_max": 20.0},
                linear_sigma={"sigma_min": 0.001, "sigma_max": 20.0},
                clipped={"low": 0.001, "high": 1.0},
                log_uniform={"low": 0.001, "high": 1.0},
                uniform_logsnr={"low": -10.0, "high": 10.0},
            ),
        },
        "weighting": {
            "name": _name("", ("", *names.WEIGHTINGS), "factor on the bound, then no bound"),
            "clamp": _real(0.0, "[0, 1e6]", "nats per token", "most a row's loss counts; 0: all"),
            **sections(names.WEIGHTINGS),
        },
        "variance": {
            "order": _names(
                ("stratified", "ppots_slopes"),
                (*names.VARIANCE, *names.AUTO),
                "transforms in reading order: couple, warp, replicate; (): independent noise; auto",
            ),
            "auto": defaults(AutoSettings),
            **sections(
                names.VARIANCE,
                coarse_strata={"cells": None},
                clipped={"low": 0.3, "high": 0.8},
                clipped_mixture={"low": 0.3, "high": 0.8, "share": 0.3},
                rotate={"views": 4},
                rotate_ranks={"views": 4},
            ),
        },
        "optimizer": _optimizer(),
        "train": _train(),
        "monitors": sections(names.MONITORS),
        "panel": defaults(PanelSettings),
        "wandb": {
            "project": _text("", "that metrics go to; '': none"),
            "entity": _text("", "user or team of the project; '': your own"),
        },
        # With clipped_adaptive in variance.order: how its range is chosen, before each evaluation.
        "clip_search": {
            "criterion": _name(
                "gradient_noise_to_signal", names.CLIP_CRITERIA, "raw_variance as published"
            ),
            "batches": _whole(8, "[2, 1e6]", "batches", "for validation, for each of 36 ranges"),
        },
        "alignment": defaults(AlignmentSettings),
        # In one line: --config.mesh=data=2,fsdp=4,tensor=1. May differ when a run is resumed.
        "mesh": {
            "data": _whole(-1, "[-1, 1e6]", "devices", "along the axis; -1: what is left"),
            "fsdp": _whole(1, "[1, 1e6]", "devices", "that share parameters and the batch"),
            "tensor": _whole(1, "[1, 1e6]", "devices", "that share heads and hidden units"),
        },
        "evaluate": {
            "batch_size": _whole(32, "[1, 1e6]", "rows", "of a forward pass"),
            "passes": _whole(2, "[1, 1e6]", "", "forward passes of a row and replicate"),
            "replicates": _whole(2, "[1, 1e6]", "", "of the design, for the standard error"),
            "max_rows": _whole(0, _NATURAL, "rows", "held out, that are evaluated; 0: all"),
            "final_split": _name("test", ("test", "valid"), "that is evaluated after training"),
            "final_passes": _whole(4, "[1, 1e6]", "", "passes, after training"),
            "final_replicates": _whole(8, "[1, 1e6]", "", "replicates, after training"),
            "levels": _name("", ("", *LEVELS), "of a row's passes; empty: the process's own"),
            "masks": _name("", ("", *MASKS), "of a row's passes; empty: the process's own"),
            "width": _real(
                0.0,
                "[0, 1e6]",
                "bits per unit",
                "of the final 95 % Monte Carlo interval: draws up to 8 final_replicates; 0: no",
            ),
        },
        "measure": {
            "methods": Setting(
                (),
                NameOrChain(
                    (*names.METHODS, names.CONFIGURED),
                    "that mdm variance measures, or chains of transforms; (): all these",
                    several=True,
                    parts=tuple(names.VARIANCE),
                ),
            ),
            **defaults(MeasureSettings),
            "fit": defaults(FitSettings),
        },
        "sample": _sample(),
        "spacing": {
            "steps": _whole((4, 8, 16, 32), "[1, 1e6]", "steps", "of compared grids", True),
            "grids": _names((), names.COMPARED_GRIDS, "that are compared; (): rules and searched"),
            "samplers": _names((), names.ALL_SAMPLERS, "that are compared; (): sample.sampler"),
            "rows": _whole(128, "[2, 1e6]", "rows", "held out, that losses are measured on"),
            "samples": _whole(128, "[2, 1e6]", "rows", "drawn along a grid, for the distance"),
            "replicates": _whole(4, "[2, 1e6]", "", "of the distance, for the standard error"),
            "budget": _whole(32, _NATURAL, "grids", "tried by the search; 0 for no search"),
        },
    }


def _whole(default: Any, *rule: Any) -> Setting:
    return Setting(default, Whole(*rule))


def _real(default: float | None, *rule: Any) -> Setting:
    return Setting(default, Real(*rule))


def _name(default: str, known: Iterable[str], meaning: str = "") -> Setting:
    return Setting(default, Name(tuple(known), meaning))


def _names(default: tuple[str, ...], known: Iterable[str], meaning: str = "") -> Setting:
    return Setting(default, Name(tuple(known), meaning, several=True))


def _text(default: str, meaning: str) -> Setting:
    return Setting(default, Plain(str, meaning))


_RARE = _real(0.1, "[0, 1]", "of tokens", "tokens that together make up at most this are rare")


def _data() -> dict[str, Any]:
    factories = (data.documents, data.chat, data.jsonl, data.tfds_images, data.tfds_text, data.text)
    default = {k: v for factory in factories for k, v in defaults(factory).items()}
    task = defaults(names.DATA["task"])
    return {
        "source": _name("embedded", (*names.DATA, "tfds"), "tfds: with kind"),
        "path": _text(
            "", "file, directory or glob; jsonl, chat: or several, a.jsonl:0.7,b.jsonl:0.3"
        ),
        "name": _text("", 'tfds: the dataset, as in "lm1b" or "mnist"'),
        "kind": _name("text", ("text", "image"), "tfds"),
        "data_dir": _text("", 'tfds: where prepared datasets are; "": its own default'),
        "length": _whole(128, "[1, 1e7]", "tokens", "of a row of text"),
        "buckets": _whole(
            (), "[1, 1e7]", "tokens", "lengths of training batches besides that of a row", True
        ),
        "prompt_length": _whole(
            0, "[0, 1e7]", "tokens", "jsonl, tasks; 0: of the longest, jsonl with too_long: of 99 %"
        ),
        "answer_length": _whole(0, "[0, 1e7]", "tokens", "likewise, of the answer with its EOS"),
        "valid_path": _text("", 'jsonl, chat, documents, task_file: "" splits the file instead'),
        "test_path": _text("", "of the same sources, with valid_path"),
        "cache": _text("", 'tfds text, documents: folder for tokens, encoded once; "": in memory'),
        **{name: default[name] for name in default if name not in ("split_seed", "download")},
        "tokenizer": _text(
            default["tokenizer"].default,
            "char | byte | bpe | tokenizer's JSON file | directory of a released model",
        ),
        "splits": Setting(
            default["splits"].default, Plain(str, "tfds: expressions of train, valid, test", True)
        ),
        # Generated problems with a checker (docs/tasks.md).
        "task": {
            "name": _name("sudoku", names.TASKS, "of the generated problems"),
            "noise_every": _whole(0, "[0, 1e6]", "characters", "for each random letter; 0: none"),
            **{name: task[name] for name in TASK_ROWS},
            **sections(names.TASKS),
        },
    }


def _model() -> dict[str, Any]:
    return {
        # What it fixes (sizes, tokenizer, ...) need not be set; see launch/source.py.
        "source": _text("", "directory or id of a model of others to begin from (docs/hub.md)"),
        **defaults(models.TransformerConfig, depth=3, qk_norm=True, rope_base=100.0),
        "dtype": _name("float32", names.DTYPES, "operands of matrix products"),
        "param_dtype": _name("float32", names.DTYPES, "of the parameters"),
        "logits_at": _name(
            "targets", ("targets", "all"), "where losses compute logits; targets: less memory"
        ),
        "patch_size": _whole(2, "[1, 1e4]", "pixels", "process gaussian: edge of a patch"),
    }


def _optimizer() -> dict[str, Any]:
    moments = functools.partial(_name, "float32", names.MOMENT_DTYPES)
    clip_norm = _real(1.0, "[0, 1e6]", "global norm", "of gradients; 0 does not clip")
    return {
        **defaults(training.adamw, weight_decay=0.01, clip_norm=clip_norm),
        "name": _name("muon", names.OPTIMIZERS, "muon: of matrices, adamw for the rest"),
        **defaults(
            training.warmup_cosine,
            peak=_real(
                None, "(0, 10]", "learning rate", f"after the warm-up; None: {RULES['peak']}"
            ),
            warmup_steps=_whole(
                None, _NATURAL, "steps", f"of rising rate; None: {RULES['warmup_steps']}"
            ),
        ),
        "ema_decay": _real(
            None, "[0, 1)", "per step", f"of the parameters' average; None: {RULES['ema_decay']}"
        ),
        "muon": {"momentum": defaults(training.muon)["momentum"]},
        # How state is stored between steps; arithmetic is in float32.
        "first_moment_dtype": moments("of the optimiser's running mean of gradients"),
        "second_moment_dtype": moments("bfloat16 needs b2 < 0.996, int8 does not"),
        "ema_dtype": _name(
            "float32", names.DTYPES, "bfloat16 keeps its offset from the parameters"
        ),
    }


def _train() -> dict[str, Any]:
    often = _whole(
        None, _NATURAL, "steps", f"between validations; None: {RULES['evaluate_every']}; 0: never"
    )
    loop = defaults(training.LoopOptions, evaluate_every=often, checkpoint_every=250)
    return {
        "steps": _whole(500, _COUNT, "steps", "of the run"),
        "init_from": _text("", "workdir of a run whose parameters to start from"),
        "batch_size": _whole(32, "[1, 1e6]", "rows", "globally; each view is a forward pass more"),
        "num_microbatches": _whole(
            None, "[1, 1e6]", "", f"equal parts of the batch; None: {RULES['num_microbatches']}"
        ),
        "keep_last": _whole(2, "[1, 1e6]", "checkpoints", "kept; older ones are removed"),
        "noise_by": _name(
            "", ("", "slot", "example"), 'what noise goes with; "": example for chats, else slot'
        ),
        "prefetch": _whole(2, "[0, 1e4]", "batches", "prepared ahead, in a thread of its own"),
        "monitors": _names(
            ("levels", "gradient_noise", "weights"),
            names.MONITORS,
            "running estimates in the metrics",
        ),
        # Early, by the paired interval of the validation bound's gain.
        "stop": defaults(training.StopSettings),
        **{name: setting for name, setting in loop.items() if name not in LOOP_OWN},
    }


def _gaussian() -> dict[str, Any]:
    low, high = -10.0, 10.0
    ends = {
        "low": _real(low, "[-100, 100]", "logSNR", "noisiest level"),
        "high": _real(high, "[-100, 100]", "logSNR", "cleanest level"),
    }
    weightings = sections(names.GAUSSIAN_WEIGHTINGS)
    del weightings["edm_monotonic"]["sigma_data"]  # the run's
    return {
        # A preset of law, weighting, output and path, where these are empty.
        "recipe": _name("vdm", names.RECIPES, "preset of law, weighting, output and path"),
        "law": _name("", ("", *names.GAUSSIAN_LAWS), 'of the levels; "": the recipe\'s own'),
        "modifiers": _names((), names.GAUSSIAN_MODIFIERS, "changes of the law, in order"),
        # With "" what is minimised stays the recipe's under any law; unit_output, unit weight on
        # the error of the network's own output, is the loss of most papers.
        "weighting": _name("", ("", *names.GAUSSIAN_WEIGHTINGS), "what is minimised"),
        "output": _name("", ("", *names.OUTPUTS), "of the network"),
        "path": _name("", ("", *names.PATHS), "of the network's inputs"),
        **ends,
        "sigma_data": _real(0.5, "(0, 1e4]", "", "standard deviation of the data"),
        "conditional": Setting(False, Plain(bool, "on the class of the picture")),
        "class_dropout": _real(
            0.1, "[0, 1)", "of rows", "conditional: whose class is hidden in training"
        ),
        **sections(names.GAUSSIAN_LAWS, uniform_logsnr={"low": low, "high": high}),
        **sections(names.GAUSSIAN_MODIFIERS, truncated=ends),
        **weightings,
        **sections(names.RECIPES, vdm={"low": low, "high": high}),
    }


def _sample() -> dict[str, Any]:
    blocks = {"block_size": 32, "steps_per_block": 16}
    return {
        "sampler": _name("first_hitting", names.ALL_SAMPLERS, "of the process"),
        "num_steps": _whole(64, "[1, 1e6]", "steps", "of samplers that step along a grid"),
        "grid": _name(
            "", ("", *names.GRIDS), '"": stored by mdm spacing, else the default of the process'
        ),
        **sections(
            names.SAMPLERS,
            cached_ancestral={"rows_per_pass": 8},
            entropy_bounded={"gamma": 0.5},
            low_confidence_remasking=blocks,
            random_remasking=blocks,
            confidence_parallel={"block_size": 32},
            remdm_cap={"eta": 0.02},
            remdm_rescale={"eta": 0.1},
        ),
        **sections(names.UNIFORM_SAMPLERS),
        **sections(names.GAUSSIAN_SAMPLERS),
        "approximate_cache": _name(
            "", ("", "prefix", "dual", "delayed"), 'masked: of keys and values; "": none, exact'
        ),
        "cache_refresh": _whole(0, _NATURAL, "steps", "of it, between passes over all; 0: none"),
        "guidance": _real(
            0.0, "[0, 1e3]", "", "scale, by given tokens or class (gaussian); 0, 1: none"
        ),
        "class_guidance": {
            "low": _real(-100.0, "[-100, 100]", "logSNR", "from which the class guides"),
            "high": _real(100.0, "[-100, 100]", "logSNR", "up to which it does"),
            "rescale": defaults(guided)["rescale"],
        },
        "classes": _whole((), "[0, 1e6]", "", "gaussian.conditional: drawn in turn; (): all", True),
        "restore_from": _real(
            None, "[-100, 100]", "logSNR", "gaussian: held-out pictures with noise are restored"
        ),
        "no_repeat_ngrams": _whole(0, "[0, 1e4]", "tokens", "n-grams that never repeat; 0: none"),
        "num_samples": _whole(3, "[1, 1e6]", "rows", "drawn"),
        "num_answers": _whole(256, _NATURAL, "prompts", "held out, answered, checked; 0: all"),
        "temperature": defaults(samplers.temperature, value=1.0)["value"],
        "top_k": _whole(0, _NATURAL, "tokens", "most likely ones that are drawn; 0: all"),
        "top_p": defaults(samplers.top_p, mass=1.0)["mass"],
        "gap": _whole(32, _NATURAL, "tokens", "gap of the infilled passage; 0: no infilling"),
        "quality_steps": _whole((), "[1, 1e6]", "steps", "at which text quality is measured", True),
        "quality_texts": _whole(64, "[2, 1e6]", "texts", "drawn for the quality of text"),
        "judge": _text("", "workdir of the run that gives the generative perplexity"),
        "prompts": _text("", "file of texts, one a line, ▁ for each token to write; or .jsonl"),
    }


def shrink(config: ConfigDict) -> None:
    """Reduce a config to seconds of work, for tests: the variant "smoke" of every preset."""
    config.model.update(width=16, depth=1, num_heads=2)
    config.train.update(steps=4, batch_size=8, evaluate_every=2, checkpoint_every=2, log_every=2)
    config.optimizer.warmup_steps = 2
    config.evaluate.update(
        batch_size=8, passes=2, replicates=2, max_rows=8, final_passes=2, final_replicates=2
    )
    config.sample.update(num_samples=min(config.sample.num_samples, 4), num_steps=4, num_answers=8)
    if config.data.source == "task":
        config.data.task.update(train_rows=64, valid_rows=16, test_rows=16)
    config.measure.update(rows=4, levels_per_row=2, grid_rows=2, grid_levels=6, grid_masks=2)
    config.spacing.update(steps=(2, 3), rows=8, samples=8, replicates=2, budget=3)
    config.measure.update(groups=3, redraws=4, data_batches=1, warm_up=2, chunk=8)
    config.measure.fit.update(levels=4, rows=2, masks=2)
