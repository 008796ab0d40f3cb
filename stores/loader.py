"""Shuffled batches of a store: carries a `StreamPlan` out.

    chunks --threads: read, crc32c, filter--> pool n+1          (while)
                                              pool n --gather--> batches

The next pool is read while the current one is consumed. Memory is two pools and one batch.
"""

import contextlib
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from stores import spec
from stores.errors import DamagedStoreError, StoreError
from stores.reader import Store
from stores.sampling import StreamPlan
from stores.zarr_arrays import StoredArray


@dataclass(frozen=True)
class Batch:
    """Rows of a store.

    Parameters
    ----------
    x
        float32 (N, D): activations as the encoder gave them.
    samples
        int64 (N,): each row's image, a line of `Store.samples`.
    tokens
        int16 (N,): each row's position in the encoder's sequence.
    """

    x: torch.Tensor
    samples: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True)
class _Pool:
    rows: np.ndarray
    samples: np.ndarray
    tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.samples)

    def take(self, index: np.ndarray | slice) -> "_Pool":
        return _Pool(self.rows[index], self.samples[index], self.tokens[index])

    def followed_by(self, other: "_Pool") -> "_Pool":
        pairs = zip((self.rows, self.samples, self.tokens), (other.rows, other.samples, other.tokens), strict=True)
        return _Pool(*(np.concatenate(pair) for pair in pairs))


