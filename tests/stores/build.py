"""Small stores for the tests, of any shape, with known activations."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from stores import spec
from stores.layout import Layout
from stores.objects import LocalObjects
from stores.reader import Store
from stores.writer import SAMPLES_SCHEMA, StoreWriter
from stores.zarr_arrays import arrays_of


def make_plan(
    *,
    n_samples: int = 37,
    n_tokens: int = 3,
    samples_per_unit: int = 8,
    rows_per_chunk: int = 6,
    layers: tuple[tuple[str, spec.Dtype, int], ...] = (("blocks.0", "float16", 5), ("blocks.1", "float32", 4)),
    seed: int = 0,
) -> spec.StorePlan:
    return spec.StorePlan(
        layers=tuple(spec.Layer(name=name, dtype=dtype, width=width) for name, dtype, width in layers),
        tokens=spec.Tokens(
            selection="all",
            positions=tuple(range(n_tokens)),
            ranges={"cls": (0, 1), "patch": (1, n_tokens)},
            grid=(1, n_tokens - 1),
        ),
        layout=Layout(
            n_samples=n_samples,
            tokens_per_sample=n_tokens,
            samples_per_unit=samples_per_unit,
            rows_per_chunk=rows_per_chunk,
        ),
        seed=seed,
        source={"classes": ["even", "odd"], "tars": [{"name": "a.tar", "index_sha256": "0" * 64}]},
        encoder={"model": "test", "library": "none", "weights": {"origin": "random", "sha256": "0" * 64}},
    )


def activations_of(plan: spec.StorePlan, unit: int) -> dict[str, np.ndarray]:
    """The same values for the same plan and unit, from a seeded generator."""
    n = len(plan.layout.unit_samples(unit))
    values: dict[str, np.ndarray] = {}
    for i, array in enumerate(array for array in arrays_of(plan) if array.layer is not None):
        rng = np.random.default_rng([unit, i])
        rows = rng.normal(3.0, 2.0, (n, plan.layout.tokens_per_sample, array.width)).astype(np.float32)
        if array.layer is not None and array.layer.dtype == "bfloat16":
            values[array.name] = (rows.view(np.uint32) >> 16).astype("<u2")
        else:
            values[array.name] = rows.astype(array.dtype)
    return values


def samples_of(plan: spec.StorePlan, unit: int, failed: tuple[int, ...] = ()) -> pa.Table:
    samples = plan.layout.unit_samples(unit)
    return pa.table(
        {
            "key": [f"image-{i:05d}" for i in samples],
            "label": [None if i % 7 == 6 else i % 2 for i in samples],
            "tar": ["a.tar"] * len(samples),
            "offset": [512 * i for i in samples],
            "size": [100] * len(samples),
            "sha256": [f"{i:064x}" for i in samples],
            "status": ["failed: truncated" if i in failed else "ok" for i in samples],
        },
        schema=SAMPLES_SCHEMA,
    )


def write_store(path: Path, plan: spec.StorePlan | None = None, *, failed: tuple[int, ...] = ()) -> Store:
    plan = plan or make_plan()
    writer = StoreWriter.begin(LocalObjects(path), plan, images_root="/images")
    for unit in range(plan.layout.n_units):
        writer.commit(unit, activations_of(plan, unit), samples_of(plan, unit, failed))
    writer.seal(versions={"softbudget": "test"})
    return Store.open(path)
