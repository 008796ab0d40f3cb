"""The work of one unit: read its images, encode them, commit its Zarr shards. Knows no Ray.

    tar --pread--> bytes --threads: sha256, decode, transform--> batch --encoder--> rows of the unit --> commit

Batches are decoded while the one before is encoded. In memory at a time: the rows of one unit (the plan bounds them),
one encoded Zarr shard, and the batches in flight.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.encoders.base import Encoder
from pipeline.errors import ShardError
from pipeline.preprocess import DecodeError, blank_image, decode
from stores import spec
from stores.samples import SAMPLES_SCHEMA
from stores.writer import StoreWriter

_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class _Batch:
    """Images of a unit, decoded: `inputs` is (B, 3, H, W), zeros where `status` is not ok."""

    start: int
    inputs: Tensor
    sha256: list[str]
    status: list[str]


class UnitExtractor:
    """Does units of one store with one encoder.

    Parameters
    ----------
    encoder
        Loaded.
    writer
        Attached to the store.
    images_root
        Folder of the tars.
    batch_size
        Images a forward pass.
    device
        Where the encoder runs.
    n_threads
        Threads that decode.
    """

    def __init__(
        self,
        encoder: Encoder,
        writer: StoreWriter,
        *,
        images_root: Path,
        batch_size: int,
        device: str = "cpu",
        n_threads: int = 1,
    ) -> None:
        self.encoder = encoder
        self.writer = writer
        self.images_root = images_root
        self.batch_size = batch_size
        self.device = device
        self.n_threads = n_threads

    def extract(self, unit: int, images: pa.Table, on_images: Callable[[int], None] = lambda n: None) -> spec.Receipt:
        """Encode a unit's images and commit it.

        Parameters
        ----------
        unit
            Which.
        images
            Its lines of `ExtractionPlan.images`.
        on_images
            Called with the number of images of each encoded batch.

        Returns
        -------
        Receipt
            That of the committed unit.
        """
        plan = self.writer.plan
        shape = (len(images), plan.layout.tokens_per_sample)
        arrays = {
            array.name: np.empty((*shape, array.width), dtype=array.dtype)
            for array in self.writer.arrays
            if array.layer is not None
        }
        layers = [layer.name for layer in plan.layers]
        digests: list[str] = []
        statuses: list[str] = []
        for batch in self._decoded(images):
            outputs = self.encoder.encode(batch.inputs.to(self.device), layers, plan.tokens.selection)
            stop = batch.start + len(batch.status)
            for layer in plan.layers:
                arrays[layer.name][batch.start : stop] = _stored(outputs[layer.name], layer.dtype)
            digests += batch.sha256
            statuses += batch.status
            on_images(len(batch.status))
        columns = {name: images[name] for name in ("key", "label", "tar", "offset", "size")}
        samples = pa.table({**columns, "sha256": digests, "status": statuses}, schema=SAMPLES_SCHEMA)
        return self.writer.commit(unit, arrays, samples)

    def _decoded(self, images: pa.Table) -> Iterator[_Batch]:
        """Yield batches in order, a few of them decoded ahead of the encoder."""
        with ThreadPoolExecutor(self.n_threads, thread_name_prefix="decode") as threads:
            waiting: deque[Future[_Batch]] = deque()
            for start in range(0, len(images), self.batch_size):
                waiting.append(threads.submit(self._decode, images.slice(start, self.batch_size), start))
                if len(waiting) > _BATCHES_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _decode(self, images: pa.Table, start: int) -> _Batch:
        inputs: list[Tensor | None] = []
        digests: list[str] = []
        statuses: list[str] = []
        for data in read_images(self.images_root, images):
            digests.append(hashlib.sha256(data).hexdigest())
            try:
                inputs.append(self.encoder.transform(decode(data)))
                statuses.append("ok")
            except DecodeError as error:
                inputs.append(None)
                statuses.append(f"failed: {error}")
        good = next((one for one in inputs if one is not None), None)
        if good is None:  # nothing to encode: any image gives the right shape
            good = self.encoder.transform(blank_image())
        stacked = torch.stack([torch.zeros_like(good) if one is None else one for one in inputs])
        return _Batch(start, stacked, digests, statuses)


def read_images(root: Path, images: pa.Table) -> Iterator[bytes]:
    """Yield the images' bytes, each by one read of its own range of a tar.

    Raises
    ------
    ShardError
        If a tar is missing or shorter than its index says.
    """
    descriptors: dict[str, int] = {}
    try:
        for tar, offset, size in zip(*(images[name].to_pylist() for name in ("tar", "offset", "size")), strict=True):
            if tar not in descriptors:
                try:
                    descriptors[tar] = os.open(root / tar, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise ShardError(
                        f"expected the tar shard '{root / tar}', found none ({error.strerror}): it was there when "
                        "the extraction was planned; put it back (with several machines: on all of them)"
                    ) from None
            data = os.pread(descriptors[tar], size, offset)
            if len(data) != size:
                raise ShardError(
                    f"expected {size} bytes at {offset} of '{root / tar}', found {len(data)}: the tar has changed "
                    "since it was indexed; copy it again and remove its .index.parquet"
                )
            yield data
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _stored(values: Tensor, dtype: spec.Dtype) -> np.ndarray:
    """Return activations in the form that a store keeps them; what float16 cannot hold becomes Inf, and is counted."""
    if dtype == "bfloat16":
        return values.to(torch.bfloat16).cpu().view(torch.uint16).numpy()
    return values.to(getattr(torch, dtype)).cpu().numpy()
