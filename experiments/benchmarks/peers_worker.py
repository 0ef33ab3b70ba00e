"""A side of ``experiments.benchmarks.peers``: one process on one core, which steps when told to.

The argument is a job as JSON. The process answers in lines of JSON: first the names of its calls,
then to each name on standard input the processor seconds of that call, user and system. Sides of
JAX and of PyTorch run under interpreters of their own, so only the standard library is loaded here.

Peers are imported from their checkouts as they are. What they import and a step on a CPU does not
need (Lightning, Hydra, transformers, metrics, data loaders, Mamba) is a stand-in in
``sys.modules``; flash attention is ``scaled_dot_product_attention`` there.
"""

import contextlib
import importlib.machinery
import json
import os
import resource
import sys
import time
import types
from collections.abc import Callable
from typing import Any

Job = dict[str, Any]
Calls = dict[str, Callable[[], float]]
"""Calls by name; each returns a number to look at, such as the loss."""

COND_DIM = 8
"""Width of the peers' conditioning, which makes their parameters about as many as ours; it is of
one vector a row, so that it costs no time."""
STANDING_IN = (
    *("hydra.utils", "lightning", "torchmetrics.aggregation", "timm.scheduler", "fsspec", "tqdm"),
    *("transformers", "huggingface_hub", "omegaconf", "dataloader", "metrics"),
    *("models.dimamba", "models.autoregressive"),
)
"""Modules of peers that are not loaded."""


def jax_side(job: Job) -> tuple[Calls, int]:
    """Calls of this package or of the yardstick, and the number of parameters."""
    import jax

    from experiments.benchmarks import setting, train_step
    from mdm_jax import samplers, training

    shape = setting.Shape(**job["shape"])
    if job["what"] == "sampling":
        from experiments.benchmarks import sampling

        canvas = samplers.blank_canvas(setting.SAMPLE_ROWS, shape.sample_length, shape.mask_id)
        calls = {}
        for name in job["samplers"]:
            generator = sampling.GENERATORS[name]
            dtype = {"dtype": jax.numpy.dtype(job["dtype"])}
            variant = generator.variant._replace(config=generator.variant.config | dtype)
            network = setting.model(shape, variant)
            generate = generator.make(shape, network, variant, job["steps"])
            params = setting.random_params(network, shape.length)

            def call(generate: Any = generate, params: Any = params) -> float:
                return float(generate(params, jax.random.key(2), canvas).block_until_ready().max())

            call()  # compiles
            calls[name] = call
        return calls, training.num_params(params)
    if job["side"] == "launcher":
        return launcher(shape, job)
    name = {"yardstick": setting.YARDSTICK}.get(job["side"], f"library {job['dtype']}")
    runner = train_step.Runner(shape, name, setting.TRAIN[name])
    return {"step": lambda: float(runner())}, runner.num_params


def launcher(shape: Any, job: Job) -> tuple[Calls, int]:
    """The step that ``mdm train`` compiles for the shape, with its batches and monitors.

    Settings are the defaults but for the job's own.
    """
    import jax
    import numpy as np

    from mdm_jax import data, training
    from mdm_jax.data.rows import TokenSpans
    from mdm_jax.launch import config as defaults
    from mdm_jax.launch.build import make_experiment
    from mdm_jax.launch.modes.train import initial_state

    config = defaults.get_config()
    config.data.length = shape.length
    config.model.update(width=shape.width, depth=shape.depth, num_heads=shape.num_heads)
    config.model.dtype = job["dtype"]
    config.train.batch_size = shape.batch_size
    config.update_from_flattened_dict(job["config"])
    config.variance.order = tuple(config.variance.order)
    tokens = np.random.default_rng(0).integers(0, shape.mask_id, 512 * shape.length)
    starts = range(0, len(tokens), shape.length)
    counts = np.ones(shape.vocab_size, np.int32)
    rows = TokenSpans(tokens.astype(np.int32), starts, shape.length, 0, counts)
    dataset = data.Dataset(
        train=rows,
        valid=rows,
        test=rows,
        tokenizer=None,
        vocab_size=shape.vocab_size,
        mask_id=shape.mask_id,
        length=shape.length,
        unit="dimension",
        event_shape=None,
        fingerprint="",
        description="random tokens",
        report={},
    )
    experiment = make_experiment(config, read=lambda *_: dataset)
    state, batches = initial_state(experiment), experiment.train_batches()
    compiled = training.compile_step(
        *(experiment.step, experiment.abstract_state(), experiment.abstract_batch()),
        *experiment.constants,
    )
    num_params = training.num_params(state.params)
    held = [state]

    def step() -> float:
        held[0], metrics = jax.block_until_ready(compiled.call(held[0], next(batches)))
        return float(metrics.loss)

    return {"step": step}, num_params


