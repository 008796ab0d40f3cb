"""Which image goes where, before anything runs. Pure: indexes and an encoder's description in, a plan out."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from pipeline.encoders.base import Encoder, stored_positions
from pipeline.errors import PipelineError, PlanError
from pipeline.shards import TarIndex, merged_classes
from stores import spec
from stores.layout import choose_layout


@dataclass(frozen=True)
class ExtractionPlan:
    """A store's plan, and where its images are.

    Parameters
    ----------
    store
        What will be written.
    images
        `INDEX_SCHEMA` and `tar`, a line an image, in the store's order: tars by name, each in its own order.
    images_root
        The folder that `tar` is relative to.
    """

    store: spec.StorePlan
    images: pa.Table
    images_root: Path

    def unit_images(self, unit: int) -> pa.Table:
        """Return the lines of a unit's images."""
        samples = self.store.layout.unit_samples(unit)
        return self.images.slice(samples.start, len(samples))


def make_plan(
    indexes: Sequence[TarIndex],
    encoder: Encoder,
    *,
    layers: Sequence[str],
    tokens: str,
    dtype: spec.Dtype,
    seed: int,
    limit: int | None = None,
) -> ExtractionPlan:
    """Lay the images of some tars out over a store.

    Parameters
    ----------
    indexes
        Of the tars.
    encoder
        Only described here, never run.
    layers
        Hook points; each becomes an array.
    tokens
        `cls`, `patch`, `all` or `mean`.
    dtype
        Of the arrays.
    seed
        Of the rows' order within Zarr shards.
    limit
        Take only the first so many images.

    Raises
    ------
    PipelineError
        If a layer or the tokens are not the encoder's.
    PlanError
        If two images share a key.
    """
    for layer in layers:
        if layer not in encoder.layers:
            raise PipelineError(
                f"expected layers of {encoder.description['model']} ({encoder.layers[0]} … {encoder.layers[-1]}), "
                f"found {layer!r}"
            )
    root = Path(os.path.commonpath([index.path.resolve().parent for index in indexes]))
    names = [index.path.resolve().relative_to(root).as_posix() for index in indexes]
    images = _images(indexes, names)
    if limit is not None:
        images = images.slice(0, limit)
    positions = stored_positions(encoder, tokens)
    store = spec.StorePlan(
        layers=tuple(spec.Layer(name=name, dtype=dtype, width=encoder.width) for name in layers),
        tokens=spec.Tokens(selection=tokens, positions=positions, ranges=dict(encoder.token_ranges), grid=encoder.grid),
        layout=choose_layout(
            n_samples=len(images),
            tokens_per_sample=len(positions),
            max_row_bytes=encoder.width * spec.ITEM_BYTES[dtype],
        ),
        seed=seed,
        source={
            "classes": list(merged_classes(indexes)),
            "tars": [
                {"name": name, "n_bytes": index.n_bytes, "index_sha256": index.sha256}
                for name, index in zip(names, indexes, strict=True)
            ],
        },
        encoder=encoder.description,
    )
    return ExtractionPlan(store, images, root)


def _images(indexes: Sequence[TarIndex], names: Sequence[str]) -> pa.Table:
    tables = [
        index.table.append_column(pa.field("tar", pa.string()), pa.array([name] * len(index.table), pa.string()))
        for name, index in zip(names, indexes, strict=True)
    ]
    images = pa.concat_tables(tables)
    keys = images["key"].to_pylist()
    if len(set(keys)) != len(keys):
        seen: set[str] = set()
        twice = next(key for key in keys if key in seen or seen.add(key))
        raise PlanError(
            f"expected each image's key once, found '{twice}' again: are some of the tars copies of others?"
        )
    return images
