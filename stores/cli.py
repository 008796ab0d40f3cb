"""`stores info | verify`: parses arguments and prints; the work is elsewhere."""

import sys

from stores.commandline import Command, progress_bar, run_commands
from stores.config import InfoConfig, VerifyConfig
from stores.errors import StoreError
from stores.reader import Store
from stores.verify import verify


def info(config: InfoConfig) -> int:
    """Print what a store is."""
    store = Store.open(config.store, allow_nonfinite=True)
    plan, layout = store.plan, store.layout
    encoder, weights = plan.encoder, plan.encoder.get("weights", {})
    n_bytes = sum(record.n_bytes for record in store.manifest.objects)
    lines = {
        "id": store.id,
        "images": f"{layout.n_samples} ({store.manifest.n_failed} failed), {len(store.classes)} classes",
        "source": f"{len(plan.source.get('tars', []))} tar shards in {store.images_root}",
        "encoder": f"{encoder.get('model')} ({encoder.get('library')}), weights {weights.get('origin')} "
        f"{str(weights.get('sha256'))[:12]}",
        "tokens": f"{plan.tokens.selection}: {layout.tokens_per_sample} an image",
        "rows": f"{layout.n_rows} in {layout.n_units} units of {layout.rows_per_shard}",
        "chunks": f"{layout.n_chunks} of {layout.rows_per_chunk} rows",
        "bytes": f"{n_bytes} in {len(store.manifest.objects)} objects",
    }
    for name, value in lines.items():
        print(f"{name:<9}{value}")
    for layer in plan.layers:
        statistics = store.statistics(layer.name)
        print(
            f"{'layer':<9}{layer.name}: {layer.dtype} × {layer.width}, mean norm {statistics.norm:.3f}, "
            f"{statistics.n_nonfinite} NaN or Inf"
        )
    return 0


def verify_command(config: VerifyConfig) -> int:
    """Check every byte of a store; list what is damaged."""
    store = Store.open(config.store, allow_nonfinite=True)
    total = sum(record.n_bytes for record in store.manifest.objects)
    with progress_bar("verifying", total, unit="bytes") as advance:
        result = verify(store, on_progress=advance)
    for line in result.damages:
        print(f"damaged: {line}")
    if result.damages:
        print(f"{config.store}: {len(result.damages)} of {result.n_objects} objects are damaged")
        return 1
    print(f"{config.store}: sound ({result.n_objects} objects, {result.n_bytes} bytes, id {store.id})")
    return 0


COMMANDS = (
    Command("info", "Say what a store is: encoder, layers, rows, size, id.", InfoConfig, info, ("store",)),
    Command(
        "verify",
        "Check every sha256, crc32c and statistic of a store.",
        VerifyConfig,
        verify_command,
        ("store",),
    ),
)


def main(argv: list[str] | None = None) -> int:
    """Run a command line."""
    return run_commands("stores", "Inspect and verify activation stores.", COMMANDS, (StoreError,), argv)


if __name__ == "__main__":
    sys.exit(main())
