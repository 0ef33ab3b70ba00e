"""Built-in configs, found by name: ``--config=quickstart``, ``--config=text_block:16``.

A preset is a function of its variant; "smoke" shrinks each to seconds of work, for tests, and
"char" makes those of text the models of characters that older figures are of.
"""

import difflib
from collections.abc import Sequence

from ml_collections import ConfigDict

from mdm_jax.launch import config as defaults
from mdm_jax.launch.names import RECIPES


def quickstart(variant: str = "") -> ConfigDict:
    """Masked diffusion on CPython's documentation, in minutes on two CPU cores."""
    check_variant("quickstart", variant, ("char",))
    config = _text(variant)
    if variant == "smoke":
        config.train.update(steps=12, evaluate_every=4, checkpoint_every=4)
    return config


def text_ar(variant: str = "") -> ConfigDict:
    """Autoregressive baseline: the quickstart's network, data and steps."""
    check_variant("text_ar", variant, ("char",))
    config = _text(variant)
    config.process = "autoregressive"
    config.variance.order = ()
    config.train.monitors = ()
    config.sample.gap = 0
    return config


def text_block(variant: str = "16") -> ConfigDict:
    """Block diffusion (BD3-LM) in blocks of ``variant`` tokens, "L" for one block per row."""
    check_variant("text_block", variant, ("1", "4", "16", "L", "char"))
    config = _text(variant)
    config.process = "block"
    named = {"smoke": 8, "L": config.data.length, "": 16, "char": 16}
    config.block.size = named[variant] if variant in named else int(variant)
    return config


def text_partition(variant: str = "") -> ConfigDict:
    """Partition model (PGM): the quickstart's data, size and steps, two groups a pass."""
    check_variant("text_partition", variant, ("char",))
    config = _text(variant)
    config.process = "partition"
    config.partition.decoder_depth = 2  # of 3, by short runs: docs/quickstart.md
    if variant == "smoke":
        config.model.depth, config.partition.decoder_depth = 2, 1
    return config


def text_uniform(variant: str = "") -> ConfigDict:
    """Uniform-token diffusion: the quickstart's network, data and steps."""
    check_variant("text_uniform", variant, ("char",))
    config = _text(variant)
    config.process = "uniform"
    config.variance.order = ("stratified",)  # ppots_slopes reads losses of masked tokens
    # The inputs do not show which tokens are replaced, so the level is an input too.
    config.model.condition_on_logsnr = True
    # A uniform rate would have infinite variance here too, see objectives.uniform_nelbo.
    config.law.name = "power"
    config.law.power.exponent = 3.0
    config.sample.sampler = "uniform_ancestral"
    if variant != "smoke":
        config.sample.num_steps = 128
    return config


def text_cdcd(variant: str = "") -> ConfigDict:
    """Gaussian diffusion of token embeddings (CDCD): the quickstart's network, data and steps."""
    check_variant("text_cdcd", variant, ("char",))
    config = _text(variant)
    config.process = "cdcd"
    config.variance.order = ("stratified", "cdcd_warp")
    config.model.update(condition_on_logsnr=True, self_conditioning=True)
    # Noisier than -9 tokens of size 64 say nothing; cleaner than 1 they cannot be mistaken.
    config.gaussian.update(low=-9.0, high=1.0)
    config.sample.sampler = "ddim"  # Euler's method in sigma
    if variant != "smoke":
        config.sample.num_steps = 128
    return config


def digits_masked(variant: str = "") -> ConfigDict:
    """Masked diffusion on 8 x 8 digits of 17 intensities; needs scikit-learn."""
    check_variant("digits_masked", variant)
    config = defaults.get_config()
    config.data.source = "digits"
    config.model.update(width=96, depth=3, num_heads=4)
    config.train.update(steps=600, batch_size=64)
    config.sample.update(num_samples=25, gap=0)
    if variant == "smoke":
        defaults.shrink(config)
    return config


