"""The store's own metadata: format version, plan, receipts and manifest, their JSON and their digests.

    plan.json             what will be in the store: written first, fixes every address
    commits/<unit>.json   receipt: this unit is whole, and these are its objects
    manifest.json         every object with its size and sha256: written last, seals the store, *is* its identity

docs/format.md is the text of this module for readers in other languages.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from stores.errors import FormatError
from stores.layout import Layout
from stores.objects import check_key

FORMAT = "softbudget-activations"
FORMAT_VERSION = 1

Dtype = Literal["float16", "float32", "bfloat16"]
ITEM_BYTES: dict[str, int] = {"float16": 2, "float32": 4, "bfloat16": 2}

ROOT_KEY = "zarr.json"
PLAN_KEY = "plan.json"
MANIFEST_KEY = "manifest.json"
STATISTICS_KEY = "statistics.json"
SAMPLES_KEY = "samples.parquet"
SAMPLE_ARRAY = "sample"
TOKEN_ARRAY = "token"
RESERVED_NAMES = frozenset(
    {SAMPLE_ARRAY, TOKEN_ARRAY, "commits", "c", ROOT_KEY, PLAN_KEY, MANIFEST_KEY, STATISTICS_KEY, SAMPLES_KEY}
)


def canonical_json(value: Any) -> bytes:
    """Return the one JSON text of a value: sorted keys, no NaN, UTF-8, a newline at its end."""
    return (json.dumps(value, sort_keys=True, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()


def sha256(data: bytes | bytearray | memoryview) -> str:
    """Return a digest in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def receipt_key(unit: int) -> str:
    """Return the name of a unit's receipt."""
    return f"commits/{unit:06d}.json"


def unit_samples_key(unit: int) -> str:
    """Return the name of a unit's part of the samples table."""
    return f"commits/{unit:06d}.parquet"


def array_key(array: str) -> str:
    """Return the name of an array's Zarr metadata."""
    return f"{array}/zarr.json"


def shard_key(array: str, unit: int, *, n_dimensions: int) -> str:
    """Return the name of a unit's Zarr shard of an array (arrays are chunked on rows alone)."""
    return f"{array}/c/{unit}" + "/0" * (n_dimensions - 1)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One array of activations.

    Parameters
    ----------
    name
        The hook point, e.g. `blocks.11`; also the array's path in the store.
    dtype
        `float16`, `float32`, or `bfloat16` (kept as uint16: Zarr readers do not share a bfloat16).
    width
        Features, D.
    """

    name: str
    dtype: Dtype
    width: int

    def __post_init__(self) -> None:
        check_key(self.name)
        if "/" in self.name or self.name in RESERVED_NAMES:
            raise FormatError(f"expected a layer name other than {sorted(RESERVED_NAMES)}, found {self.name!r}")
        if self.dtype not in get_args(Dtype):
            raise FormatError(f"layer {self.name}: expected dtype {' or '.join(get_args(Dtype))}, found {self.dtype!r}")
        if type(self.width) is not int or not 1 <= self.width <= 1 << 20:
            raise FormatError(f"layer {self.name}: expected a width from 1 to 2^20, found {self.width!r}")


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Which tokens of the encoder's sequence are stored, and what they are.

    Parameters
    ----------
    selection
        What was asked for: `cls`, `patch`, `all` or `mean`.
    positions
        The stored positions in the encoder's own sequence, in order; (-1,) for a mean over the patches.
    ranges
        Kind (`cls`, `register`, `patch`) to [start, stop) in the encoder's sequence.
    grid
        Height and width of the patch grid, in patches.
    """

    selection: str
    positions: tuple[int, ...]
    ranges: dict[str, tuple[int, int]]
    grid: tuple[int, int]

    def __post_init__(self) -> None:
        for position in self.positions:
            self.kind(position)
            if position > 32_767:
                raise FormatError(f"expected token positions that fit into int16, found {position}")

    def kind(self, position: int) -> str:
        """Return what a stored position is: `cls`, `register`, `patch`, or `mean`."""
        if position == -1:
            return "mean"
        for kind, (start, stop) in self.ranges.items():
            if start <= position < stop:
                return kind
        raise FormatError(f"expected a token position in {self.ranges}, found {position}")