def torch_side(job: Job) -> tuple[Calls, int]:
    """Calls of a peer, as its own training loop and sampler have them, and its parameters."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    stand_in(torch, job)
    sys.path.insert(0, job["directory"])
    import diffusion

    shape, own = job["shape"], job["side"] == "bd3lms"
    vocab_size = shape["vocab_size"] - 1  # the mask comes on top
    tokenizer = types.SimpleNamespace(
        vocab_size=vocab_size, mask_token=None, bos_token_id=0, eos_token_id=1, pad_token_id=1
    )
    config = settings(job)
    module = diffusion.Diffusion(nested(config), tokenizer)
    parameters = list(module.backbone.parameters())
    torch.nn.init.normal_(module.backbone.output_layer.linear.weight, std=shape["width"] ** -0.5)
    num_params = sum(p.numel() for p in parameters)
    if job["what"] == "sampling":
        module.eval()
        module.backbone.reset_kv_cache = lambda **_: reset_cache(torch, module.backbone, config)
        blocks = shape["sample_length"] // 16

        def sample() -> float:
            if not own:
                return float(module._sample(num_steps=job["steps"]).max())
            rows = config["loader"]["eval_batch_size"]
            arguments = {"num_steps": job["steps"] // blocks, "seqlen": shape["sample_length"]}
            tokens, _ = module._semi_ar_sampler(rows, num_strides=blocks, **arguments)
            if (tokens == module.mask_index).any() or tokens.shape != (rows, arguments["seqlen"]):
                raise RuntimeError(f"tokens are missing: {tokens.shape}")
            return float(tokens.max())

        sample()
        return {"sample": sample}, num_params

    module.train()
    size = shape["batch_size"], shape["length"]
    tokens = torch.randint(0, vocab_size, size)
    every = torch.ones(size)
    compute = module._loss
    if job.get("compiled"):
        import torch._dynamo

        torch._dynamo.config.capture_dynamic_output_shape_ops = True
        compute = torch.compile(module._loss)
    optimizer = torch.optim.AdamW(
        parameters, lr=3e-4, betas=(0.9, 0.999), weight_decay=0, fused=bool(job.get("compiled"))
    )

    def step() -> float:
        optimizer.zero_grad()
        loss = compute(tokens, every).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        module.ema.update(iter(parameters))
        return loss.item()

    return {"step": step}, num_params


def settings(job: Job) -> dict[str, Any]:
    """The config of a peer: its own defaults, but for sizes and dropout, which we have not."""
    shape, own = job["shape"], job["side"] == "bd3lms"
    shared = {
        "parameterization": "subs",
        "time_conditioning": False,
        "T": 0,
        "subs_masking": False,
        "backbone": "dit",
    }
    algorithm = {
        "name": "bd3lm",
        "sampler": "semi_ar",
        "cross_attn": True,
        "ignore_bos": True,
        "var_min": True,
        "mdlm_loss_scale": False,
    }
    return {
        **shared,
        **({"algo": {**shared, **algorithm}, "block_size": 16} if own else {}),
        "mode": "train",
        "model": {
            "hidden_size": shape["width"],
            "cond_dim": COND_DIM,
            "length": shape["length"],
            "n_blocks": shape["depth"],
            "n_heads": shape["num_heads"],
            "scale_by_sigma": True,
            "dropout": 0.0,
            "tie_word_embeddings": False,
            "attn_backend": "sdpa",
        },
        "noise": {"type": "loglinear"},
        "loader": {"eval_batch_size": job.get("rows", 8)},
        "eval": {"gen_ppl_eval_model_name_or_path": ""},
        "optim": {"lr": 3e-4},
        "training": {
            "ema": 0.9999,
            "antithetic_sampling": True,
            "importance_sampling": False,
            "change_of_variables": False,
            "sampling_eps": 1e-3,
            "sampling_eps_min": 1e-3,
            "sampling_eps_max": 1.0,
            "resample": False,
            "eval_nll": True,
        },
        "sampling": {
            "predictor": "ddpm_cache",
            "steps": job.get("steps", 64),
            "noise_removal": True,
            "kv_cache": own and job["what"] == "sampling",
            "first_hitting": False,  # is for one row at a time
            "nucleus_p": 1.0,
            "var_length": False,
        },
    }


def nested(values: Any) -> Any:
    """Dictionaries as objects with attributes."""
    if not isinstance(values, dict):
        return values
    return types.SimpleNamespace(**{name: nested(value) for name, value in values.items()})


def reset_cache(torch: Any, backbone: Any, config: dict[str, Any]) -> None:
    """As bd3lms' own ``reset_kv_cache``, which is for CUDA and bfloat16."""
    rows, width = config["loader"]["eval_batch_size"], config["model"]["hidden_size"]
    for block in backbone.blocks:
        block.kv_cache = torch.zeros(rows, backbone.max_seqlen, 3 * width)
        block.cache_idx = 0


