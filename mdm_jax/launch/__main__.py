"""``python -m mdm_jax.launch``: the same as the console script ``mdm``."""

from mdm_jax.launch.main import run

if __name__ == "__main__":
    run()
