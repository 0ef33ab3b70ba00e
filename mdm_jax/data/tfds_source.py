"""Text and small-image datasets of TensorFlow Datasets, read without TensorFlow."""

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from mdm_jax.checks import Whole, checked, missing_package
from mdm_jax.data.datasets import SPLITS, Dataset, Length, TextField, VocabSize, make_dataset
from mdm_jax.data.images import picture_dataset
from mdm_jax.data.packing import (
    Align,
    DocumentLayout,
    DocumentPacking,
    DocumentPadding,
    LongDocuments,
    document_dataset,
    document_rows,
    encode_documents,
)
from mdm_jax.data.rows import PictureRows, VectorisedRows
from mdm_jax.data.tokenizers import Tokenizer, make_tokenizer
from mdm_jax.types import Batch

DEFAULT_SPLITS = ("train[:90%]", "train[90%:95%]", "train[95%:]")
Stream = Annotated[bool, "tfds: read rows when they are needed, not all at the start"]
_READ = 256  # examples read at a time
_FITTED = 10_000  # examples that a tokenizer is fitted to in a stream


@checked
def tfds_text(
    name: str,
    *,
    length: Length,
    text_field: TextField = "text",
    splits: Sequence[str] = DEFAULT_SPLITS,
    data_dir: str | os.PathLike | None = None,
    download: bool = True,
    tokenizer: str | Tokenizer = "char",
    bpe_vocab_size: VocabSize = 4096,
    packing: DocumentPacking = "",
    long_documents: LongDocuments = "split",
    document_padding: DocumentPadding = "pad_hidden",
    align: Align = 1,
    stream: Stream = False,
    cache: str | os.PathLike | None = None,
) -> Dataset:
    """Rows of documents, one per example, from a TFDS dataset with a text feature.

    All text is encoded at once and kept at 4 bytes per token, unless ``cache`` or ``stream`` is
    given: then memory does not grow with the dataset, and each process reads its own rows only.
    Other arguments, rows and errors are those of :func:`mdm_jax.data.documents`.

    Args:
        name: with config and version where needed ("lm1b", "my_data/a:1.0.0").
        text_field, splits: feature that holds the text; TFDS expressions for train, valid, test.
        data_dir, download: where TFDS keeps its datasets, None: its default; whether it may prepare
            one.
        stream: read and encode examples when their rows are needed, one row each. A tokenizer that
            is fitted sees 10,000 examples, evenly spaced. No packing, and ``long_documents`` "cut"
            or "error".
        cache: folder where all text is encoded once, a pass that every process may make, and from
            which tokens are mapped; the rows are those without it.

    ValueError if the dataset, a split or the feature does not exist, is empty, not array_record or
    not UTF-8 text; ImportError without tensorflow-datasets.
    """
    layout = DocumentLayout(length, packing, long_documents, document_padding, align)
    sources = _open(name, splits, data_dir, download)
    texts = {part: _Examples(source, text_field, _as_text) for part, source in sources.items()}
    headline = _headline(sources["train"].dataset_info, splits)
    origin = f"tfds dataset {name!r}"
    settings = {"source": "tfds_text"} | ({"packing": packing} if packing else {})
    if not stream:
        return document_dataset(
            texts,
            layout,
            tokenizer,
            bpe_vocab_size,
            origin=origin,
            headline=headline,
            settings=settings,
            cache=cache,
            identity=_identity(sources, text_field),
        )
    if packing or long_documents == "split" or cache:
        raise ValueError(
            "stream=True makes one row of each example: it needs packing='', no cache and "
            f"long_documents='cut' or 'error', got packing={packing!r}, cache={cache!r} and "
            f"long_documents={long_documents!r}; for packed or split documents use cache alone"
        )
    codec = make_tokenizer(tokenizer, texts["train"].spaced(_FITTED), bpe_vocab_size)

    def rows(documents: Sequence[str]) -> Batch:
        encoded = encode_documents(documents, codec)
        packed, _ = document_rows(encoded, codec, layout, origin)
        return packed.rows(np.arange(len(packed)))

    return make_dataset(
        {part: StreamedRows(examples, rows) for part, examples in texts.items()},
        codec,
        length=length,
        digest=hashlib.sha256(json.dumps(_identity(sources, text_field)).encode()).digest(),
        settings=settings
        | {"stream": True, **layout.settings(), "long_documents": long_documents}
        | {"tokenizer": codec.fingerprint},
        headline=headline,
        policy="Examples are read when needed, a row each; documents end with EOS, those longer "
        f"than a row: {long_documents}.",
        report={f"{part}_rows": len(examples) for part, examples in texts.items()},
    )


