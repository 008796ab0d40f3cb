"""The whole way on scikit-learn's digits, with the commands that a user types: images to a report in under 3 minutes.

    digits -> tar shards -> mini ViT on Ray -> sealed store -> three SAEs -> table and HTML page

The encoder is `examples/digits_vit`, a ViT trained on the digits' training split. SAEs are trained on the activations
of that split and evaluated on those of the test split. `make demo` runs this; nothing is downloaded.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
REGULARIZERS = {"none": 0.0, "off_support": 0.005, "l1_l2": 0.02}


def main() -> int:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything that it makes (demo)")
    out = parser.parse_args().out
    if out.exists():
        shutil.rmtree(out)
    stages: list[tuple[str, float]] = []

    def stage(title: str, *commands: str) -> None:
        """Run commands, and note the time that they take together."""
        print(f"\n== {title}", flush=True)
        started = time.monotonic()
        for command in commands:
            print(f"$ {command}", flush=True)
            program, *arguments = shlex.split(command)
            # The commands of this environment, whether or not it is activated.
            subprocess.run([str(Path(sys.executable).parent / program), *arguments], check=True)
        stages.append((title, time.monotonic() - started))

    splits = ("train", "test")
    stage(
        "tar shards",
        *(f"pipeline shards --source digits --split {split} --out {out}/shards/{split}" for split in splits),
    )
    stage(
        "activations",
        *(
            f"pipeline extract --model local-dir:{HERE / 'digits_vit'} --shards '{out}/shards/{split}/*.tar' "
            f"--layers blocks.3 --tokens cls --out {out}/store/{split}"
            for split in splits
        ),
    )
    stage("verify", *(f"stores verify {out}/store/{split}" for split in splits))
    stage(
        "train SAEs",
        *(
            f"sae fit --store {out}/store/train --k 8 --latents 512 --regularizer {name} --strength {strength} "
            f"--epochs 100 --batch_size 256 --out {out}/runs/{name}"
            for name, strength in REGULARIZERS.items()
        ),
    )
    stage("evaluate", *(f"sae eval --run {out}/runs/{name} --store {out}/store/test" for name in REGULARIZERS))
    runs = ",".join(f"{out}/runs/{name}" for name in REGULARIZERS)
    stage("report", f"sae report --runs {runs} --store {out}/store/test --out {out}/report.html")

    print("\n== time")
    for title, seconds in stages:
        print(f"{title:<14}{seconds:6.1f} s")
    print(f"{'together':<14}{sum(seconds for _, seconds in stages):6.1f} s")
    print(f"\nOpen {out / 'report.html'} in a browser.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