def digits_gaussian(variant: str = "vdm") -> ConfigDict:
    """Gaussian diffusion on 8 x 8 digits; recipes differ in law, weighting and output alone."""
    check_variant("digits_gaussian", variant, sorted(RECIPES))
    config = defaults.get_config()
    config.process = "gaussian"
    config.data.source = "digits"
    config.model.update(width=96, depth=3, num_heads=4, patch_size=2, condition_on_logsnr=True)
    # Grey values are 0.125 apart, seven standard deviations of the noise at logSNR 8.
    config.gaussian.update(low=-8.0, high=8.0, sigma_data=0.8)
    config.gaussian.vdm.update(low=-8.0, high=8.0)
    config.gaussian.edm.sigma_data = config.gaussian.edm2.sigma_data = 0.8
    config.variance.order = ("stratified",)
    config.train.update(steps=1500, batch_size=64, checkpoint_every=500)
    # No clipping: the recipes' gradients differ in scale, to which the optimiser is invariant.
    config.optimizer.update(peak=1e-2, warmup_steps=50, clip_norm=0.0, ema_decay=0.995)
    config.evaluate.update(batch_size=64, passes=8, replicates=2, final_passes=32)
    config.sample.update(num_samples=25, gap=0, sampler="dpm_solver_pp_2m", num_steps=32)
    if variant == "smoke":
        defaults.shrink(config)
    elif variant:
        config.gaussian.recipe = variant
    return config


def table_cdtd(variant: str = "column") -> ConfigDict:
    """Gaussian diffusion of rows of a table (CDTD); a warp by "column" or "type", or "shared"."""
    check_variant("table_cdtd", variant, ("column", "type", "shared"))
    config = defaults.get_config()
    config.process = "cdtd"
    config.data.source = "diabetes"  # four categorical columns, then seven numeric ones
    config.data.fractions = (0.6, 0.1, 0.3)
    config.model.update(width=64, depth=2, num_heads=4, condition_on_logsnr=True)
    config.cdcd.size = 8
    config.gaussian.update(low=-8.0, high=8.0, path="vp")
    config.variance.order = ("stratified", "cdtd_warp")
    groups = {"shared": (0,) * 11, "type": (0,) * 4 + (1,) * 7}
    for warp in ("cdtd_warp", "cdtd_warp_logistic"):
        config.variance[warp].groups = groups.get(variant, ())
    # The bound is of one level for all columns, which does not tell runs of several warps apart.
    config.train.update(steps=800, batch_size=128, evaluate_every=0, monitors=())
    config.panel.cost = 0.0
    config.optimizer.update(name="adamw", peak=2e-3)
    config.evaluate.update(batch_size=64, passes=8, replicates=2, final_passes=32)
    config.sample.update(num_samples=442, gap=0, sampler="ddim", num_steps=64)
    if variant == "smoke":
        defaults.shrink(config)
    return config


def mnist_gaussian(variant: str = "vdm") -> ConfigDict:
    """Gaussian diffusion on MNIST, prepared by TFDS in array_record format (data.data_dir)."""
    check_variant("mnist_gaussian", variant, sorted(RECIPES))
    config = digits_gaussian(variant)
    config.data.update(source="tfds", name="mnist", kind="image", label_field="label")
    config.data.splits = ("train[:55000]", "train[55000:]", "test")
    config.model.patch_size = 4
    if variant != "smoke":
        config.model.update(width=192, depth=6, num_heads=6)
        config.train.update(steps=20_000, checkpoint_every=2000)
    return config


def finetune(variant: str = "") -> ConfigDict:
    """Masked diffusion from a model of others, on conversations of one's own.

    python -m experiments.conversations --task=stories --out=chats.jsonl
    mdm train --config=finetune --workdir=runs/chat \\
        --config.model.source=experiments/models/small --config.data.path=chats.jsonl \\
        --config.data.length=64 --config.data.loss_on=last --config.data.answer_marker='####' \\
        --config.train.steps=400 --config.train.batch_size=16 --config.optimizer.peak=5e-3 \\
        --config.optimizer.ema_decay=0.98

    0.269 ± 0.007 bits per character and 16 of 100 held-out questions right, in 2.5 minutes on two
    busy cores (one seed). The learning rate by default, 1e-5, is for billions of parameters.
    """
    config = _from_source("finetune", variant)
    config.data.source = "chat"
    return config


def finetune_pairs(variant: str = "") -> ConfigDict:
    """As ``finetune``, on prompts and answers.

    mdm train --config=finetune_pairs --workdir=runs/pairs \\
        --config.model.source=experiments/models/small \\
        --config.data.path=experiments/data/stories.jsonl.xz --config.data.prompt_length=24 \\
        --config.data.answer_length=24 --config.data.answer_marker='####' \\
        --config.train.steps=400 --config.train.batch_size=16 --config.optimizer.peak=5e-3 \\
        --config.optimizer.ema_decay=0.98

    0.242 ± 0.005 bits per character and 30 of 125 held-out questions right, in 2 minutes on two
    busy cores (one seed).
    """
    config = _from_source("finetune_pairs", variant)
    config.data.update(source="jsonl", prompt_length=256, answer_length=256, too_long="drop")
    return config


