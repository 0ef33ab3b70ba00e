"""Training: state, one jitted step, loop, checkpoints, metrics, meshes."""

from mdm_jax.progress import Progress
from mdm_jax.training.boards import Board, TensorBoard, WeightsAndBiases, import_wandb
from mdm_jax.training.checkpoints import (
    CheckpointError,
    CheckpointReader,
    Checkpoints,
    Restored,
    abstract,
)
from mdm_jax.training.ema import AverageOffset, averaged, new_average, update_average
from mdm_jax.training.loop import Hooks, Interrupt, Interrupted, LoopOptions, TrainingStopped, train
from mdm_jax.training.metrics import MetricWriter, SilentWriter, read_metrics
from mdm_jax.training.moments import store_in_8_bits, store_moments
from mdm_jax.training.monitors import (
    Monitor,
    baseline_monitor,
    gradient_noise_monitor,
    level_monitor,
    read_level_profile,
    read_monitors,
    weight_monitor,
)
from mdm_jax.training.optimizers import adamw, muon, warmup_cosine
from mdm_jax.training.step import (
    CompiledStep,
    StepMetrics,
    TrainState,
    compile_step,
    compiler_options,
    format_bytes,
    linen_init,
    make_train_step,
    new_state,
    num_params,
    step_draw,
)
from mdm_jax.training.stopping import EarlyStopping, StopSettings
