"""The suites of the stability study, as data: tasks, methods, seeds and budgets.

``experiments/study/runs.py`` turns a suite into runs of the launcher.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from experiments.study.methods import (
    ATTEMPTS,
    AUTO,
    FIELD,
    FLAT_WEIGHTS,
    METHODS,
    PPOTS_UNWEIGHTED,
    Method,
)


@dataclasses.dataclass(frozen=True)
class Task:
    """Data, hyper-parameters and score of a comparison.

    Attributes:
        config: ``module`` or ``module:variant`` below ``experiments/configs``.
        score: field of ``evaluation.json`` that methods are compared by.
        settings: config fields by dotted name: the frozen hyper-parameters.
        pretraining: name of the task, among the suite's pretrainings, whose parameters runs start
            from. Masked methods share one such run, the autoregressive model has its own.
    """

    config: str
    score: str = "accuracy"
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    pretraining: str = ""

    @property
    def higher_is_better(self) -> bool:
        """Of the score."""
        return self.score == "accuracy"


@dataclasses.dataclass(frozen=True)
class Suite:
    """All runs of a study.

    Attributes:
        name: of the suite.
        tasks, methods: by name.
        seeds: of initial parameters, order of the data, and noise.
        budgets: "passes": batches have a K-th of the rows under K views; "steps": all rows.
        baseline: the method that others are compared with.
        pretrainings: tasks trained once, by ``pretrained_by``.
        pretrained_by: the one of :data:`METHODS` that the masked pretraining uses.
        measured_seeds: seeds whose gradient variance is measured while training.
        measured_noise: whether that with the rows fixed is measured too, and the baseline's at the
            same parameters.
        measured_points: at how many steps, the last among them; a divisor of the steps.
        evaluations: of the validation bound, likewise.
        groups, redraws: design of the measurement (``meter.efficiency``).
        settings: config fields of every run.
        gpu: whether it is made for one, whose time is then estimated before it starts.
    """

    name: str
    tasks: Mapping[str, Task]
    methods: Mapping[str, Method]
    seeds: tuple[int, ...]
    budgets: tuple[str, ...] = ("passes", "steps")
    baseline: str = "standard"
    pretrainings: Mapping[str, Task] = dataclasses.field(default_factory=dict)
    pretrained_by: str = "fixed_counts"
    measured_seeds: tuple[int, ...] = (0,)
    measured_noise: bool = True
    measured_points: int = 4
    evaluations: int = 4
    groups: int = 8
    redraws: int = 6
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    gpu: bool = False


_SMALL_NETWORK = {"model.width": 96, "model.depth": 3}
# Every optimizer.peak of the small tasks is the best of the suite "tune" (docs/study_appendix.md);
# that of "full" is not tuned.
_SUDOKU6 = Task(
    "study.sudoku6",
    settings=_SMALL_NETWORK | {"train.steps": 360, "train.batch_size": 16, "optimizer.peak": 1e-2},
)
_TEXT = Task(
    "study.text",
    "bits_per_unit",
    {"model.width": 64, "model.depth": 2, "train.steps": 360, "train.batch_size": 16}
    | {"optimizer.peak": 2e-2},
)
_FINE_TUNING = Task(
    "study.sudoku4",
    settings=_SMALL_NETWORK
    | {
        "data.task.noise_every": 2,
        "data.task.train_rows": 500,
        "train.steps": 180,
        "train.batch_size": 8,
        "optimizer.peak": 4e-2,
    },
    pretraining="sudoku4_pretraining",
)
_PRETRAINING = Task(
    "study.sudoku4",
    settings=_SMALL_NETWORK | {"train.steps": 300, "train.batch_size": 16},
)
_QUICK = {
    "evaluate.max_rows": 256,
    "evaluate.passes": 2,
    "evaluate.replicates": 2,
    "evaluate.final_passes": 4,
    "evaluate.final_replicates": 2,
    "evaluate.batch_size": 64,
    "sample.num_answers": 256,
    "train.log_every": 20,
}

_GPU_NETWORK = {"model.width": 384, "model.depth": 8, "model.num_heads": 6}

SUITES: dict[str, Suite] = {
    "small": Suite(
        name="small",
        tasks={"sudoku6": _SUDOKU6, "text": _TEXT, "sudoku4_noisy": _FINE_TUNING},
        methods=METHODS,
        seeds=(0, 1, 2, 3, 4),
        pretrainings={"sudoku4_pretraining": _PRETRAINING},
        measured_points=3,
        groups=8,
        redraws=6,
        settings=_QUICK,
    ),
    "full": Suite(
        name="full",
        tasks={
            "sudoku6": Task(
                "study.sudoku6",
                settings=_GPU_NETWORK | {"train.steps": 6000, "train.batch_size": 64},
            ),
            "chain": Task(
                "study.chain",
                settings=_GPU_NETWORK | {"train.steps": 20_000, "train.batch_size": 64},
            ),
            "text": Task(
                "study.text",
                "bits_per_unit",
                _GPU_NETWORK | {"train.steps": 4000, "train.batch_size": 64, "data.length": 256},
            ),
            "sudoku6_noisy": Task(
                "study.sudoku6_noisy",
                settings=_GPU_NETWORK | {"train.steps": 2000},
                pretraining="sudoku6_pretraining",
            ),
        },
        methods=METHODS,
        seeds=tuple(range(10)),
        pretrainings={
            "sudoku6_pretraining": Task(
                "study.sudoku6",
                settings=_GPU_NETWORK | {"train.steps": 6000, "train.batch_size": 64},
            )
        },
        gpu=True,
        measured_seeds=(0, 1, 2),
        measured_points=5,
        groups=16,
        redraws=16,
        settings=_QUICK | {"evaluate.max_rows": 0, "optimizer.peak": 5e-3, "sample.num_answers": 0},
    ),
    "smoke": Suite(
        name="smoke",
        tasks={"sudoku4": Task("study.sudoku4:smoke", "bits_per_unit")},
        methods={name: METHODS[name] for name in ("standard", "ema", "recommended")},
        seeds=(0, 1),
        budgets=("passes",),
        measured_points=2,
        evaluations=1,
        groups=2,
        redraws=2,
        settings={"train.log_every": 1, "train.monitors": (), "optimizer.name": "adamw"},
    ),
}


def tuning(
    suite: Suite, peaks: tuple[float, ...], seeds: tuple[int, ...], name: str = "standard"
) -> Suite:
    """A method of the suite on its tasks at several learning rates, on seeds of its own.

    The best of standard training by mean score is written into the suite's tasks by hand, for all
    methods.
    """
    method = suite.methods[name]
    methods = {
        f"{name}_{peak:g}": dataclasses.replace(
            method,
            label=f"{method.label}, peak {peak:g}",
            settings={**method.settings, "optimizer.peak": peak},
            note="",
        )
        for peak in peaks
    }
    return dataclasses.replace(
        suite,
        name="tune",
        methods=methods,
        seeds=seeds,
        budgets=("passes",),
        baseline=next(iter(methods)),
        measured_seeds=(),
    )


SUITES["attempts"] = dataclasses.replace(
    SUITES["small"],
    name="attempts",
    tasks={"sudoku6": _SUDOKU6},
    methods={name: METHODS[name] for name in ("standard", "recommended_for_answers")} | ATTEMPTS,
    budgets=("passes",),
    pretrainings={},
)
SUITES["confirmation"] = dataclasses.replace(
    SUITES["small"],
    name="confirmation",
    methods={
        name: METHODS[name]
        for name in ("standard", "recommended", "recommended_for_answers", "autoregressive")
    },
    seeds=(5, 6, 7, 8, 9),
    budgets=("passes",),
    measured_seeds=(5, 6, 7),
    measured_points=1,
    redraws=24,
    settings=_QUICK | {"sample.num_answers": 512},
)
SUITES["confirmation_rates"] = dataclasses.replace(
    SUITES["confirmation"],
    name="confirmation_rates",
    methods={"standard": METHODS["standard"], "highest_rates": ATTEMPTS["highest_rates"]},
)
SUITES["eight"] = dataclasses.replace(
    SUITES["confirmation"],
    name="eight",
    methods={
        **SUITES["confirmation"].methods,
        "highest_rates": ATTEMPTS["highest_rates"],
    },
    seeds=tuple(range(20, 28)),
    measured_seeds=(),
)
_TUNED = {"sudoku6": {"optimizer.peak": 4e-2}, "sudoku4_noisy": {"optimizer.peak": 8e-2}}
SUITES["tuned"] = dataclasses.replace(  # the best rates of the suite "tune_answers", and for both
    SUITES["eight"],
    name="tuned",
    tasks={"sudoku6": _SUDOKU6, "sudoku4_noisy": _FINE_TUNING},
    methods={
        "standard": METHODS["standard"],
        "standard_tuned": dataclasses.replace(
            METHODS["standard"], label="standard at these learning rates", of_task=_TUNED, note=""
        ),
        "answers_tuned": dataclasses.replace(
            METHODS["recommended_for_answers"],
            label="rates in [0.3, 0.8] at learning rates tuned for them",
            of_task=_TUNED,
            note="peaks of 0.04 on sudoku6 (standard's: 0.01) and of 0.08 in fine-tuning (0.04); "
            "on text the best is standard's",
        ),
    },
)
SUITES["curves"] = dataclasses.replace(  # what P-POTS is fitted to
    SUITES["eight"],
    name="curves",
    methods={"standard": METHODS["standard"]},
    seeds=(100,),
)
SUITES["unweighted"] = dataclasses.replace(
    SUITES["eight"],
    name="unweighted",
    methods={"standard": METHODS["standard"], "ppots_unweighted": PPOTS_UNWEIGHTED},
)
_LONGER = {"train.steps": 3 * 360}
SUITES["longer"] = dataclasses.replace(
    SUITES["eight"],
    name="longer",
    tasks={
        "text": dataclasses.replace(_TEXT, settings={**_TEXT.settings, **_LONGER}),
        "sudoku6": dataclasses.replace(_SUDOKU6, settings={**_SUDOKU6.settings, **_LONGER}),
    },
    pretrainings={},
)
SUITES["weights"] = dataclasses.replace(
    SUITES["eight"],
    name="weights",
    methods={"standard": METHODS["standard"]} | FLAT_WEIGHTS,
)
SUITES["finetune"] = Suite(
    name="finetune",
    tasks={
        "stories": Task("study.finetune:stories", settings={"optimizer.peak": 5e-3}),
        "sorting": Task("study.finetune:sorting", "bits_per_unit", {"optimizer.peak": 2e-3}),
    },
    methods={name: METHODS[name] for name in ("standard", "recommended")},
    seeds=tuple(range(8)),
    budgets=("passes",),
    measured_seeds=(),
    evaluations=1,
    settings={
        "evaluate.max_rows": 64,
        "evaluate.passes": 2,
        "evaluate.final_passes": 4,
        "evaluate.final_replicates": 2,
        "sample.num_answers": 128,
        "train.log_every": 20,
    },
)
SUITES["finetune_auto"] = dataclasses.replace(
    SUITES["finetune"],
    name="finetune_auto",
    methods={"standard": METHODS["standard"], "auto": AUTO},
)
_FASTER = {"model.dtype": "bfloat16"}
SUITES["larger"] = Suite(
    name="larger",
    tasks={
        "sudoku9": Task(
            "study.sudoku9",
            settings={"train.steps": 600, "train.batch_size": 16, "optimizer.peak": 2e-2} | _FASTER,
        ),
        "countdown4": Task(  # so small a model finds hardly any answer
            "study.countdown4",
            "bits_per_unit",
            {"train.steps": 600, "train.batch_size": 16, "optimizer.peak": 2e-2} | _FASTER,
        ),
        "text_subwords": Task(
            "study.text:subwords",
            "bits_per_unit",
            {"train.steps": 600, "train.batch_size": 16, "optimizer.peak": 4e-2}
            | _SMALL_NETWORK
            | _FASTER,
        ),
    },
    methods=FIELD | {"autoregressive": METHODS["autoregressive"]},
    seeds=tuple(range(8)),
    budgets=("passes",),
    measured_seeds=(),
    settings=_QUICK | {"sample.num_answers": 128},
)
SUITES["tune_larger"] = tuning(SUITES["larger"], (1e-2, 2e-2, 4e-2), (100,))
_NO_PARTITION = {name: method for name, method in FIELD.items() if name != "partition"}
# A pretrained model is no partition model. So small a one answers none of the problems.
SUITES["arithmetic"] = Suite(
    name="arithmetic",
    tasks={"mawps": Task("study.finetune:mawps", "bits_per_unit", {"optimizer.peak": 4e-3})},
    methods=_NO_PARTITION,
    seeds=tuple(range(8)),
    budgets=("passes",),
    measured_seeds=(),
    evaluations=1,
    settings=SUITES["finetune"].settings,
)
# Runs of "eight", "tuned", "unweighted", "weights" and the next three have the same settings, so
# that they may share a workdir.
SUITES["field_text"] = dataclasses.replace(
    SUITES["eight"],
    name="field_text",
    tasks={"text": _TEXT},
    methods={
        name: FIELD[name]
        for name in ("standard", "flat", "pairs", "partition", "bell", "bell_unweighted", "mirror")
    },
    pretrainings={},
)
SUITES["field_sudoku"] = dataclasses.replace(
    SUITES["field_text"],
    name="field_sudoku",
    tasks={"sudoku6": _SUDOKU6},
    methods={
        name: FIELD[name] for name in ("standard", "flat", "pairs", "partition", "bell_unweighted")
    },
)
SUITES["field_finetune"] = dataclasses.replace(
    SUITES["eight"],
    name="field_finetune",
    tasks={"sudoku4_noisy": _FINE_TUNING},
    methods={name: FIELD[name] for name in ("standard", "flat", "pairs", "bell_unweighted")},
)
SUITES["noise_scale"] = Suite(
    name="noise_scale",
    tasks={"text": _TEXT},
    methods={
        name: FIELD[name]
        for name in ("standard", "recommended", "recommended_for_answers", "mirror", "pairs")
    },
    seeds=(0, 1, 2),
    budgets=("passes",),
    measured_seeds=(0, 1, 2),
    measured_noise=False,
    measured_points=6,
    redraws=8,
    settings=_QUICK | {"sample.num_answers": 1},
)
_GSM8K = {"evaluate.max_rows": 256, "sample.num_answers": 0}
SUITES["a2d"] = Suite(
    name="a2d",
    tasks={
        "gsm8k_lora": Task("study.gsm8k:lora", settings=_GSM8K),
        "gsm8k_full": Task("study.gsm8k:full", settings=_GSM8K),
    },
    methods={
        name: FIELD[name]
        for name in (
            *("standard", "recommended_for_answers", "highest_rates", "ppots", "mirror"),
            *("ppots_mirror", "recommended"),
        )
    },
    seeds=tuple(range(8)),
    budgets=("passes",),
    measured_seeds=(),
    evaluations=3,
    gpu=True,
)
_PEAKS = (5e-3, 1e-2, 2e-2, 4e-2, 8e-2)
SUITES["tune"] = tuning(SUITES["small"], _PEAKS, (100, 101))
SUITES["tune_answers"] = tuning(SUITES["small"], _PEAKS, (100, 101), "recommended_for_answers")
SUITES["tune_finetune"] = tuning(SUITES["finetune"], (2e-3, 5e-3), (100,))
