"""Small stores for the tests, of any shape, with known activations; and ways to damage and to forge them."""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import Phase, settings
from hypothesis import strategies as st

from stores import spec
from stores.errors import DamagedStoreError
from stores.layout import Layout
from stores.objects import LocalObjects, Objects, check_key
from stores.reader import Store
from stores.writer import SAMPLES_SCHEMA, StoreWriter
from stores.zarr_arrays import arrays_of

# Times depend on what else the machine does: no deadline on one example.
arithmetic = settings(deadline=None, max_examples=100)
"""For properties of numbers: instant."""
on_disk = settings(deadline=None, max_examples=12, phases=[Phase.explicit, Phase.reuse, Phase.generate])
"""For properties of whole stores: each example writes one, which makes shrinking take minutes."""

TWO_LAYERS: tuple[tuple[str, spec.Dtype, int], ...] = (("blocks.0", "float16", 5), ("blocks.1", "float32", 4))
THREE_DTYPES: tuple[tuple[str, spec.Dtype, int], ...] = (*TWO_LAYERS, ("blocks.2", "bfloat16", 3))


def make_plan(
    *,
    n_samples: int = 37,
    n_tokens: int = 3,
    samples_per_unit: int = 8,
    rows_per_chunk: int = 6,
    layers: tuple[tuple[str, spec.Dtype, int], ...] = TWO_LAYERS,
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


@st.composite
def plans(draw: st.DrawFn, *, max_samples: int = 24) -> spec.StorePlan:
    """Plans of every small shape: one row a chunk to one chunk a unit, full and cut-off last units and chunks."""
    n_tokens = draw(st.integers(1, 4))
    samples_per_unit = draw(st.integers(1, 9))
    rows = samples_per_unit * n_tokens
    dtypes = draw(st.lists(st.sampled_from(["float16", "float32", "bfloat16"]), min_size=1, max_size=2))
    return make_plan(
        n_samples=draw(st.integers(1, max_samples)),
        n_tokens=n_tokens,
        samples_per_unit=samples_per_unit,
        rows_per_chunk=draw(st.sampled_from([n for n in range(1, rows + 1) if rows % n == 0])),
        layers=tuple((f"blocks.{i}", dtype, draw(st.integers(1, 6))) for i, dtype in enumerate(dtypes)),
        seed=draw(st.integers(0, 2**32)),
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


def natural_order(plan: spec.StorePlan, layer: str) -> np.ndarray:
    """All activations of a layer, (n_samples, tokens, D), in the stored dtype."""
    return np.concatenate([activations_of(plan, unit)[layer] for unit in range(plan.layout.n_units)])


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


def commit_all(writer: StoreWriter, *, failed: tuple[int, ...] = ()) -> None:
    for unit in range(writer.plan.layout.n_units):
        writer.commit(unit, activations_of(writer.plan, unit), samples_of(writer.plan, unit, failed))


def write_into(objects: Objects, plan: spec.StorePlan | None = None, *, failed: tuple[int, ...] = ()) -> str:
    """Write a store to its seal; return its id."""
    writer = StoreWriter.begin(objects, plan or make_plan(), images_root="/images")
    commit_all(writer, failed=failed)
    return writer.seal(versions={"softbudget": "test"})


def write_store(path: Path, plan: spec.StorePlan | None = None, *, failed: tuple[int, ...] = ()) -> Store:
    write_into(LocalObjects(path), plan, failed=failed)
    return Store.open(path)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for one hypothesis example; in memory where there is such a place, since every object is synced."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


class MemoryObjects:
    """Objects in a dictionary: the protocol's plainest implementation."""

    uri = "memory"

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}

    def size(self, key: str) -> int | None:
        data = self.data.get(check_key(key))
        return None if data is None else len(data)

    def read(self, key: str) -> bytes:
        if check_key(key) not in self.data:
            raise DamagedStoreError(f"'{key}' is missing from {self.uri}")
        return self.data[key]

    def read_into(self, key: str, offset: int, out: memoryview) -> None:
        out[:] = self.read(key)[offset : offset + len(out)]

    def create(self, key: str, data: bytes | bytearray | memoryview) -> bool:
        if check_key(key) in self.data:
            return False
        self.data[key] = bytes(data)
        return True

    def replace(self, key: str, data: bytes) -> None:
        self.data[check_key(key)] = data

    def keys(self, prefix: str) -> Iterator[str]:
        return iter(sorted(key for key in self.data if key.startswith(f"{prefix}/")))


def all_keys(plan: spec.StorePlan) -> list[str]:
    """Every object of a sealed store, the root and the manifest included."""
    layout = plan.layout
    return sorted(
        [
            *(spec.ROOT_KEY, spec.PLAN_KEY, spec.MANIFEST_KEY, spec.STATISTICS_KEY, spec.SAMPLES_KEY),
            *(spec.array_key(array.name) for array in arrays_of(plan)),
            *(array.shard_key(unit) for array in arrays_of(plan) for unit in range(layout.n_units)),
            *(spec.receipt_key(unit) for unit in range(layout.n_units)),
            *(spec.unit_samples_key(unit) for unit in range(layout.n_units)),
        ]
    )


def files_in(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip_byte(file: Path, position: int, mask: int = 0xFF) -> None:
    """Change one byte of a file, whose size stays."""
    data = bytearray(file.read_bytes())
    data[position] ^= mask
    file.write_bytes(data)


def forge(folder: Path, change_manifest: Callable[[dict[str, Any]], None] = lambda manifest: None) -> None:
    """Seal a store anew after its files were changed, as one who means harm could.

    Sizes and sha256 of what is there are taken into the manifest, `change_manifest` edits it, and the digests that
    depend on it are made to fit: what a reader then still refuses, it refuses for what it says.
    """
    manifest = json.loads((folder / spec.MANIFEST_KEY).read_bytes())
    for record in manifest["objects"]:
        data = (folder / record["key"]).read_bytes()
        record.update(n_bytes=len(data), sha256=spec.sha256(data))
    change_manifest(manifest)
    manifest["plan_sha256"] = spec.sha256(spec.canonical_json(manifest["plan"]))
    sealed = spec.canonical_json(manifest)
    (folder / spec.MANIFEST_KEY).write_bytes(sealed)
    root = json.loads((folder / spec.ROOT_KEY).read_bytes())
    root["attributes"]["softbudget"].update(id=spec.sha256(sealed), plan=manifest["plan_sha256"])
    (folder / spec.ROOT_KEY).write_bytes(spec.canonical_json(root))


def edit_json(file: Path, change: Callable[[Any], None]) -> None:
    """Change a JSON file in place."""
    value = json.loads(file.read_bytes())
    change(value)
    file.write_bytes(spec.canonical_json(value))
