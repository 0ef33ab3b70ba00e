"""What the configs of the study share."""

from ml_collections import ConfigDict

from mdm_jax.launch import config as launch_config


def reasoning(name: str, batch_size: int, steps: int) -> ConfigDict:
    """A task by name, answered greedily, the surest place first."""
    config = launch_config.get_config()
    config.data.source = "task"
    config.data.task.name = name
    config.train.update(steps=steps, batch_size=batch_size)
    config.model.learned_positions = 256  # grids are learnt several times sooner with them
    config.evaluate.update(batch_size=64, max_rows=256)
    config.sample.update(sampler="by_confidence", temperature=0.0, gap=0)
    return config


def fine_tune(config: ConfigDict) -> None:
    """Small batches of few problems, as when a pretrained model is taught something else."""
    config.data.task.train_rows = 2000
    config.train.update(steps=400, batch_size=8, evaluate_every=200)
    config.optimizer.peak = 5e-3


def chosen(config: ConfigDict, name: str, variant: str, *others: str) -> ConfigDict:
    """The config in its variant, "" or "smoke"; ValueError for another one."""
    measured_with = {"peak": 2e-2, "warmup_steps": 50, "ema_decay": 0.99}  # for any train.steps
    unset = {n: value for n, value in measured_with.items() if config.optimizer[n] is None}
    config.optimizer.update(unset)
    if variant == "smoke":
        launch_config.shrink(config)
    elif variant:
        known = " and ".join(map(repr, (*others, "smoke")))
        raise ValueError(f"{name} has the variants {known}, not {variant!r}")
    return config
