"""Every setting of a run with its default. Other configs start from here and change a few.

A config is data: strings name things that ``experiments/build.py`` looks up, and a sub-config of
the same name holds that thing's settings. So any of them can be reached from the command line, as
in ``--config.variance.order="('stratified',)"`` or ``--config.optimizer.peak=1e-3``.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """The defaults: the embedded text, a small transformer, stratified fixed counts, MIRROR."""
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict(
        {
            # embedded | text | jsonl | documents | tfds_text | tfds_images | tfds (with kind) |
            # digits | task
            "source": "embedded",
            "path": "",  # text, jsonl, documents: the file
            "name": "",  # tfds: the dataset, as in "lm1b" or "mnist"
            "kind": "text",  # tfds: "text" or "image"
            "data_dir": "",  # tfds: where prepared datasets lie; "" is TFDS's own default
            "splits": ("train[:90%]", "train[90%:95%]", "train[95%:]"),  # tfds
            "text_field": "text",  # tfds text, documents
            "packing": "",  # tfds text, documents: first_fit puts short ones into shared rows
            "long_documents": "split",  # tfds text, documents: split | error
            "image_field": "image",  # tfds image
            "levels": 256,  # tfds image: intensities
            "length": 128,  # text: tokens of a row
            "tokenizer": "char",  # char | byte | bpe | path of a tokenizer's JSON file
            "bpe_vocab_size": 4096,
            "fractions": (0.9, 0.05, 0.05),  # train, valid, test
            "train_stride": 1,  # text: tokens between the starts of training rows
            "prompt_length": 0,  # jsonl, task: positions for the prompt; task: 0 for the longest
            "answer_length": 0,  # jsonl, task: positions for the answer and its EOS
            "prompt_field": "prompt",
            "answer_field": "answer",
            "valid_path": "",  # jsonl, documents: "" splits the file instead
            "test_path": "",
            "too_long": "error",  # jsonl: error | truncate | drop
            "answer_padding": "eos_scored",  # jsonl: eos_scored | pad_hidden
            "answer_marker": "",  # jsonl: answers are checked by what follows it; GSM8K: "####"
            # Generated problems with a checker (docs/tasks.md).
            "task": {
                "name": "sudoku",  # sudoku | chain | run | add | countdown
                "noise_every": 0,  # characters of an answer before each random letter; 0: none
                "answer_padding": "eos_once",  # eos_once | eos_scored
                "train_rows": 20_000,  # problems, made as they are read
                "valid_rows": 512,
                "test_rows": 512,
                "sudoku": {"rows": 2, "columns": 2, "blanks": (6, 11)},  # of a box; fewest, most
                "chain": {"steps": 2, "distractors": 1, "modulus": 10, "result_only": False},
                "run": {"steps": 4, "modulus": 10, "last_only": False},
                "add": {"digits": 4},
                "countdown": {"numbers": 3, "largest": 20},
            },
        }
    )
    config.model = ConfigDict(
        {
            "width": 128,
            "depth": 3,
            "num_heads": 4,
            "mlp_ratio": 4.0,
            "norm": "rms",  # rms | layer
            "mlp": "gelu",  # gelu | swiglu
            "condition_on_logsnr": False,
            "tie_embeddings": False,
            "scan_layers": False,
            "qk_norm": True,
            "rope_base": 100.0,
            "learned_positions": 0,  # longest row with a learned vector per place; 0: rotary only
            "self_conditioning": False,  # processes masked, block, uniform
            # Where losses of tokens compute logits: targets (same losses, less memory) | all
            "logits_at": "targets",
            "patch_size": 2,  # process gaussian
            "attention": "auto",  # auto | einsum | recompute | xla | cudnn | splash
            "remat": "none",  # none | full | dots | dots_without_batch: run anew in backward
            "dtype": "float32",  # operands of matrix products: float32 | bfloat16
            "param_dtype": "float32",
        }
    )
    config.process = "masked"  # masked | block | uniform | autoregressive | gaussian
    config.block = ConfigDict(
        {
            "size": 16,  # tokens of a block, a divisor of data.length; 1 is autoregressive
            "window": 0,  # blocks that a block sees, itself included; 0 for all
        }
    )
    config.gaussian = ConfigDict(
        {
            # process gaussian: what is minimised, and the network's output (schedules.recipes)
            # ddpm | iddpm | vdm | v_prediction | edm | edm2 | flow | sd3
            "recipe": "vdm",
            "law": "",  # another law to draw levels from, a Gaussian schedule's name; "": its own
            "low": -10.0,  # noisiest and cleanest logSNR of the run
            "high": 10.0,
            "sigma_data": 0.5,  # standard deviation of the data, for the scale of the inputs
            "vdm": {"low": -10.0, "high": 10.0},
            "edm": {"mean": -1.2, "std": 1.2, "sigma_data": 0.5},
            "edm2": {"mean": -0.4, "std": 1.0, "sigma_data": 0.5},
            "sd3": {"mean": 0.0, "std": 1.0},
            "lognormal": {"mean": -1.2, "std": 1.2},
            "uniform_logsnr": {"low": -10.0, "high": 10.0},
        }
    )
    config.corruption = ConfigDict(
        {
            # fixed_count | bernoulli | rao_blackwell | rao_blackwell_clipped |
            # bernoulli_shifted_logit (exact) | bernoulli_shifted_rate (as published, biased)
            "name": "fixed_count",
            "rao_blackwell_clipped": {"low": 0.001, "high": 1.0},  # with a law of the same rates
            # Tokens that together make up at most rare_share of the training rows are rare.
            "bernoulli_shifted_logit": {"rare_share": 0.1, "shift": 1.0, "max_shifted": 8},
            "bernoulli_shifted_rate": {"rare_share": 0.1, "delta": 0.2},
        }
    )
    config.law = ConfigDict(
        {
            # Law of the noise level: a masked schedule's name (linear is a uniform masking rate).
            "name": "linear",
            "loglinear": {"eps": 0.001},
            "power": {"exponent": 2.0},
            "geometric": {"sigma_min": 0.001, "sigma_max": 20.0},
            "linear_sigma": {"sigma_min": 0.001, "sigma_max": 20.0},
            "clipped": {"low": 0.001, "high": 1.0},
            "log_uniform": {"low": 0.001, "high": 1.0},
            "uniform_logsnr": {"low": -10.0, "high": 10.0},
        }
    )
    # process masked: a factor on the bound's integrand, which is then no bound: "" | min_snr | p2
    config.weighting = ConfigDict(
        {"name": "", "min_snr": {"gamma": 5.0}, "p2": {"k": 1.0, "gamma": 1.0}}
    )
    # Variance transforms in reading order: couple, warp, replicate. () is independent noise.
    config.variance = ConfigDict(
        {
            "order": ("stratified", "ppots_slopes"),
            "coarse_strata": {"cells": placeholder(int)},  # None: the root of the batch size
            "stratified_levels": {"views": 2},
            "ppots": {
                "num_bins": 32,
                "smallest_rate": 1e-3,
                "decay": 0.999,
                "floor": 0.1,
                "warmup_steps": 100,
            },
            "ppots_level_variance": {  # as ppots, for chains that stratify
                "num_bins": 32,
                "smallest_rate": 1e-3,
                "decay": 0.999,
                "floor": 0.1,
                "warmup_steps": 100,
            },
            "ppots_slopes": {  # as ppots, from the loss's slopes at the outputs
                "num_bins": 32,
                "smallest_rate": 1e-3,
                "decay": 0.99,
                "floor": 0.2,
                "warmup_steps": 50,
            },
            # The fields of variance.epr.EprParameters in order, as fit_epr returns them.
            "ppots_parametric": {"parameters": (0.5, 2.0, 0.6, 1.5, 3.0, 1.2, 2.0), "floor": 0.1},
            "ema_bins": {"num_bins": 100, "decay": 0.99, "floor": 0.01, "warmup_steps": 100},
            "ema_bins_second_moment": {
                "num_bins": 100,
                "decay": 0.99,
                "floor": 0.01,
                "warmup_steps": 100,
            },
            "loss_history": {"num_bins": 32, "length": 10, "floor": 1e-3},
            "learned_quantile": {"resolution": 32, "learning_rate": 1e-2, "decay": 0.99},
            "uncertainty_weighting": {"num_features": 128, "learning_rate": 1e-2, "seed": 0},
            "cdcd_warp": {"num_bins": 100, "learning_rate": 1e-2, "decay": 0.99},
            "cdtd_warp": {"learning_rate": 1e-2, "decay": 0.99},
            "log_uniform": {"smallest_rate": 1e-3},
            "clipped": {"low": 0.3, "high": 0.8},
            "clipped_adaptive": {"low": 1e-3, "high": 1.0},  # searched for, see clip_search
            "clipped_mixture": {"low": 0.3, "high": 0.8, "share": 0.3},
            "rotate": {"views": 4},
            "rotate_ranks": {"views": 4},
            "repeat": {"views": 2},
        }
    )
    config.optimizer = ConfigDict(
        {
            "name": "muon",  # muon | adamw
            "peak": 2e-2,  # about a tenth of this for adamw
            "muon": {"momentum": 0.95},
            "warmup_steps": 50,
            "final_fraction": 0.1,
            "b1": 0.9,
            "b2": 0.99,
            "weight_decay": 0.01,
            "clip_norm": 1.0,
            "ema_decay": 0.99,
            # How state is stored between steps, float32 | bfloat16; arithmetic is in float32.
            "first_moment_dtype": "float32",
            "second_moment_dtype": "float32",  # bfloat16 needs b2 < 0.996
            "ema_dtype": "float32",  # bfloat16 keeps its offset from the parameters
        }
    )
    config.train = ConfigDict(
        {
            "steps": 500,
            "init_from": "",  # working directory of a run whose parameters to start from
            "batch_size": 32,  # rows of the global batch; each view is a forward pass more
            "num_microbatches": 1,
            "log_every": 10,
            "evaluate_every": 250,
            "sample_every": 0,
            "checkpoint_every": 250,
            "keep_last": 2,
            "max_skipped_in_a_row": 10,
            "prefetch": 2,
            "monitors": ("levels",),  # levels | gradient_noise | baseline: running estimates
            "profile_at": 0,  # first step of a profile, 0 for none
            "profile_steps": 5,
        }
    )
    config.monitors = ConfigDict(
        {
            "levels": {"bins": 10, "decay": 0.99},
            "gradient_noise": {"decay": 0.95},  # costs a copy of the parameters
            "baseline": {"bins": 16, "decay": 0.99, "forget": 0.9},
        }
    )
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
            "final_split": "test",
            "final_passes": 4,
            "final_replicates": 8,
        }
    )
    config.measure = ConfigDict(
        {
            # mode variance; see experiments/variance.py for the methods' names and the settings
            "methods": (),  # (): all; as in "('mirror', 'stratified, mirror')"
            "rows": 32,
            "levels_per_row": 4,
            "masks_per_level": 2,
            "probes": 2,
            "grid_rows": 16,
            "grid_levels": 12,
            "grid_masks": 4,
            "groups": 8,
            "redraws": 12,
            "data_batches": 8,  # as many as groups: errors then cover the batches
            "warm_up": 50,
            "chunk": 32,
        }
    )
    config.sample = ConfigDict(
        {
            # masked, block: first_hitting | ancestral | cached_ancestral | by_confidence |
            # by_margin | by_entropy | entropy_bounded | low_confidence_remasking |
            # random_remasking | remdm_cap | remdm_rescale | remdm_confidence | remdm_loop |
            # predictor_corrector
            # uniform: uniform_ancestral | uniform_corrected
            # gaussian: ddim | ddpm_ancestral | dpm_solver_pp_2m | edm_heun | euler_flow | heun_flow
            "sampler": "first_hitting",
            "num_steps": 64,  # of samplers that step along a grid
            # masked: uniform_masking_rate or a masked schedule; gaussian: uniform_logsnr, edm or a
            # Gaussian schedule
            "grid": "uniform_masking_rate",
            "ddim": {"eta": 0.0},
            "cached_ancestral": {"rows_per_pass": 8},
            "by_confidence": {"tokens_per_step": 1},
            "by_margin": {"tokens_per_step": 1},
            "by_entropy": {"tokens_per_step": 1},
            "entropy_bounded": {"gamma": 0.5},  # nats
            "low_confidence_remasking": {"block_size": 32, "steps_per_block": 16},
            "random_remasking": {"block_size": 32, "steps_per_block": 16},
            "remdm_cap": {"eta": 0.02},
            "remdm_rescale": {"eta": 0.1},
            "remdm_loop": {"eta": 0.02, "on": 0.55, "off": 0.05, "survival_on": 0.9},
            "predictor_corrector": {"corrector_steps": 1, "eta": 0.1},
            "uniform_ancestral": {"greedy_tail": False},
            "uniform_corrected": {"prediction": 0.9},
            "guidance": 0.0,  # masked: scale of classifier-free guidance by the given tokens
            "no_repeat_ngrams": 0,  # masked: n-grams of this length never repeat; 0 for free
            "num_samples": 3,
            "num_answers": 256,  # task: held-out prompts that are answered and checked; 0: all
            "temperature": 1.0,
            "top_k": 0,  # 0: all tokens
            "top_p": 1.0,
            "gap": 32,  # length of the gap in the infilled passage; 0 for no infilling
            # Text: numbers of steps at which the quality of free samples is measured and plotted.
            "quality_steps": (),
            "quality_texts": 64,
            "judge": "",  # workdir of the run whose model gives the generative perplexity
            "prompts": "",  # file of texts, one a line, ▁ where a token is to be generated
        }
    )
    return config


def shrink(config: ConfigDict) -> None:
    """Changes a config to seconds of work, for tests: the variant "smoke" of every config."""
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
