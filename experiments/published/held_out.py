"""A run measured on a file of other data: bound and, for problems of a task, accuracy.

python -m experiments.published.held_out --workdir=runs/sudoku9 --path=data/bank.jsonl --rows=1000

The file is a text for a run on text, of which the last 99 % count, and JSON lines of prompts and
answers for one on a task (python -m experiments.prepare). Tokenizer, rows and sampler are the run's
own. Prints JSON, with Monte Carlo standard errors and, under "data_", those over rows.
"""

import argparse
import json
import pathlib

from ml_collections import ConfigDict

from experiments.published import settings
from mdm_jax import files
from mdm_jax.launch.build import load_parameters, make_experiment
from mdm_jax.launch.modes.evaluate import measure_accuracy
from mdm_jax.launch.workdir import saved_config


def main() -> None:
    parser = argparse.ArgumentParser("python -m experiments.published.held_out")
    parser.add_argument("--workdir", required=True, help="of the run")
    parser.add_argument("--path", required=True, help="text, or JSON lines of prompts and answers")
    parser.add_argument("--rows", type=int, default=256, help="for the bound; 0: all")
    parser.add_argument("--answers", type=int, default=256, help="prompts to answer; 0: all")
    arguments = parser.parse_args()
    workdir = files.as_path(arguments.workdir)
    config = on_file(saved_config(workdir), arguments.workdir, arguments.path)
    config.evaluate.max_rows, config.sample.num_answers = arguments.rows, arguments.answers
    print(json.dumps(measure(config, workdir), indent=1))


def on_file(config: ConfigDict, workdir: str, path: str) -> ConfigDict:
    """The config of a run in ``workdir`` with the data of a file, for evaluation."""
    config.evaluate.final_split = "test"
    if config.data.source.startswith("task"):
        settings.from_file(config, path)
        config.data.valid_path = config.data.test_path = path
    else:
        tokenizer = str(pathlib.Path(workdir, "tokenizer.json"))
        config.data.update(source="text", path=path, tokenizer=tokenizer)
        config.data.fractions = (0.01, 0.0, 0.99)
    return config


def measure(config: ConfigDict, workdir: files.Path) -> dict:
    """Bound, and accuracy where there is a checker, of the run's best parameters."""
    experiment = make_experiment(config, workdir)
    step, params = load_parameters(experiment, workdir)
    _, source = experiment.held_out
    batches = experiment.batches(source, config.evaluate.max_rows)
    result = experiment.evaluate(params, experiment.key(0, "final"), batches, lambda _: None)
    return {
        "path": pathlib.Path(config.data.path).name,
        "step": step,
        "unit": experiment.dataset.unit,
        **experiment.family.record(result),
        **measure_accuracy(experiment, workdir, params),
    }


if __name__ == "__main__":
    main()
