"""Pictures as rows of quantised intensities."""

import numpy as np

from mdm_jax.data.datasets import (
    SPLITS,
    Dataset,
    PictureRows,
    describe,
    fingerprint_of,
    split_bounds,
)

_SPLIT_SEED = 0


def digits() -> Dataset:
    """Handwritten digits of scikit-learn: 1,797 pictures of 8 by 8 with 17 intensities.

    Ids 0 to 16 are intensities, the mask is 17. The pictures are shuffled once with a fixed seed
    and split 80/10/10. Source: UCI "Optical recognition of handwritten digits" (CC BY 4.0), as
    shipped with scikit-learn (BSD-3).

    Raises:
        ImportError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits source needs scikit-learn: pip install 'mdm_jax[digits]'"
        ) from error
    pictures = load_digits().images
    levels = pictures.astype(np.uint8).reshape(len(pictures), -1)
    order = np.random.Generator(np.random.PCG64(_SPLIT_SEED)).permutation(len(levels))
    first, second = split_bounds(len(levels), (0.8, 0.1, 0.1), "digits")
    parts = np.split(levels[order], [first, second])
    return picture_dataset(
        dict(zip(SPLITS, parts)),
        num_levels=17,
        event_shape=pictures.shape[1:],
        settings={"source": "digits", "split_seed": _SPLIT_SEED},
        headline=(
            "Handwritten digits from scikit-learn (UCI optdigits, CC BY 4.0), "
            f"{len(levels)} pictures."
        ),
    )


def picture_dataset(
    parts: dict[str, np.ndarray],
    *,
    num_levels: int,
    event_shape: tuple[int, ...],
    settings: dict,
    headline: str,
) -> Dataset:
    """Dataset of flattened pictures.

    Args:
        parts: per split, [rows, L] uint8 in [0, num_levels).
        num_levels: intensities; the mask is the id after them.
        event_shape: shape of one picture, product L.
        settings: what else defines the rows, for the fingerprint.
        headline: first line of the description.
    """
    report = {f"{name}_rows": len(levels) for name, levels in parts.items()}
    content = b"".join(np.ascontiguousarray(parts[name]).tobytes() for name in SPLITS)
    length = int(np.prod(event_shape))
    settings = {
        **settings,
        "levels": num_levels,
        "event_shape": list(event_shape),
        "rows": [len(parts[name]) for name in SPLITS],
    }
    return Dataset(
        **{name: PictureRows(levels) for name, levels in parts.items()},
        tokenizer=None,
        vocab_size=num_levels + 1,
        mask_id=num_levels,
        length=length,
        unit="dimension",
        event_shape=tuple(event_shape),
        fingerprint=fingerprint_of(content, settings),
        description=describe(
            headline,
            None,
            f"Each picture is {' x '.join(map(str, event_shape))}, {num_levels} intensities and "
            "the mask.",
            report,
        ),
        report=report,
    )
