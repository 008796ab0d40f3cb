"""The table of samples: one line an image, as Parquet."""

import io

import pyarrow as pa
import pyarrow.parquet as pq

from stores.errors import DamagedStoreError

SAMPLES_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.int64()),
        pa.field("tar", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
    ]
)
"""One line an image. `status` is `ok`, or `failed: REASON`."""


def write_samples(samples: pa.Table) -> bytes:
    """Return a table's bytes."""
    buffer = io.BytesIO()
    pq.write_table(samples, buffer, compression="zstd")
    return buffer.getvalue()


def read_samples(data: bytes, what: str) -> pa.Table:
    """Return the table of an object; `DamagedStoreError` naming `what` if it is none."""
    try:
        return pq.read_table(io.BytesIO(data)).cast(SAMPLES_SCHEMA)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DamagedStoreError(
            f"'{what}': expected a table of samples, found something else ({error}). Copy this object again"
        ) from None