class Loader:
    """Batches of one layer of a store, shuffled or in order.

    Parameters
    ----------
    store
        An opened store.
    layer
        Its name; None takes the only one, or the last.
    batch_size
        Rows a batch.
    seed
        Of the order.
    token_kinds
        Keep only rows of these kinds (`cls`, `register`, `patch`, `mean`); None keeps all.
    chunks_per_pool
        Chunks mixed at a time (see `StreamPlan`).
    n_threads
        Chunks read at once. Has no part in what is yielded.

    Raises
    ------
    StoreError
        If the layer or the tokens are not in the store, or no row is left.
    """

    def __init__(
        self,
        store: Store,
        *,
        layer: str | None = None,
        batch_size: int,
        seed: int = 0,
        token_kinds: tuple[str, ...] | None = None,
        chunks_per_pool: int = 128,
        n_threads: int = 2,
    ) -> None:
        self.store = store
        self.layer = store.layer(layer)
        self.plan = StreamPlan(
            n_chunks=store.layout.n_chunks, batch_size=batch_size, seed=seed, chunks_per_pool=chunks_per_pool
        )
        if n_threads < 1:
            raise StoreError(f"expected n_threads of at least 1, found {n_threads}")
        self.n_threads = n_threads
        positions = [p for p in store.plan.tokens.positions if self._wanted(p, token_kinds)]
        if not positions:
            kinds = sorted({store.plan.tokens.kind(p) for p in store.plan.tokens.positions})
            raise StoreError(f"{store.objects.uri} holds tokens of the kinds {kinds}, found none of {token_kinds}")
        self.positions = np.asarray(positions)
        """Of the tokens that are kept, in the encoder's sequence."""
        self.n_rows = int(store.ok_samples.sum()) * len(positions)
        """Rows an epoch: those of images that could be read, of the kinds asked for."""
        if self.n_rows == 0:
            raise StoreError(f"{store.objects.uri} has no image that could be read: there is nothing to load")
        self._data = store.chunks(self.layer.name)
        self._samples = store.chunks(spec.SAMPLE_ARRAY)
        self._tokens = store.chunks(spec.TOKEN_ARRAY)

    def _wanted(self, position: int, kinds: tuple[str, ...] | None) -> bool:
        return kinds is None or self.store.plan.tokens.kind(position) in kinds

    @property
    def n_batches(self) -> int:
        """Batches an epoch: whole ones; a store smaller than a batch gives one of all its rows."""
        return max(1, self.n_rows // self.plan.batch_size)

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[Batch]:
        """Yield the shuffled batches of an epoch.

        Rows that do not fill a last batch are left out of the epoch (others in each: the order differs).

        Parameters
        ----------
        epoch
            Its number; each has its own order.
        start
            Batches to skip: the rest is what an uninterrupted epoch would have yielded.
        """
        if not 0 <= start <= self.n_batches:
            raise StoreError(f"expected a start from 0 to the epoch's {self.n_batches} batches, found {start}")
        size = min(self.plan.batch_size, self.n_rows)
        with self._threads() as threads:
            pool, skip = self._first_pool(epoch, start * size)
            upcoming = self._submit(threads, epoch, pool)
            rest: _Pool | None = None
            for _ in range(start, self.n_batches):
                while rest is None or len(rest) < size:
                    current = self._assemble(upcoming)
                    upcoming = self._submit(threads, epoch, pool + 1)
                    mixed = current.take(self.plan.row_order(epoch, pool, len(current))[skip:])
                    rest = mixed if rest is None or not len(rest) else rest.followed_by(mixed)
                    pool, skip = pool + 1, 0
                yield self._batch(rest.take(slice(0, size)))
                rest = rest.take(slice(size, None))

    def in_order(self) -> Iterator[Batch]:
        """Yield every row once, in the order of storage; the last batch may be smaller."""
        with self._threads() as threads:
            for chunk in self._ahead(threads):
                for start in range(0, len(chunk), self.plan.batch_size):
                    yield self._batch(chunk.take(slice(start, start + self.plan.batch_size)))

    @contextlib.contextmanager
    def _threads(self) -> Generator[ThreadPoolExecutor]:
        threads = ThreadPoolExecutor(self.n_threads, thread_name_prefix="loader")
        try:
            yield threads
        finally:  # a consumer that stops early waits for the reads that have begun, no longer
            threads.shutdown(cancel_futures=True)

    def _ahead(self, threads: ThreadPoolExecutor) -> Iterator[_Pool]:
        """Yield the chunks in order, a few of them read ahead."""
        waiting: list[Future[_Pool]] = []
        for chunk in range(self.plan.n_chunks):
            waiting.append(threads.submit(self._read, chunk))
            if len(waiting) > 2 * self.n_threads:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()

    def _first_pool(self, epoch: int, n_rows: int) -> tuple[int, int]:
        """Return the pool in which row `n_rows` of an epoch's stream is, and its place in it."""
        pool = 0
        while n_rows > 0:
            here = sum(int(self._kept(int(chunk))[0].sum()) for chunk in self.plan.pool_chunks(epoch, pool))
            if n_rows < here:
                break
            n_rows -= here
            pool += 1
        return pool, n_rows

    def _submit(self, threads: ThreadPoolExecutor, epoch: int, pool: int) -> list[Future[_Pool]]:
        return [threads.submit(self._read, int(chunk)) for chunk in self.plan.pool_chunks(epoch, pool)]

    def _assemble(self, reads: list[Future[_Pool]]) -> _Pool:
        parts = [read.result() for read in reads]
        columns = zip(*((part.rows, part.samples, part.tokens) for part in parts), strict=True)
        return _Pool(*(np.concatenate(column) for column in columns))

    def _kept(self, chunk: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return which rows of a chunk are wanted, with their samples and tokens."""
        samples, tokens = self._samples.read(chunk), self._tokens.read(chunk)
        if samples.min() < 0 or samples.max() >= len(self.store.ok_samples):
            raise DamagedStoreError(
                f"chunk {chunk} of '{spec.SAMPLE_ARRAY}' in {self.store.objects.uri}: expected images below "
                f"{len(self.store.ok_samples)}, found {samples.min()} to {samples.max()}. Check it: stores verify"
            )
        return self.store.ok_samples[samples] & np.isin(tokens, self.positions), samples, tokens

    def _read(self, chunk: int) -> _Pool:
        kept, samples, tokens = self._kept(chunk)
        return _Pool(self._data.read(chunk)[kept], samples[kept], tokens[kept])

    def _batch(self, rows: _Pool) -> Batch:
        return Batch(to_tensor(self._data.array, rows.rows), rows.samples, rows.tokens)


def to_tensor(array: StoredArray, rows: np.ndarray) -> torch.Tensor:
    """Return stored rows as a float32 tensor (N, D)."""
    return torch.from_numpy(np.ascontiguousarray(array.to_float(rows), dtype=np.float32))
