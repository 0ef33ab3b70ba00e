"""The launcher under its old name: ``python -m experiments.launch --mode=...``."""

from mdm_jax.launch.__main__ import run

if __name__ == "__main__":
    run()
