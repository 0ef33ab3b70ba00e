"""The launcher: configs, working directories, training, evaluation, samples, variance."""

import re

HELP_FLAG = re.compile("--?h(elp(short)?)?")
"""Flags that ask for help; here, as those who read them import each other."""
