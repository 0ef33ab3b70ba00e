"""Memory of training data larger than memory: a synthetic TFDS text dataset, read three ways.

    python -m experiments.benchmarks.large_data [--gigabytes=5] [--batches=4000]
        [--ways=stream,cache,memory] [--folder=DIR] [--out=FILE.json]

Writes documents of about 16 kB in array_record format, opens them in a process of its own for each
way (``data.stream``, ``data.cache``, all in memory) and reads shuffled batches of 32 rows of 1024
bytes. Prints the memory of the process without pages of mapped files (RssAnon of Linux) when the
dataset is open and along the batches, and rows per second. ``--folder`` is kept for the next run.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from mdm_jax import data

_BYTES, _LENGTH, _BATCH, _PARTS = 16_384, 1024, 32, 8
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
            # A split of more than 1 GB is written with TensorFlow, which is not installed.
            parts = range(_PARTS)
            sizes = {f"part{i}": count // _PARTS for i in parts} | {"valid": 64}
            return {name: self._generate_examples(size, name) for name, size in sizes.items()}

        def _generate_examples(self, count, name):
            generator = np.random.default_rng(list(name.encode()))
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
        splits=("+".join(f"part{i}" for i in range(_PARTS)), "valid", "valid"),
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=5.0, help="size of the text, at most 7")
    parser.add_argument("--batches", type=int, default=4000, help="batches read")
    parser.add_argument("--ways", default="stream,cache,memory", help="ways to read")
    parser.add_argument("--folder", default="", help="where the dataset lies and stays")
    parser.add_argument("--out", default="", help="file for the record, JSON")
    parser.add_argument("--one", choices=_SETTINGS, help="read in this process; for internal use")
    options = parser.parse_args()
    ways = options.ways.split(",")
    if unknown := set(ways) - set(_SETTINGS):
        parser.error(f"--ways must be among {list(_SETTINGS)}, got {sorted(unknown)}")
    if options.one:
        print(json.dumps(read(pathlib.Path(options.folder), options.one, options.batches)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(options.folder or temporary)
        write(folder, options.gigabytes)
        command = [sys.executable, "-m", "experiments.benchmarks.large_data"]
        command += [f"--folder={folder}", f"--batches={options.batches}"]
        records = {}
        print("| way | opening | memory open | along the batches | rows/s |\n|---|---|---|---|---|")
        for way in ways:
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
    if options.out:
        record = {"gigabytes": options.gigabytes, "cores": os.cpu_count(), "ways": records}
        pathlib.Path(options.out).write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
