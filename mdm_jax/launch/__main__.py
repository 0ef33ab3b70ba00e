from mdm_jax.launch.main import run  # python -m mdm_jax.launch: the console script mdm

run()
