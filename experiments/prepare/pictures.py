"""Pictures with classes from a NumPy archive, as a dataset of TFDS."""

import io
import lzma
import pathlib
import re
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from experiments.prepare.corpora import refuse_existing


def read(source: pathlib.Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Pictures [N, H, W] or [N, H, W, C] uint8 and classes [N] by split, of an .npz or .npz.xz.

    The archive has SPLIT_images and SPLIT_labels for each split, "train" among them. ValueError for
    other arrays, OSError for a file that cannot be read.
    """
    packed = source.read_bytes()
    try:
        plain = lzma.decompress(packed) if source.suffix == ".xz" else packed
        with np.load(io.BytesIO(plain), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise ValueError(f"{source}: no .npz of plain arrays, or .xz of one ({error})") from error
    splits = [name.removesuffix("_images") for name in arrays if name.endswith("_images")]
    wanted = {f"{split}_{what}" for split in splits for what in ("images", "labels")}
    if "train" not in splits or wanted != arrays.keys():
        raise ValueError(
            f"{source}: needs train_images and train_labels, and both of each further split, "
            f"got {', '.join(arrays) or 'nothing'}"
        )
    found = {split: (arrays[f"{split}_images"], arrays[f"{split}_labels"]) for split in splits}
    shape = found["train"][0].shape[1:]
    for split, (images, labels) in found.items():
        good = images.dtype == np.uint8 and images.shape[1:] == shape and len(shape) in (2, 3)
        if not good or labels.shape != (len(images),) or labels.dtype.kind not in "iu":
            raise ValueError(
                f"{source}: {split} needs uint8 pictures of one shape [N, H, W(, C)] and integer "
                f"labels [N], got {images.dtype} {list(images.shape)} and {labels.dtype} "
                f"{list(labels.shape)}"
            )
    return found


def write(found: dict[str, tuple[np.ndarray, np.ndarray]], to: pathlib.Path) -> pathlib.Path:
    """Write splits of :func:`read` as the TFDS dataset ``to.name`` in the folder ``to.parent``.

    Features "image" and "label", format array_record. Returns the folder of the version; ValueError
    for a name that TFDS does not take, or that is there.
    """
    import tensorflow_datasets as tfds

    if not re.fullmatch("[a-z][a-z0-9_]*", to.name):
        raise ValueError(f"--to must end with a name of letters, digits and _, got {to.name!r}")
    refuse_existing(to)
    height, width, *channels = found["train"][0].shape[1:]
    classes = 1 + max(int(labels.max()) for _, labels in found.values())

    class Pictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Pictures with classes, from arrays."""

        name = to.name
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            features = tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=(height, width, *(channels or [1])), encoding_format="png"
                    ),
                    "label": tfds.features.ClassLabel(num_classes=classes),
                }
            )
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, _manager: Any) -> dict[str, Any]:
            return {split: self._generate_examples(*each) for split, each in found.items()}

        def _generate_examples(
            self, images: np.ndarray, labels: np.ndarray
        ) -> Iterator[tuple[int, dict[str, Any]]]:
            for number, (image, label) in enumerate(zip(images, labels)):
                yield number, {"image": _png(image), "label": int(label)}

    tfds.disable_progress_bar()
    builder = Pictures(data_dir=to.parent, file_format="array_record")
    builder.download_and_prepare()
    return pathlib.Path(builder.data_dir)


def _png(image: np.ndarray) -> io.BytesIO:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image).save(stream, "png")
    stream.seek(0)
    return stream
