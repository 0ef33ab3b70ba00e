"""Pictures as rows of quantised intensities."""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mdm_jax.checks import missing_package
from mdm_jax.data.datasets import SPLITS, Dataset, make_dataset, shuffled_split
from mdm_jax.data.rows import PictureRows, RowSource

_SPLIT_SEED = 0


def digits() -> Dataset:
    """Handwritten digits of scikit-learn: 1,797 pictures of 8 by 8, ids 0 to 16, mask 17.

    Shuffled with a fixed seed, split 80/10/10. Source: UCI "Optical recognition of handwritten
    digits" (CC BY 4.0), shipped with scikit-learn (BSD-3).
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise missing_package("the digits source", "digits", error) from error
    source = load_digits()
    pictures = source.images
    levels = pictures.astype(np.uint8).reshape(len(pictures), -1)
    parts = shuffled_split(len(levels), (0.8, 0.1, 0.1), _SPLIT_SEED, "digits")
    return picture_dataset(
        {name: levels[numbers] for name, numbers in parts.items()},
        classes={name: source.target[numbers] for name, numbers in parts.items()},
        num_classes=10,
        num_levels=17,
        event_shape=pictures.shape[1:],
        settings={"source": "digits", "split_seed": _SPLIT_SEED},
        headline="Handwritten digits from scikit-learn (UCI optdigits, CC BY 4.0), "
        f"{len(levels)} pictures.",
    )


def picture_dataset(
    parts: Mapping[str, np.ndarray | RowSource],
    *,
    num_levels: int,
    event_shape: tuple[int, ...],
    settings: dict[str, Any],
    headline: str,
    classes: Mapping[str, np.ndarray] | None = None,
    num_classes: int = 0,
) -> Dataset:
    """Dataset of flattened pictures: [rows, L] uint8 per split, or rows as they are read.

    ``classes``: [rows] per split, 0 to ``num_classes`` - 1, of arrays alone. The mask id is
    ``num_levels``. The fingerprint covers arrays, not rows that are read later, so
    ``settings`` must identify those.
    """
    shape = " x ".join(map(str, event_shape))
    stored = {name: part for name, part in parts.items() if isinstance(part, np.ndarray)}
    known = classes or {}
    return make_dataset(
        {**parts} | {name: PictureRows(own, known.get(name)) for name, own in stored.items()},
        None,
        vocab_size=num_levels + 1,
        length=math.prod(event_shape),
        event_shape=tuple(event_shape),
        digest=hashlib.sha256(b"".join(part.tobytes() for part in stored.values())).digest(),
        settings={
            **settings,
            "levels": num_levels,
            "event_shape": list(event_shape),
            "rows": [len(parts[name]) for name in SPLITS],
        },
        headline=headline,
        policy=f"Each picture is {shape}, {num_levels} intensities and the mask.",
        num_classes=num_classes,
        report={f"{name}_rows": len(levels) for name, levels in parts.items()},
    )
