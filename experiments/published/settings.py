"""What the configs of the benchmarks share."""

from ml_collections import ConfigDict

from experiments.configs.study.settings import chosen, reasoning
from mdm_jax.launch import config as launch_config


def text(steps: int, length: int) -> ConfigDict:
    """The network and optimiser of SEDD and MDLM: 12 blocks of width 768, AdamW at 3e-4.

    Batches of 512 rows, 2,500 steps of warm-up to a constant learning rate, an average over 10,000
    steps, and no decay of weights; their dropout of 0.1 is left out. Our chain of transforms stays.
    """
    config = launch_config.get_config()
    config.data.length = length
    config.model.update(width=768, depth=12, num_heads=12, dtype="bfloat16", rope_base=10_000.0)
    config.train.update(steps=steps, batch_size=512, evaluate_every=10_000, checkpoint_every=10_000)
    config.train.log_every = 100
    config.optimizer.update(name="adamw", peak=3e-4, b2=0.999, weight_decay=0.0, ema_decay=0.9999)
    config.optimizer.update(warmup_steps=2500, final_fraction=1.0)
    config.evaluate.update(batch_size=128, max_rows=2048, final_passes=4, final_replicates=4)
    config.sample.gap = 0
    return config


def puzzles(task: str, steps: int, batch_size: int, peak: float) -> ConfigDict:
    """Problems of a task, answered greedily, the surest position by the margin first.

    AdamW with warm-up and cosine, as in the code of Ye et al. 2024.
    """
    config = reasoning(task, batch_size, steps)
    config.model.update(dtype="bfloat16", learned_positions=512)
    config.train.update(evaluate_every=steps // 50, checkpoint_every=steps // 50, log_every=100)
    config.optimizer.update(name="adamw", peak=peak, b2=0.999, weight_decay=0.0, ema_decay=0.999)
    config.optimizer.update(warmup_steps=min(2000, steps // 20))
    config.data.task.update(valid_rows=2048, test_rows=2048)
    config.evaluate.update(batch_size=512, max_rows=2048)
    config.sample.update(sampler="by_margin", num_answers=0)
    return config


def from_file(config: ConfigDict, path: str) -> ConfigDict:
    """The same problems from JSON lines of prompts and answers in ``path``."""
    config.data.update(source="task_file", path=path)
    defaults = launch_config.get_config().data.task
    rows = ("train_rows", "valid_rows", "test_rows")  # those of the file
    config.data.task.update({name: defaults[name] for name in rows})
    return config


__all__ = ["chosen", "from_file", "puzzles", "reasoning", "text"]