@dataclass(frozen=True, kw_only=True)
class StorePlan:
    """Everything that decides a store's content, known before anything runs.

    Parameters
    ----------
    layers
        The arrays.
    tokens
        The stored tokens.
    layout
        Sizes of units and chunks.
    seed
        Of the rows' order within Zarr shards.
    source
        What the images are: names, sizes and digest of the tar shards' index, and the classes' names.
    encoder
        The model: name, library, weights with their sha256, preprocessing.
    """

    layers: tuple[Layer, ...]
    tokens: Tokens
    layout: Layout
    seed: int
    source: dict[str, Any]
    encoder: dict[str, Any]

    def __post_init__(self) -> None:
        names = [layer.name for layer in self.layers]
        if not names or len(set(names)) != len(names):
            raise FormatError(f"expected at least one layer, each once, found {names}")
        if len(self.tokens.positions) != self.layout.tokens_per_sample:
            raise FormatError(
                f"expected {self.layout.tokens_per_sample} token positions, found {len(self.tokens.positions)}"
            )

    def layer(self, name: str) -> Layer:
        """Return a layer by its name; `FormatError` names those that there are."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise FormatError(f"expected one of the layers {[layer.name for layer in self.layers]}, found {name!r}")

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}

    @property
    def digest(self) -> str:
        """The sha256 of plan.json."""
        return sha256(canonical_json(self.to_json()))

    @classmethod
    def from_json(cls, value: Any) -> "StorePlan":
        """Read `to_json`'s form; `FormatError` for anything else."""
        try:
            check_version(value)
            tokens = value["tokens"]
            return cls(
                layers=tuple(Layer(**layer) for layer in value["layers"]),
                tokens=Tokens(
                    selection=tokens["selection"],
                    positions=tuple(int(position) for position in tokens["positions"]),
                    ranges={kind: (int(a), int(b)) for kind, (a, b) in tokens["ranges"].items()},
                    grid=(int(tokens["grid"][0]), int(tokens["grid"][1])),
                ),
                layout=Layout(**value["layout"]),
                seed=int(value["seed"]),
                source=dict(value["source"]),
                encoder=dict(value["encoder"]),
            )
        except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError) as error:
            raise _not_this("plan", error) from None


@dataclass(frozen=True, kw_only=True)
class ObjectRecord:
    """An object's name, size and sha256."""

    key: str
    n_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        check_key(self.key)


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """A unit's: it is whole.

    Parameters
    ----------
    unit
        Which.
    samples, rows
        [start, stop) of its images and rows.
    n_failed
        Images that could not be read; their rows are NaN.
    objects
        Its Zarr shards and its part of the samples table.
    statistics
        Layer name to `stores.statistics.Statistics.to_json`.
    """

    unit: int
    samples: tuple[int, int]
    rows: tuple[int, int]
    n_failed: int
    objects: tuple[ObjectRecord, ...]
    statistics: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> "Receipt":
        """Read `to_json`'s form; `FormatError` for anything else."""
        try:
            return cls(
                unit=int(value["unit"]),
                samples=(int(value["samples"][0]), int(value["samples"][1])),
                rows=(int(value["rows"][0]), int(value["rows"][1])),
                n_failed=int(value["n_failed"]),
                objects=_read_objects(value["objects"]),
                statistics=dict(value["statistics"]),
            )
        except (KeyError, TypeError, IndexError, ValueError, OverflowError) as error:
            raise _not_this("receipt", error) from None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a sealed store is: its sha256 is the store's id.

    Parameters
    ----------
    plan
        As in plan.json.
    n_failed
        Images that could not be read.
    objects
        Every object but the manifest itself and the root `zarr.json`.
    versions
        Of the libraries that the store was made with.
    """

    plan: StorePlan
    n_failed: int
    objects: tuple[ObjectRecord, ...]
    versions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "plan": self.plan.to_json(),
            "plan_sha256": self.plan.digest,
            "n_failed": self.n_failed,
            "objects": [asdict(record) for record in self.objects],
            "versions": self.versions,
        }

    @classmethod
    def from_json(cls, value: Any) -> "Manifest":
        """Read `to_json`'s form; `FormatError` for anything else."""
        try:
            check_version(value)
            manifest = cls(
                plan=StorePlan.from_json(value["plan"]),
                n_failed=int(value["n_failed"]),
                objects=_read_objects(value["objects"]),
                versions=dict(value["versions"]),
            )
            expected, found = str(value["plan_sha256"]), manifest.plan.digest
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise _not_this("manifest", error) from None
        if found != expected:
            raise FormatError(
                f"manifest: expected a plan of sha256 {expected}, found {found}: it was edited. Copy the store again"
            )
        return manifest


def check_version(value: Any) -> None:
    """Raise `FormatError` unless `value` is metadata of this format and version."""
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise FormatError(f"expected metadata of format {FORMAT!r}, found something else: not an activation store")
    if value.get("format_version") != FORMAT_VERSION:
        raise FormatError(
            f"expected store format version {FORMAT_VERSION}, found {value.get('format_version')!r}: "
            "read it with the version of softbudget that wrote it, or a newer one"
        )


def parse_json(data: bytes, what: str) -> Any:
    """Return the value of a JSON text; `FormatError` naming `what` if it is none."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what}: expected JSON, found something else ({error})") from None


def _read_objects(value: Any) -> tuple[ObjectRecord, ...]:
    return tuple(
        ObjectRecord(key=str(one["key"]), n_bytes=int(one["n_bytes"]), sha256=str(one["sha256"])) for one in value
    )


def _not_this(what: str, error: Exception) -> FormatError:
    if isinstance(error, FormatError):
        return error
    return FormatError(f"{what}: expected the fields of docs/format.md, found otherwise ({error!r})")
