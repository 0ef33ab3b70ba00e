"""All benchmarks in one run: ``python -m experiments.benchmarks [--shapes=S,M] [--out=FILE.json]``.

Sampling on the M shape is most of the time; ``make bench`` bounds it with few rounds.
"""

from experiments.benchmarks import input_pipeline, sampling, train_step, variance_probe
from experiments.benchmarks.command import main

if __name__ == "__main__":
    main(train_step.PART, sampling.PART, variance_probe.PART, input_pipeline.PART)
