"""Every setting of a run with its default. Presets start from here and change a few.

A config is data: a name refers to :mod:`~mdm_jax.launch.names`, a section of that name holds its
settings, and the command line can set any: ``--config.variance.order="('stratified',)"``. Defaults
come from the factories' signatures; only deviations are written here.
"""

import dataclasses

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from mdm_jax import data, models, training
from mdm_jax.launch import names
from mdm_jax.launch.names import defaults, sections


@dataclasses.dataclass(frozen=True)
class MeasureSettings:
    """How much the mode ``variance`` measures.

    Attributes:
        rows, levels_per_row, masks_per_level, probes, chunk: of the decomposition; rows per forward
            call.
        grid_rows, grid_levels, grid_masks: of the statistics by level.
        groups, redraws, data_batches: of the batch gradient's variance; standard errors cover the
            choice of batches if there are as many as groups.
        warm_up: batches that an adaptive transform learns from before it is measured.
    """

    rows: int = 32
    levels_per_row: int = 4
    masks_per_level: int = 2
    probes: int = 2
    grid_rows: int = 16
    grid_levels: int = 12
    grid_masks: int = 4
    groups: int = 8
    redraws: int = 12
    data_batches: int = 8
    warm_up: int = 50
    chunk: int = 32


def get_config() -> ConfigDict:
    """Defaults: the embedded text, a small transformer, stratified fixed counts, P-POTS."""
    config = ConfigDict()
    config.seed = 0  # of parameters, order of the data, and noise
    config.process = "masked"  # masked | block | uniform | autoregressive | gaussian
    config.data = _data()
    config.model = _model()
    config.block = ConfigDict(
        {
            "size": 16,  # tokens of a block, a divisor of data.length; 1 is autoregressive
            "window": 0,  # blocks that a block attends to, itself included; 0 for all
        }
    )
    config.gaussian = _gaussian()
    config.corruption = ConfigDict(
        {
            "name": "fixed_count",  # names.CORRUPTIONS
            # Tokens that together make up at most rare_share of the training rows are rare.
            **sections(
                names.CORRUPTIONS,
                rao_blackwell_clipped={"low": 0.001, "high": 1.0},  # with a law of the same rates
                bernoulli_shifted_logit={"rare_share": 0.1, "shift": 1.0, "max_shifted": 8},
                bernoulli_shifted_rate={"rare_share": 0.1},
            ),
        }
    )
    config.law = ConfigDict(
        {
            "name": "linear",  # of the noise level: a masked schedule; linear is a uniform rate
            **sections(
                names.LAWS,
                power={"exponent": 2.0},
                geometric={"sigma_min": 0.001, "sigma_max": 20.0},
                linear_sigma={"sigma_min": 0.001, "sigma_max": 20.0},
                clipped={"low": 0.001, "high": 1.0},
                log_uniform={"low": 0.001, "high": 1.0},
                uniform_logsnr={"low": -10.0, "high": 10.0},
            ),
        }
    )
    # A factor on the bound's integrand, which is then no bound: "" | min_snr | p2
    config.weighting = ConfigDict({"name": "", **sections(names.WEIGHTINGS)})
    config.variance = ConfigDict(
        {
            # Transforms in reading order: couple, warp, replicate. () is independent noise.
            "order": ("stratified", "ppots_slopes"),
            **sections(
                names.VARIANCE,
                coarse_strata={"cells": placeholder(int)},  # None: the root of the batch size
                # The fields of variance.epr.EprParameters in order, as fit_epr returns them.
                ppots_parametric={"parameters": (0.5, 2.0, 0.6, 1.5, 3.0, 1.2, 2.0)},
                clipped={"low": 0.3, "high": 0.8},
                clipped_mixture={"low": 0.3, "high": 0.8, "share": 0.3},
                rotate={"views": 4},
                rotate_ranks={"views": 4},
            ),
        }
    )
    config.optimizer = ConfigDict(
        {
            **defaults(training.adamw, weight_decay=0.01),  # b1, b2, clip_norm; 0 does not clip
            "name": "muon",  # muon | adamw
            "peak": 2e-2,  # learning rate after the warm-up; about a tenth of this for adamw
            "warmup_steps": 50,
            "final_fraction": defaults(training.warmup_cosine)["final_fraction"],  # of the peak
            "ema_decay": 0.99,  # of the averaged parameters, which are evaluated
            "muon": {"momentum": defaults(training.muon)["momentum"]},
            # How state is stored between steps, float32 | bfloat16; arithmetic is in float32.
            "first_moment_dtype": "float32",
            "second_moment_dtype": "float32",  # bfloat16 needs b2 < 0.996
            "ema_dtype": "float32",  # bfloat16 keeps its offset from the parameters
        }
    )
    loop = defaults(training.LoopOptions)
    config.train = ConfigDict(
        {
            "steps": 500,
            "init_from": "",  # working directory of a run whose parameters to start from
            "batch_size": 32,  # rows of the global batch; each view is a forward pass more
            "num_microbatches": 1,  # the batch is computed in so many equal microbatches
            "log_every": loop["log_every"],
            "evaluate_every": 250,  # 0 for never, as for the next two
            "sample_every": 0,
            "checkpoint_every": 250,
            "keep_last": 2,  # checkpoints
            "max_skipped_in_a_row": loop["max_skipped_in_a_row"],  # steps that are not finite
            "prefetch": 2,  # batches
            "monitors": ("levels",),  # levels | gradient_noise | baseline: running estimates
            "profile_at": loop["profile_at"],  # first step of a profile, 0 for none
            "profile_steps": loop["profile_steps"],
        }
    )
    config.monitors = ConfigDict(sections(names.MONITORS))
    # With clipped_adaptive in variance.order: how its range is chosen, before each evaluation.
    config.clip_search = ConfigDict(
        {
            # gradient_noise_to_signal | relative_variance | raw_variance (as published)
            "criterion": "gradient_noise_to_signal",
            "batches": 8,  # validation batches of evaluate.batch_size rows, for each of 36 ranges
        }
    )
    # In one line: --config.mesh=data=2,fsdp=4,tensor=1. May differ when a run is resumed.
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})
    config.evaluate = ConfigDict(
        {
            "batch_size": 32,
            "passes": 4,  # forward passes per row and replicate
            "replicates": 2,  # repetitions of the design, for the standard error
            "max_rows": 0,  # 0: all rows
            "final_split": "test",  # test | valid
            "final_passes": 4,
            "final_replicates": 8,
        }
    )
    # The mode variance; methods are those of measure.METHODS, as in "('mirror',)", () for all.
    config.measure = ConfigDict({"methods": (), **dataclasses.asdict(MeasureSettings())})
    config.sample = _sample()
    return config