def stand_in(torch: Any, job: Job) -> None:
    """Put stand-ins into ``sys.modules``; autocast becomes that of the CPU, or nothing."""

    def attribute(_: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything

    class Anything(metaclass=type("Classes", (type,), {"__getattr__": attribute})):
        __getattr__ = attribute

        def __init__(self, *_: Any, **__: Any):
            pass

        def __call__(self, *_: Any, **__: Any) -> Any:
            return self

    class Module(types.ModuleType):
        __getattr__ = attribute

    class LightningModule(torch.nn.Module):
        device, dtype = torch.device("cpu"), torch.float32

        def save_hyperparameters(self) -> None:
            pass

    def add(path: str, **values: Any) -> None:
        names = path.split(".")
        for i in range(len(names)):
            own = ".".join(names[: i + 1])
            if own == "models":  # theirs
                continue
            module = sys.modules.setdefault(own, Module(own))
            module.__path__, module.__spec__ = [], importlib.machinery.ModuleSpec(own, None)
            if i and names[0] != "models":
                setattr(sys.modules[".".join(names[:i])], names[i], module)
        vars(sys.modules[path]).update(values)

    def attention(qkv: Any, _: Any, length: int, *__: Any, causal: bool = False, **___: Any) -> Any:
        rows, (_, _, heads, size) = len(qkv) // length, qkv.shape
        q, k, v = qkv.view(rows, length, 3, heads, size).permute(2, 0, 3, 1, 4)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return out.transpose(1, 2).reshape(rows * length, heads, size)

    def rotate(qkv: Any, cos: Any, sin: Any) -> Any:
        cos, sin = cos[:, None, None], sin[:, None, None]
        first, second = qkv[:, :, :2].chunk(2, dim=-1)
        parts = [first * cos - second * sin, second * cos + first * sin]
        return torch.cat([torch.cat(parts, dim=-1), qkv[:, :, 2:]], dim=2)

    for path in STANDING_IN:
        add(path)
    add("lightning", LightningModule=LightningModule)
    add("tqdm", tqdm=lambda rows, **_: rows)
    add("flash_attn.layers.rotary", apply_rotary_emb_qkv_=rotate)
    add("flash_attn.flash_attn_interface", flash_attn_varlen_qkvpacked_func=attention)
    narrow, real = job["dtype"] == "bfloat16", torch.autocast

    def autocast(*_: Any, dtype: Any = None, enabled: bool = True) -> Any:
        if not narrow:
            return contextlib.nullcontext()
        return real("cpu", torch.bfloat16, enabled=enabled and dtype is torch.bfloat16)

    torch.amp.autocast = torch.cuda.amp.autocast = autocast
    if job.get("compiled"):
        torch.jit.script = as_now  # so that the compiler sees it


def as_now(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with the globals of now, as scripts have them: mdlm defines some twice."""
    return types.FunctionType(function.__code__, dict(function.__globals__), function.__name__)


def processor_seconds() -> float:
    """User and system seconds of this process and of the children that have ended."""
    own, ended = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime


def main() -> None:
    """Serve the job of the command line until standard input ends."""
    job = json.loads(sys.argv[1])
    os.sched_setaffinity(0, {job["core"]})  # before any library starts its threads
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    calls, num_params = (torch_side if "directory" in job else jax_side)(job)
    first = {name: call() for name, call in calls.items() if job["what"] != "sampling"}
    begun = processor_seconds()
    for _ in range(job.get("warm", 1)):
        for call in calls.values():
            call()
    answer(calls=list(calls), parameters=num_params, first=first, seconds=begun)
    for line in sys.stdin:
        start = time.process_time()
        value = calls[line.strip()]()
        seconds = time.process_time() - start
        answer(
            seconds=seconds,
            value=value,
            peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
        )


if __name__ == "__main__":
    main()
