"""`pipeline shards | models | extract`: parses arguments and prints; the work is elsewhere."""

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from pipeline.config import ExtractConfig, ModelsConfig, ShardsConfig
from pipeline.errors import PipelineError
from stores.commandline import Command, progress_bar, run_commands
from stores.errors import StoreError

if TYPE_CHECKING:
    from pipeline.ray_app import Progress


def shards(config: ShardsConfig) -> int:
    """Write a source of images as WebDataset tar shards."""
    from pipeline.shards import write_shards
    from pipeline.sources import open_source

    source = open_source(config.source, config.input, config.split)
    with progress_bar("writing shards", len(source), unit="images") as advance:
        paths = write_shards(
            source,
            config.out,
            name=f"{config.source}-{config.split}",
            samples_per_shard=config.samples_per_shard,
            on_sample=lambda: advance(1),
        )
    print(f"{config.out}: {len(source)} images of {len(source.classes)} classes in {len(paths)} tar shards")
    return 0


def models(_config: ModelsConfig) -> int:
    """List encoders."""
    from pipeline.encoders.registry import list_models

    columns = ("family", "name", "library", "width", "blocks", "tokens", "input", "licence", "weights")
    table = Table(*columns, box=None, pad_edge=False)
    for entry in list_models():
        table.add_row(
            entry.family,
            entry.name,
            entry.library,
            str(entry.width),
            str(entry.n_layers),
            str(entry.n_tokens),
            str(entry.image_size),
            entry.licence,
            entry.weights,
        )
    # A listing is for pipes too: never folded to the terminal's width.
    Console(width=200).print(table)
    print("\nAny other ViT of timm or open_clip works by its own name; a folder with config.json and")
    print("model.safetensors works as local-dir:PATH. Layers: blocks.0 … blocks.(blocks - 1), norm (timm).")
    return 0


def extract(config: ExtractConfig) -> int:
    """Run an encoder over tar shards into a sealed activation store."""
    from pipeline.encoders.registry import load_encoder
    from pipeline.plan import make_plan
    from pipeline.ray_app import run_extraction
    from pipeline.shards import find_shards, index_of

    indexes = [index_of(path) for path in find_shards(config.shards)]
    plan = make_plan(
        indexes,
        load_encoder(config.encoder),
        layers=config.layer_names,
        tokens=config.tokens,
        dtype=config.dtype,
        seed=config.seed,
        limit=config.limit,
    )
    layout = plan.store.layout
    with progress_bar("extracting", layout.n_samples, unit="images") as advance:
        show = _ProgressLine(advance, layout.n_units)
        result = run_extraction(
            plan,
            config.encoder,
            out=config.out,
            batch_size=config.batch_size,
            workers=config.workers,
            address=config.address,
            on_progress=show.update,
        )
    rate = f", {result.n_images / result.seconds:.0f} images/s" if result.n_images else " (all committed before)"
    print(
        f"{config.out}: sealed, {layout.n_samples} images ({result.n_failed} failed), {layout.n_rows} rows × "
        f"{len(plan.store.layers)} layers{rate}, id {result.store_id[:12]}"
    )
    return 0


class _ProgressLine:
    """Turns counts into steps of a progress bar and a rate over the whole call."""

    def __init__(self, advance: Callable[..., None], n_units: int) -> None:
        self._advance = advance
        self._n_units = n_units
        self._shown = 0
        self._start: tuple[int, float] | None = None

    def update(self, progress: "Progress") -> None:
        now = time.monotonic()
        if self._start is None:
            self._start = (progress.n_images, now)
        n_before, since = self._start
        rate = (progress.n_images - n_before) / max(now - since, 1e-9)
        note = f"{rate:.0f} images/s, unit {progress.n_units}/{self._n_units}, {progress.n_failed} failed"
        self._advance(progress.n_images - self._shown, note)
        self._shown = progress.n_images


COMMANDS = (
    Command(
        "shards", "Write images as WebDataset tar shards, with an index of where each image is.", ShardsConfig, shards
    ),
    Command(
        "models",
        "List encoders: width, blocks, tokens, input size, licence, where weights come from.",
        ModelsConfig,
        models,
    ),
    Command(
        "extract",
        "Run an encoder over tar shards on Ray and write a sealed activation store. The same command resumes.",
        ExtractConfig,
        extract,
    ),
)


def main(argv: list[str] | None = None) -> int:
    """Run a command line."""
    return run_commands(
        "pipeline",
        "Images to activations: tar shards, encoders, extraction.",
        COMMANDS,
        (PipelineError, StoreError),
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
