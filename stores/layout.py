"""Where each row is: the arithmetic of samples, units, Zarr shards and chunks. Pure.

    sample  0   1   2   3 | 4   5   6   7 | 8   9            (an image)
    unit    ------0------ | ------1------ | --2--            one worker's work, one Zarr shard of every array
    rows    0 .......  4T | 4T ....... 8T | 8T .. 10T        T stored tokens a sample
    chunk   [0][1][2][3]    [4][5][6][7]    [8][9]           what one read fetches; has its own crc32c

Row `r` is in chunk `r // rows_per_chunk` and in unit `r // rows_per_shard`: chunks never straddle a unit.
Within a unit the rows are permuted (`row_order`), so that a chunk already holds tokens of many images.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from stores.errors import FormatError

MAX_ROWS_PER_UNIT = 131_072
MAX_SAMPLES_PER_UNIT = 16_384
MAX_CHUNK_BYTES = 4 << 20
MIN_CHUNKS = 16
MIN_UNITS = 4


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The shape of a store.

    Parameters
    ----------
    n_samples
        Images in the plan, failed ones included: addresses never shift.
    tokens_per_sample
        Rows that each image has in every layer.
    samples_per_unit
        Images in a unit of work; the last unit may hold fewer.
    rows_per_chunk
        Rows of an inner chunk; divides the rows of a full unit.
    """

    n_samples: int
    tokens_per_sample: int
    samples_per_unit: int
    rows_per_chunk: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise FormatError(f"layout: expected {name} to be a positive integer, found {value!r}")
        if self.rows_per_shard % self.rows_per_chunk:
            raise FormatError(
                f"layout: expected rows_per_chunk to divide the {self.rows_per_shard} rows of a unit, "
                f"found {self.rows_per_chunk}"
            )

    @property
    def n_rows(self) -> int:
        """Rows of every array."""
        return self.n_samples * self.tokens_per_sample

    @property
    def rows_per_shard(self) -> int:
        """Rows of a full unit, which are those of a Zarr shard."""
        return self.samples_per_unit * self.tokens_per_sample

    @property
    def chunks_per_shard(self) -> int:
        """Inner chunks of a Zarr shard."""
        return self.rows_per_shard // self.rows_per_chunk

    @property
    def n_units(self) -> int:
        """Units of work."""
        return -(-self.n_samples // self.samples_per_unit)

    @property
    def n_chunks(self) -> int:
        """Inner chunks that hold rows, in one array."""
        return -(-self.n_rows // self.rows_per_chunk)

    def unit_samples(self, unit: int) -> range:
        """The images of a unit."""
        start = unit * self.samples_per_unit
        return range(start, min(start + self.samples_per_unit, self.n_samples))

    def unit_rows(self, unit: int) -> range:
        """The rows of a unit."""
        samples = self.unit_samples(unit)
        return range(samples.start * self.tokens_per_sample, samples.stop * self.tokens_per_sample)

    def chunk_rows(self, chunk: int) -> range:
        """The rows of a chunk; the last chunk may hold fewer."""
        start = chunk * self.rows_per_chunk
        return range(start, min(start + self.rows_per_chunk, self.n_rows))

    def chunk_address(self, chunk: int) -> tuple[int, int]:
        """The unit (Zarr shard) that holds a chunk, and the chunk's place in it."""
        return divmod(chunk, self.chunks_per_shard)


def choose_layout(*, n_samples: int, tokens_per_sample: int, max_row_bytes: int) -> Layout:
    """Choose unit and chunk sizes for a store.

    A unit is at most 131,072 rows and 16,384 images; a chunk is at most 4 MiB in the widest layer. Small stores
    shrink both, so that there are at least 4 units to share out and 16 chunks to mix, where there are images
    enough.

    Parameters
    ----------
    n_samples, tokens_per_sample
        Images, and rows for each of them.
    max_row_bytes
        Bytes of a row of the widest layer.
    """
    samples_per_unit = max(1, min(MAX_ROWS_PER_UNIT // tokens_per_sample, MAX_SAMPLES_PER_UNIT, n_samples // MIN_UNITS))
    # A unit of 64 × m images has divisors near any chunk size that one may want.
    if samples_per_unit >= 64:
        samples_per_unit -= samples_per_unit % 64
    rows_per_shard = samples_per_unit * tokens_per_sample
    n_rows = n_samples * tokens_per_sample
    most = max(1, min(MAX_CHUNK_BYTES // max_row_bytes, n_rows // MIN_CHUNKS))
    return Layout(
        n_samples=n_samples,
        tokens_per_sample=tokens_per_sample,
        samples_per_unit=samples_per_unit,
        rows_per_chunk=_largest_divisor(rows_per_shard, most),
    )


def _largest_divisor(n: int, most: int) -> int:
    """Return the largest divisor of `n` that is at most `most`."""
    best = 1
    for small in range(1, int(n**0.5) + 1):
        if n % small == 0:
            for divisor in (small, n // small):
                if best < divisor <= most:
                    best = divisor
    return best


def hashed_order(n: int, *key: int) -> np.ndarray:
    """Return a permutation of `range(n)` that depends on `n` and `key` alone.

    The sort of a 64-bit mix (splitmix64) of key and position: unlike a library's shuffle it gives the same order in
    every version of every library, which the identity of stores and the reproducibility of streams rest on.

    Parameters
    ----------
    n
        Length.
    *key
        Integers that select the permutation.

    Returns
    -------
    numpy.ndarray
        int64 (n,).
    """
    state = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        for part in key:
            state = _splitmix64(state ^ np.uint64(part & 0xFFFF_FFFF_FFFF_FFFF))
        mixed = _splitmix64(np.arange(n, dtype=np.uint64) ^ state)
    return np.argsort(mixed, kind="stable")


def _splitmix64(x: Any) -> Any:
    # uint64 in, the same out: a numpy scalar or an array.
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def row_order(layout: Layout, unit: int, seed: int) -> np.ndarray:
    """Return the order in which a unit's rows are stored.

    Row `i` of the Zarr shard holds row `order[i]` of the unit in its natural order (sample by sample, tokens in
    sequence order).
    """
    return hashed_order(len(layout.unit_rows(unit)), seed, unit)