def _data() -> ConfigDict:
    factories = (data.documents, data.jsonl, data.tfds_images, data.tfds_text, data.text)
    default = {k: v for factory in factories for k, v in defaults(factory).items()}
    return ConfigDict(
        {
            # embedded | text | jsonl | documents | tfds_text | tfds_images | tfds (with kind) |
            # digits | task
            "source": "embedded",
            "path": "",  # text, jsonl, documents: the file
            "name": "",  # tfds: the dataset, as in "lm1b" or "mnist"
            "kind": "text",  # tfds: "text" or "image"
            "data_dir": "",  # tfds: where prepared datasets lie; "" is TFDS's own default
            "splits": default["splits"],  # tfds
            "text_field": default["text_field"],  # tfds text, documents
            "packing": default["packing"],  # first_fit puts short documents into shared rows
            "long_documents": default[
                "long_documents"
            ],  # documents: split | cut | error
            "stream": default["stream"],  # tfds: examples are read when their rows are needed
            "cache": "",  # tfds text: folder for tokens, encoded once; "" keeps them in memory
            "image_field": default["image_field"],  # tfds image
            "levels": default["levels"],  # tfds image: intensities
            "length": 128,  # text: tokens of a row
            "tokenizer": default["tokenizer"],  # char | byte | bpe | path of a tokenizer's JSON
            "bpe_vocab_size": default["bpe_vocab_size"],
            "fractions": default["fractions"],  # train, valid, test
            "train_stride": default["train_stride"],  # text: tokens between starts of rows
            "prompt_length": 0,  # jsonl, task: positions for the prompt; task: 0 for the longest
            "answer_length": 0,  # jsonl, task: positions for the answer and its EOS
            "prompt_field": default["prompt_field"],
            "answer_field": default["answer_field"],
            "valid_path": "",  # jsonl, documents: "" splits the file instead
            "test_path": "",
            "too_long": default["too_long"],  # jsonl: error | truncate | drop
            "answer_padding": default["answer_padding"],  # jsonl: eos_scored | pad_hidden
            "answer_marker": default["answer_marker"],  # jsonl: answers are checked after it
            # Generated problems with a checker (docs/tasks.md).
            "task": {
                "name": "sudoku",  # sudoku | chain | run | add | countdown
                "noise_every": 0,  # characters of an answer before each random letter; 0: none
                "answer_padding": "eos_once",  # eos_once | eos_scored
                "train_rows": 20_000,  # problems, made as they are read
                "valid_rows": 512,
                "test_rows": 512,
                **sections(names.TASKS),
            },
        }
    )


