"""Memory of training data larger than memory: a synthetic TFDS text dataset, read three ways.

    python -m experiments.benchmarks.large_data [--gigabytes=5] [--batches=4000]
        [--ways=stream,cache,memory] [--folder=DIR] [--out=FILE.json]

Writes documents of about 16 kB in array_record format, opens them in a process of its own for each
way (``data.stream``, ``data.cache``, all in memory) and reads shuffled batches of 32 rows of 1024
bytes. Prints the memory of the process without pages of mapped files (RssAnon of Linux) when the
dataset is open and along the batches, and rows per second. ``--folder`` is kept for the next run.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
from absl import app, flags

from mdm_jax import data

_GIGABYTES = flags.DEFINE_float("gigabytes", 5.0, "Size of the text.", lower_bound=0.001)
_BATCHES = flags.DEFINE_integer("batches", 4000, "Batches read.", lower_bound=10)
_WAYS = flags.DEFINE_list("ways", ["stream", "cache", "memory"], "Ways to read.")
_FOLDER = flags.DEFINE_string("folder", "", "Where the dataset lies; '' is a temporary one.")
_OUT = flags.DEFINE_string("out", "", "File for the record, JSON.")
_ONE = flags.DEFINE_string("one", "", "Read in one way, in this process; for internal use.")

_BYTES, _LENGTH, _BATCH = 16_384, 1024, 32
_NAME = "synthetic_text"
_SETTINGS: dict[str, dict[str, Any]] = {
    "stream": {"stream": True, "long_documents": "cut"},
    "cache": {"cache": "tokens"},
    "memory": {},
}


def write(folder: pathlib.Path, gigabytes: float) -> None:
    """Write the dataset, unless it is there."""
    import tensorflow_datasets as tfds

    count = round(gigabytes * 1e9 / _BYTES)

    class SyntheticText(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            text = tfds.features.FeaturesDict({"text": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=text, disable_shuffling=True)

        def _split_generators(self, dl_manager):  # noqa: ARG002
            return {"train": self._generate_examples(count), "test": self._generate_examples(64)}

        def _generate_examples(self, count):
            generator = np.random.default_rng(0)
            for i in range(count):
                size = generator.integers(_BYTES // 2, 3 * _BYTES // 2)
                yield i, {"text": generator.integers(97, 123, size, dtype=np.uint8).tobytes()}

    SyntheticText.name = _NAME
    SyntheticText(data_dir=str(folder), file_format="array_record").download_and_prepare()


def read(folder: pathlib.Path, way: str, batches: int) -> dict[str, Any]:
    """Memory and speed of one way to read."""
    settings = dict(_SETTINGS[way])
    if "cache" in settings:
        settings["cache"] = folder / settings["cache"]
    start, before = time.perf_counter(), _anonymous()
    dataset = data.tfds_text(
        _NAME,
        length=_LENGTH,
        tokenizer="byte",
        splits=("train", "test", "test"),
        data_dir=folder,
        download=False,
        **settings,
    )
    record = {"before": before, "open_seconds": time.perf_counter() - start, "open": _anonymous()}
    stream = data.train_iterator(dataset.train, _BATCH, 0, prefetch=2)
    marks = {round(batches * share): share for share in (0.01, 0.25, 0.5, 0.75, 1.0)}
    start, along = time.perf_counter(), {}
    for number in range(1, batches + 1):
        next(stream)
        if number in marks:
            along[number] = _anonymous()
    stream.close()
    rate = batches * _BATCH / (time.perf_counter() - start)
    return record | {"along": along, "rows_per_second": rate, "rows": len(dataset.train)}


def _anonymous() -> int:
    """Memory of the process in bytes, without pages of files."""
    status = pathlib.Path("/proc/self/status").read_text("ascii")
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments: {' '.join(argv[1:])}")
    if unknown := set(_WAYS.value) - set(_SETTINGS):
        raise app.UsageError(f"--ways must be among {list(_SETTINGS)}, got {sorted(unknown)}")
    if _ONE.value:
        print(json.dumps(read(pathlib.Path(_FOLDER.value), _ONE.value, _BATCHES.value)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(_FOLDER.value or temporary)
        write(folder, _GIGABYTES.value)
        command = [sys.executable, "-m", "experiments.benchmarks.large_data"]
        command += [f"--folder={folder}", f"--batches={_BATCHES.value}"]
        records = {}
        print("| way | opening | memory open | along the batches | rows/s |\n|---|---|---|---|---|")
        for way in _WAYS.value:
            out = subprocess.run(
                [*command, f"--one={way}"], stdout=subprocess.PIPE, text=True, check=True
            ).stdout
            record = records[way] = json.loads(out.splitlines()[-1])
            along = ", ".join(f"{used / 1e6:.0f}" for used in record["along"].values())
            print(
                f"| {way} | {record['open_seconds']:.0f} s | {record['open'] / 1e6:.0f} MB | "
                f"{along} MB | {record['rows_per_second']:.0f} |",
                flush=True,
            )
    if _OUT.value:
        record = {"gigabytes": _GIGABYTES.value, "cores": os.cpu_count(), "ways": records}
        pathlib.Path(_OUT.value).write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    app.run(main)
