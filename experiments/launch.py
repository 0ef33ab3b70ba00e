"""The launcher under its old name: ``python -m experiments.launch --mode=...``."""

from mdm_jax.launch.main import run

if __name__ == "__main__":
    run()
