"""Which rows, in which order: plans a shuffled stream of batches. Pure arithmetic, no I/O.

    epoch    all chunks in a keyed pseudo-random order
    pool     the next `chunks_per_pool` of them; their rows together in a keyed pseudo-random order
    batch    the next `batch_size` rows; what a pool leaves over begins the next pool's first batch

Rows are permuted within Zarr shards when they are written, so a pool of random chunks mixes nearly as well as random
rows (docs/format.md). The stream is a function of the store and of this plan alone: no thread, worker or clock
has a part in it. `ALGORITHM` names it in checkpoints; it changes when the stream does.
"""

from dataclasses import dataclass

import numpy as np

from stores.errors import StoreError
from stores.layout import hashed_order

ALGORITHM = "chunk-pools-1"

_CHUNKS, _ROWS = 1, 2  # keep the two uses of one (seed, epoch) apart


@dataclass(frozen=True, kw_only=True)
class StreamPlan:
    """A shuffled stream over the chunks of a store.

    Parameters
    ----------
    n_chunks
        Chunks of an array of the store.
    batch_size
        Rows a batch.
    seed
        Of the order.
    chunks_per_pool
        Chunks mixed at a time. More mix better and take more memory; part of what defines the stream.
    """

    n_chunks: int
    batch_size: int
    seed: int
    chunks_per_pool: int = 128

    def __post_init__(self) -> None:
        for name in ("n_chunks", "batch_size", "chunks_per_pool"):
            if getattr(self, name) < 1:
                raise StoreError(f"expected {name} of at least 1, found {getattr(self, name)}")
        if self.seed < 0:
            raise StoreError(f"expected a seed of at least 0, found {self.seed}")

    @property
    def n_pools(self) -> int:
        """Pools an epoch."""
        return -(-self.n_chunks // self.chunks_per_pool)

    def chunk_order(self, epoch: int) -> np.ndarray:
        """Return the chunks of an epoch in the order of reading, int64 (n_chunks,)."""
        return hashed_order(self.n_chunks, self.seed, epoch, _CHUNKS)

    def pool_chunks(self, epoch: int, pool: int) -> np.ndarray:
        """Return the chunks of a pool."""
        return self.chunk_order(epoch)[pool * self.chunks_per_pool : (pool + 1) * self.chunks_per_pool]

    def row_order(self, epoch: int, pool: int, n_rows: int) -> np.ndarray:
        """Return the order of a pool's rows (of its chunks in their order), int64 (n_rows,)."""
        return hashed_order(n_rows, self.seed, epoch, _ROWS, pool)