@checked
def tfds_images(
    name: str,
    *,
    levels: Annotated[int, Whole("[2, 256]", "intensities", "of a picture's element")] = 256,
    image_field: Annotated[str, "tfds: feature that holds the picture"] = "image",
    label_field: Annotated[str, 'tfds: feature that holds its class; "": none'] = "",
    splits: Sequence[str] = DEFAULT_SPLITS,
    data_dir: str | os.PathLike | None = None,
    download: bool = True,
    stream: Stream = False,
) -> Dataset:
    """Rows of one flattened picture each, from a TFDS dataset of uint8 images of one shape.

    An intensity v becomes ``v * levels // 256``, 2 <= levels <= 256. A trailing axis of one channel
    is removed. All pictures are decoded at once and kept at one byte per element, or with
    ``stream``, without classes, when they are needed. Else as :func:`tfds_text`; ValueError too if
    the pictures are not uint8 of one shape, or classes no integers from 0.
    """
    sources = _open(name, splits, data_dir, download)
    first = np.asarray(next(_values(sources["train"], image_field, [0]))[0])
    shape = first.shape

    def as_levels(picture: Any, origin: str) -> np.ndarray:
        picture = np.asarray(picture)
        if picture.dtype != np.uint8 or picture.shape != shape or picture.ndim < 2:
            raise ValueError(
                f"{origin}: expected a uint8 picture of shape {shape}, got {picture.dtype} of "
                f"shape {picture.shape}; all pictures must be alike"
            )
        return (picture.reshape(-1).astype(np.uint16) * levels // 256).astype("u1")

    def rows(pictures: Sequence[np.ndarray]) -> Batch:
        return PictureRows(np.stack(pictures)).rows(np.arange(len(pictures)))

    parts = {part: _Examples(source, image_field, as_levels) for part, source in sources.items()}
    settings = {"source": "tfds_images"}
    classes, num_classes = None, 0
    if label_field:
        if stream:
            raise ValueError(
                f"data.label_field={label_field!r}: pictures that are streamed come without "
                "classes; leave data.stream at False, or data.label_field empty"
            )
        labels = {p: _Examples(s, label_field, _as_class) for p, s in sources.items()}
        classes = {part: np.array(list(each), np.int32) for part, each in labels.items()}
        num_classes = 1 + int(max(each.max() for each in classes.values()))
    if stream:
        settings["stream"] = _identity(sources, image_field)
        pictures = {part: StreamedRows(examples, rows) for part, examples in parts.items()}
    else:
        pictures = {part: np.stack(list(examples)) for part, examples in parts.items()}
    return picture_dataset(
        pictures,
        classes=classes,
        num_classes=num_classes,
        num_levels=levels,
        event_shape=shape[:-1] if len(shape) == 3 and shape[-1] == 1 else shape,
        settings=settings,
        headline=_headline(sources["train"].dataset_info, splits),
    )


class _Examples:
    """One feature of a split, read and converted one block of examples after another."""

    def __init__(self, source: Any, field: str, convert: Callable[[Any, str], Any]):
        self._source, self._field, self._convert = source, field, convert

    def __len__(self) -> int:
        return len(self._source)

    def read(self, indices: Sequence[int]) -> Iterator[Any]:
        return (self._convert(*value) for value in _values(self._source, self._field, indices))

    def __iter__(self) -> Iterator[Any]:
        return self.read(range(len(self)))

    def spaced(self, most: int) -> Iterator[Any]:
        """At most so many, evenly spaced."""
        count = min(most, len(self))
        return self.read([i * len(self) // count for i in range(count)])


class StreamedRows(VectorisedRows):
    """Row i is made of example i of a split when it is needed; ``convert`` makes n rows at once."""

    def __init__(self, examples: _Examples, convert: Callable[[Sequence[Any]], Batch]):
        self._examples, self._convert = examples, convert

    def __len__(self) -> int:
        return len(self._examples)

    def _read(self, indices: np.ndarray) -> Batch:
        return self._convert(list(self._examples.read(indices.tolist())))


def _open(
    name: str, splits: Sequence[str], data_dir: str | os.PathLike | None, download: bool
) -> dict[str, Any]:
    if isinstance(splits, str) or len(splits) != len(SPLITS):
        raise ValueError(f"splits must be three expressions (train, valid, test), got {splits!r}")
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise missing_package("the tfds source", "data", error) from error
    origin = f"tfds dataset {name!r} in {data_dir or 'the default data_dir'}"
    _check_features(tensorflow_datasets, name, data_dir, origin)
    sources = {}
    for part, split in zip(SPLITS, splits):
        try:
            sources[part] = tensorflow_datasets.data_source(
                name,
                split=split,
                data_dir=None if data_dir is None else os.fspath(data_dir),
                download=download,
                # tfrecord, the default, has no random access and needs TensorFlow; parquet is
                # refused too, since TFDS 4.9.10 ignores slices such as "train[:90%]" there.
                builder_kwargs={"file_format": "array_record"},
            )
        except tensorflow_datasets.core.registered.DatasetNotFoundError as error:
            raise ValueError(
                f"{origin}: not found, neither prepared there nor known to tensorflow-datasets"
            ) from error
        except (ValueError, KeyError, NotImplementedError) as error:
            raise ValueError(
                f"{origin}: the {part} split {split!r} cannot be opened ({error}). It must exist, "
                "hold examples and be prepared with file_format='array_record'; download=True "
                "lets TFDS prepare the datasets it knows"
            ) from error
    return sources


def _check_features(tfds: Any, name: str, data_dir: str | os.PathLike | None, origin: str) -> None:
    """Raise ValueError if prepared files name a class outside of TFDS, whose module it imports."""
    known, _ = tfds.core.naming.parse_builder_name_kwargs(name)
    if known.namespace:
        raise ValueError(
            f"{origin}: names with a namespace ({known.namespace}:) load code of others and are "
            "refused; prepare the dataset yourself and name it without"
        )
    for folder in tfds.core.utils.file_utils.list_data_dirs(data_dir and os.fspath(data_dir)):
        for path in sorted(pathlib.Path(folder, known.name).glob("**/features.json")):
            try:
                classes = set(_class_names(json.loads(path.read_text("utf-8"))))
            except ValueError as error:
                raise ValueError(f"{path}: not a description of features ({error})") from error
            if foreign := sorted(c for c in classes if not c.startswith("tensorflow_datasets.")):
                raise ValueError(
                    f"{path}: names {', '.join(foreign)}, which would be imported and run; only "
                    "TFDS's own features are read. Prepare the dataset with those"
                )


def _class_names(node: Any) -> Iterator[str]:
    """Every class that a ``features.json`` names, at any depth, in old and new files."""
    if isinstance(node, list):
        node = dict(enumerate(node))
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if key == "pythonClassName" or (key == "type" and "content" in node):
            yield str(value)
        # Some features are JSON in a string.
        yield from _class_names(json.loads(value) if key == "json" else value)


def _values(source: Any, field: str, indices: Sequence[int]) -> Iterator[tuple[Any, str]]:
    """Values of one feature in the order of ``indices``, each with a name for error messages."""
    features = source.dataset_info.features
    title = f"tfds dataset {source.dataset_info.full_name}, split {source.split}"
    if field not in features:
        raise ValueError(f"{title}: no feature {field!r}; it has {sorted(features)}")
    for start in range(0, len(indices), _READ):
        block = list(indices[start : start + _READ])
        for i, example in zip(block, source.__getitems__(block)):
            yield example[field], f"{title}, example {i}"


def _identity(sources: Mapping[str, Any], field: str) -> dict[str, Any]:
    """JSON value that identifies the content of one feature without reading it."""
    info = sources["train"].dataset_info
    splits = {part: [str(source.split), len(source)] for part, source in sources.items()}
    return {"name": info.full_name, "size": info.dataset_size, "field": field, "splits": splits}


def _as_class(value: Any, origin: str) -> int:
    if not np.issubdtype(np.asarray(value).dtype, np.integer) or np.ndim(value) or value < 0:
        raise ValueError(f"{origin}: the class must be an integer from 0, got {value!r}")
    return int(value)


def _as_text(value: Any, origin: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, bytes):
        kind = getattr(value, "dtype", type(value).__name__)
        raise ValueError(f"{origin}: the feature must be text, got {kind}; name another text_field")
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{origin}: not UTF-8 at byte {error.start} ({error.reason})") from error


def _headline(info: Any, splits: Sequence[str]) -> str:
    about = " ".join(info.description.split())[:200]
    licence = getattr(info.redistribution_info, "license", "") or "not stated by TFDS"
    return (
        f"TFDS {info.full_name}, splits {', '.join(splits)}: {about} Licence: {licence}. "
        f"Source: {info.homepage or 'not stated by TFDS'}."
    )
