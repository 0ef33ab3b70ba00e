"""The launcher: configs, working directories, training, evaluation, samples, variance."""