def preference(variant: str = "") -> ConfigDict:
    """DPO on pairs of answers, with policy and reference on the same masks, cross-fitted."""
    check_variant("preference", variant)
    config = _aligned(variant)
    config.data.source = "preferences"
    config.alignment.method = "dpo"
    return config


def reward(variant: str = "") -> ConfigDict:
    """Answers to prompts, written by the run itself and rewarded: the exact policy gradient."""
    check_variant("reward", variant)
    config = _aligned(variant)
    config.data.source = "task"
    config.alignment.method = "trace"
    if variant == "smoke":
        config.data.task.update(train_rows=64, valid_rows=16, test_rows=16)
        config.alignment.answers = 4
    return config


def convert(variant: str = "") -> ConfigDict:
    """A causal model of others made bidirectional, on documents (A2D, docs/finetune.md).

    mdm train --config=text_ar:char --workdir=runs/causal --config.model.mlp=swiglu \\
        --config.model.norm=rms --config.train.steps=1000 --config.sample.num_samples=1
    mdm export --workdir=runs/causal --to=runs/qwen
    mdm train --config=convert --workdir=runs/converted --config.model.source=runs/qwen \\
        --config.data.source=embedded --config.data.length=128 --config.data.packing= \\
        --config.train.steps=150 --config.optimizer.peak=3e-3 --config.optimizer.warmup_steps=10 \\
        --config.optimizer.ema_decay=0.98 --config.evaluate.max_rows=128

    2.918 ± 0.007 bits per character (bound, one seed; the causal model has 1.583) in two minutes
    on two busy cores, after ten for the causal model; other ways of converting it are in
    docs/finetune.md. A model of others takes documents: --config.data.path=DOCUMENTS.jsonl.
    """
    config = _from_source("convert", variant)
    config.data.update(source="documents", length=512, packing="first_fit")
    config.optimizer.peak = 1e-4
    return config


def _from_source(name: str, variant: str) -> ConfigDict:
    check_variant(name, variant)
    config = defaults.get_config()
    config.model.source = "MODEL (--config.model.source=DIR)"  # refused by this name until given
    shape = config.model.to_dict()
    if variant == "smoke":
        defaults.shrink(config)
        config.model.update(shape)  # the model's own
    config.optimizer.update(name="adamw", peak=1e-5, weight_decay=0.0)
    config.sample.update(sampler="by_confidence")
    return config


def _aligned(variant: str) -> ConfigDict:
    config = defaults.get_config()
    if variant == "smoke":
        defaults.shrink(config)
    config.train.monitors = ("gradient_noise", "weights")  # levels are those of a bound
    config.variance.order = ("stratified",)
    config.optimizer.update(name="adamw", peak=1e-5, weight_decay=0.0)
    return config


PRESETS = {
    preset.__name__: preset
    for preset in (
        quickstart,
        text_ar,
        text_block,
        text_partition,
        text_uniform,
        text_cdcd,
        digits_masked,
        digits_gaussian,
        mnist_gaussian,
        table_cdtd,
        finetune,
        finetune_pairs,
        preference,
        reward,
        convert,
    )
}


def get_config(name: str) -> ConfigDict:
    """The config of ``NAME`` or ``NAME:VARIANT``; ValueError with close matches if unknown."""
    name, _, variant = name.partition(":")
    if name not in PRESETS:
        raise ValueError(unknown(name))
    return PRESETS[name](*([variant] if variant else []))


def unknown(name: str) -> str:
    """The error for a name that is no preset, with close matches."""
    near = difflib.get_close_matches(name, PRESETS)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return (
        f"there is no built-in config {name!r} and no file of that name; {hint}"
        f"built in are {', '.join(PRESETS)}"
    )


def check_variant(name: str, variant: str, known: Sequence[str] = ()) -> None:
    """Raises ValueError unless ``variant`` is "", "smoke" or one of ``known``."""
    if variant in ("", "smoke", *known):
        return
    if not known:
        raise ValueError(f"{name} has the variant 'smoke', not {variant!r}")
    raise ValueError(f"{name} has the variants smoke, {', '.join(known)}; not {variant!r}")


def _text(variant: str) -> ConfigDict:
    config = defaults.get_config()
    if variant == "smoke":
        defaults.shrink(config)
        config.data.update(length=32, train_stride=16)
        config.sample.update(num_samples=2, gap=8)
    elif variant != "char":
        # Chosen by short runs: docs/quickstart.md.
        config.data.update(tokenizer="bpe", bpe_vocab_size=2048)
        config.train.update(steps=1000, batch_size=16, log_every=20)
        config.sample.update(temperature=0.7, gap=24)
    return config
