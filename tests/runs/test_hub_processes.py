"""Loading onto a mesh of two processes, and saving from it."""

import json
import pathlib
import subprocess
import sys

import hub_process_script
import launching
import numpy as np
import pytest

from mdm_jax import hub
from mdm_jax.hub import files

DATA = pathlib.Path(__file__).parents[1] / "data" / "hub"


@pytest.mark.slow
def test_two_processes_load_and_save_as_one(tmp_path):
    name = "a2d_qwen3-1"
    address, target = f"localhost:{launching.free_port()}", tmp_path / "saved"
    started = [
        subprocess.Popen(
            [
                *(sys.executable, hub_process_script.__file__, address, "2", str(number)),
                *(str(DATA / name), str(target)),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**launching.environment(4), "PYTHONPATH": str(launching.ROOT)},
        )
        for number in range(2)
    ]
    found = launching.finish_several(started)
    assert all(code == 0 for code, _, _ in found), found
    record = json.loads(found[0][1].strip().splitlines()[-1])
    assert record["split"] > 10 and record["shards"] > 1
    alone = hub.load(DATA / name, dtype="float32").logits(np.arange(1, 9).reshape(1, 8))
    np.testing.assert_allclose(record["logits"], alone, rtol=0, atol=1e-5)
    before, after = files.TensorFiles(DATA / name), files.TensorFiles(target)
    assert (after.shapes, after.dtypes) == (before.shapes, before.dtypes)
    for tensor in before.shapes:
        assert before.read(tensor).tobytes() == after.read(tensor).tobytes(), tensor
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]  # nothing half-made
