"""What a process that reads data loads, and how it ends."""

import subprocess
import sys

PROGRAM = """
import sys
from mdm_jax import data
heavy = ["grain", "tokenizers", "sklearn", "tensorflow_datasets", "tensorflow"]
print([name for name in heavy if name in sys.modules])
import jax
source = data.embedded_text(32).train
streams = [data.train_iterator(source, 8, 0, prefetch=2, place=jax.device_put) for _ in range(2)]
print([next(stream).tokens.shape for stream in streams])
stream = streams[0]
"""


def test_importing_loads_no_heavy_library_and_a_process_with_open_streams_ends_without_noise():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines() == ["[]", "[(8, 32), (8, 32)]"]
    assert done.stderr == ""