def _model() -> ConfigDict:
    """Shape and arithmetic of the network.

    mlp_ratio: hidden width of the MLP over the model's; norm: rms | layer; mlp: gelu | swiglu.
    condition_on_logsnr: the noise level is an input; rope_base: of the rotary embeddings.
    learned_positions: longest row with a learned vector per position, 0 for rotary alone.
    self_conditioning: for the processes masked, block and uniform.
    attention: auto | einsum | recompute | xla | cudnn | splash.
    remat: none | full | dots | dots_without_batch, what the backward pass computes again.
    """
    return ConfigDict(
        {
            **defaults(models.TransformerConfig, depth=3, qk_norm=True, rope_base=100.0),
            "dtype": "float32",  # operands of matrix products: float32 | bfloat16
            "param_dtype": "float32",
            # Where losses of tokens compute logits: targets (same losses, less memory) | all
            "logits_at": "targets",
            "patch_size": 2,  # process gaussian
        }
    )


def _gaussian() -> ConfigDict:
    low, high = -10.0, 10.0
    return ConfigDict(
        {
            # What is minimised, and the network's output:
            # ddpm | iddpm | vdm | v_prediction | edm | edm2 | flow | sd3
            "recipe": "vdm",
            "law": "",  # another law to draw levels from, a Gaussian schedule's name; "": its own
            "low": low,  # noisiest and cleanest logSNR of the run
            "high": high,
            "sigma_data": 0.5,  # standard deviation of the data, for the scale of the inputs
            **sections(
                names.GAUSSIAN_LAWS,
                lognormal={"mean": -1.2, "std": 1.2},
                uniform_logsnr={"low": low, "high": high},
            ),
            **sections(names.RECIPES, vdm={"low": low, "high": high}),
        }
    )


def _sample() -> ConfigDict:
    blocks = {"block_size": 32, "steps_per_block": 16}
    return ConfigDict(
        {
            # masked, block: names.SAMPLERS; uniform: names.UNIFORM_SAMPLERS; gaussian:
            # names.GAUSSIAN_SAMPLERS
            "sampler": "first_hitting",
            "num_steps": 64,  # of samplers that step along a grid
            # masked: uniform_masking_rate or a masked schedule; gaussian: uniform_logsnr, edm or a
            # Gaussian schedule
            "grid": "uniform_masking_rate",
            **sections(
                names.SAMPLERS,
                cached_ancestral={"rows_per_pass": 8},
                entropy_bounded={"gamma": 0.5},  # nats
                low_confidence_remasking=blocks,
                random_remasking=blocks,
                remdm_cap={"eta": 0.02},
                remdm_rescale={"eta": 0.1},
            ),
            **sections(names.UNIFORM_SAMPLERS),
            **sections(names.GAUSSIAN_SAMPLERS),
            "guidance": 0.0,  # masked: scale of classifier-free guidance by the prompt
            "no_repeat_ngrams": 0,  # masked: n-grams of this length never repeat; 0 for no limit
            "num_samples": 3,
            "num_answers": 256,  # task: held-out prompts that are answered and checked; 0: all
            "temperature": 1.0,
            "top_k": 0,  # 0: all tokens
            "top_p": 1.0,
            "gap": 32,  # length of the gap in the infilled passage; 0 for no infilling
            "quality_steps": (),  # text: numbers of steps at which sample quality is measured
            "quality_texts": 64,
            "judge": "",  # workdir of the run whose model gives the generative perplexity
            "prompts": "",  # file of texts, one a line, ▁ where a token is to be generated
        }
    )


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
    config.measure.update(groups=3, redraws=4, data_batches=1, warm_up=2, chunk=8)
