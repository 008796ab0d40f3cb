"""`pipeline extract` beside a plain loop over the same tars and model, with no store and no Ray.

    python benchmarks/extract.py --model local-dir:PATH --shards 'DIR/*.tar' --layer blocks.5

The plain loop is what a script would do: webdataset reads and decodes in this process, the model's own transform,
batches, one forward pass each, the CLS token of one layer kept in a list as float16. It has all cores for its matrix
products. Both are timed without loading the model; the extraction's time includes writing and syncing the store, and
starting Ray is reported apart. Rounds alternate; medians are printed.
"""

import argparse
import io
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image

from pipeline.encoders.base import EncoderRequest
from pipeline.encoders.registry import load_encoder
from pipeline.shards import find_shards

IMAGES = "jpg;jpeg;png"


def plain_loop(encoder: Any, paths: list[Path], layer: str, batch_size: int) -> tuple[int, float]:
    """Return the number of images and the seconds of a plain loop."""
    dataset: Any = webdataset.WebDataset([str(path) for path in paths], shardshuffle=False, empty_check=False)  # pyright: ignore
    started = time.monotonic()
    kept: list[np.ndarray] = []
    batch: list[torch.Tensor] = []

    def run() -> None:
        output = encoder.encode(torch.stack(batch), [layer], "cls")[layer]
        kept.append(output.to(torch.float16).numpy())
        batch.clear()

    for sample in dataset:
        data = next(sample[extension] for extension in IMAGES.split(";") if extension in sample)
        batch.append(encoder.transform(Image.open(io.BytesIO(data)).convert("RGB")))
        if len(batch) == batch_size:
            run()
    if batch:
        run()
    return sum(len(rows) for rows in kept), time.monotonic() - started


def extraction(arguments: argparse.Namespace, out: Path) -> tuple[float, float]:
    """Return the seconds of the command, and the images per second that it reports."""
    program = str(Path(sys.executable).parent / "pipeline")
    command = [program, "extract", "--model", arguments.model, "--shards", arguments.shards]
    command += ["--layers", arguments.layer, "--tokens", "cls", "--batch_size", str(arguments.batch_size)]
    command += ["--out", str(out)]
    started = time.monotonic()
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds = time.monotonic() - started
    return seconds, float(result.stdout.split(" images/s")[0].rsplit(" ", 1)[1])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--shards", required=True, help="glob, in quotes")
    parser.add_argument("--layer", required=True)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    paths = find_shards(arguments.shards)
    encoder = load_encoder(EncoderRequest(model=arguments.model))
    plain: list[float] = []
    ours: list[float] = []
    whole: list[float] = []
    n_images = 0
    with tempfile.TemporaryDirectory() as folder:
        for i in range(arguments.rounds):
            n_images, seconds = plain_loop(encoder, paths, arguments.layer, arguments.batch_size)
            plain.append(n_images / seconds)
            seconds, rate = extraction(arguments, Path(folder) / str(i))
            ours.append(rate)
            whole.append(seconds)
            print(
                f"round {i}: plain {plain[-1]:.0f} images/s, extract {rate:.0f} images/s, {seconds:.0f} s in all",
                flush=True,
            )
    a, b = statistics.median(plain), statistics.median(ours)
    print(f"{n_images} images; medians of {arguments.rounds} rounds")
    print(f"plain loop        {a:8.0f} images/s")
    print(f"pipeline extract  {b:8.0f} images/s   {b / a:.2f} × the plain loop")
    print(f"whole command     {n_images / statistics.median(whole):8.0f} images/s, with loading and starting Ray")


if __name__ == "__main__":
    main()
