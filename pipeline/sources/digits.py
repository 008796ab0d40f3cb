"""scikit-learn's 8×8 handwritten digits: real images with labels and no download, for tests and the demo."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from pipeline.errors import SourceError
from pipeline.sources.base import Sample

_TEST_EVERY = 5


class Digits:
    """The 1,797 digits of the UCI optical-recognition test set, as grey 8×8 PNGs.

    Pixel values 0..16 become 0..255 by ``round(v * 255 / 16)``: 17 distinct levels, so nothing is lost. Samples
    come in the order of the data set, and the key of an image is its index there, whatever the split.

    There is no official split of these images. Here every fifth image of each class is a test image: balanced,
    with no random generator whose stream could change, and spread over the whole file, so that a drift along it
    touches both halves alike. The data set does not say who wrote which digit, so train and test share their 13
    writers: accuracy on this test split says nothing about new ones.

    Parameters
    ----------
    split
        ``"train"`` (1,442 images), ``"test"`` (355) or ``"all"``.

    Raises
    ------
    SourceError
        `split` is none of the three.
    """

    classes: tuple[str, ...] = tuple(str(digit) for digit in range(10))

    def __init__(self, split: str = "train") -> None:
        if split not in ("train", "test", "all"):
            raise SourceError(
                f"Expected split 'train', 'test' or 'all' of digits, found {split!r}. Pass one of the three."
            )
        from sklearn.datasets import load_digits  # a second to import, and most runs read other sources

        data: Any = load_digits()  # a Bunch, which its annotation does not say
        self._images = np.round(data.images * 255 / 16).astype(np.uint8)
        self._labels = np.asarray(data.target)
        is_test = np.zeros(len(self._labels), dtype=bool)
        for label in range(len(self.classes)):
            is_test[np.flatnonzero(self._labels == label)[_TEST_EVERY - 1 :: _TEST_EVERY]] = True
        chosen = {"train": ~is_test, "test": is_test, "all": np.ones_like(is_test)}[split]
        self._indices = np.flatnonzero(chosen)

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Sample]:
        for index in self._indices:
            yield Sample(f"digits-{index:04d}", _png(self._images[index]), "png", int(self._labels[index]))


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    # Level 0: 64 pixels have nothing to gain, and no zlib's choice of how to deflate them enters the bytes.
    Image.fromarray(image).save(buffer, "png", compress_level=0)
    return buffer.getvalue()
