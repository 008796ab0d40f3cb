"""Per-feature statistics of activations that merge exactly: those of a store are the sum of its units'.

Means and squared deviations merge by Chan, Golub and LeVeque (1983), "Algorithms for computing the sample variance";
sums of squares would cancel for features whose mean is far from zero, as ViTs have them.
"""

import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from stores import spec
from stores.errors import FormatError

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Statistics of the rows of one layer; failed images' rows are not among them.

    Parameters
    ----------
    count
        Rows.
    n_nonfinite
        Entries that are NaN or infinite. They make the figures below NaN, and a reader refuses them.
    mean, m2
        float64 (D,): mean, and sum of squared deviations from it, of each feature.
    min, max
        float64 (D,): smallest and largest value of each feature.
    norm
        Mean Euclidean norm of a row.
    """

    count: int
    n_nonfinite: int
    mean: np.ndarray
    m2: np.ndarray
    min: np.ndarray
    max: np.ndarray
    norm: float

    @classmethod
    def empty(cls, width: int) -> Self:
        """Return the statistics of no rows."""
        return cls(
            count=0,
            n_nonfinite=0,
            mean=np.zeros(width),
            m2=np.zeros(width),
            min=np.full(width, np.inf),
            max=np.full(width, -np.inf),
            norm=0.0,
        )

    @classmethod
    def of(cls, rows: np.ndarray, *, kept: np.ndarray | None = None) -> Self:
        """Return the statistics of rows.

        Parameters
        ----------
        rows
            Any float dtype, (n, D).
        kept
            bool (n,): rows to take; None takes all.
        """
        total = cls.empty(rows.shape[1])
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            block = rows[start : start + _ROWS_AT_ONCE].astype(np.float64)
            if kept is not None:
                block = block[kept[start : start + _ROWS_AT_ONCE]]
            if not len(block):
                continue
            with np.errstate(invalid="ignore", over="ignore"):  # NaN and Inf are counted, not warned about
                mean = block.mean(axis=0)
                part = cls(
                    count=len(block),
                    n_nonfinite=int(block.size - np.isfinite(block).sum()),
                    mean=mean,
                    m2=((block - mean) ** 2).sum(axis=0),
                    min=block.min(axis=0),
                    max=block.max(axis=0),
                    norm=float(np.sqrt((block**2).sum(axis=1)).mean()),
                )
                total = total.merged(part)
        return total

    @property
    def variance(self) -> np.ndarray:
        """Population variance of each feature, float64 (D,)."""
        return self.m2 / max(self.count, 1)

    def merged(self, other: Self) -> Self:
        """Return the statistics of both sets of rows together."""
        if other.count == 0:
            return self
        if self.count == 0:
            return other
        count = self.count + other.count
        share = other.count / count
        with np.errstate(invalid="ignore", over="ignore"):  # NaN and Inf are counted, not warned about
            delta = other.mean - self.mean
            return type(self)(
                count=count,
                n_nonfinite=self.n_nonfinite + other.n_nonfinite,
                mean=self.mean + delta * share,
                m2=self.m2 + other.m2 + delta**2 * (self.count * share),
                min=np.minimum(self.min, other.min),
                max=np.maximum(self.max, other.max),
                norm=self.norm + (other.norm - self.norm) * share,
            )

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads; finite floats keep every bit, others become null (JSON has no NaN)."""

        def plain(values: np.ndarray) -> list[float | None]:
            return [value if math.isfinite(value) else None for value in values.tolist()]

        return {
            "count": self.count,
            "n_nonfinite": self.n_nonfinite,
            **{name: plain(getattr(self, name)) for name in ("mean", "m2", "min", "max")},
            "norm": self.norm if math.isfinite(self.norm) else None,
        }

    @classmethod
    def of_layer(cls, value: Any, layer: spec.Layer, what: str) -> Self:
        """Read a layer's from a JSON object of all layers'; `FormatError` names `what` if it is not there."""
        if not isinstance(value, dict) or layer.name not in value:
            raise FormatError(f"'{what}': expected statistics of layer '{layer.name}', found none")
        try:
            return cls.from_json(value[layer.name], layer.width)
        except FormatError as error:
            raise FormatError(f"'{what}', layer '{layer.name}': {error}") from None

    @classmethod
    def from_json(cls, value: Any, width: int) -> Self:
        """Read `to_json`'s form.

        Raises
        ------
        FormatError
            If a field is missing or a vector is not `width` numbers.
        """
        names = ("mean", "m2", "min", "max")
        try:
            vectors = {name: np.asarray(value[name], dtype=np.float64) for name in names}
            count, n_nonfinite = int(value["count"]), int(value["n_nonfinite"])
            norm = math.nan if value["norm"] is None else float(value["norm"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise FormatError(f"statistics: expected count, n_nonfinite, {', '.join(names)}, norm: {error}") from None
        for name, vector in vectors.items():
            if vector.shape != (width,):
                raise FormatError(f"statistics: expected {width} values in {name}, found shape {vector.shape}")
        return cls(
            count=count,
            n_nonfinite=n_nonfinite,
            mean=vectors["mean"],
            m2=vectors["m2"],
            min=vectors["min"],
            max=vectors["max"],
            norm=norm,
        )
