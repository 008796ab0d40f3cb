"""The options of `pipeline`'s commands: frozen, checked when built."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.encoders.base import TOKEN_SELECTIONS, EncoderRequest
from pipeline.errors import PipelineError

SourceName = Literal["digits", "cifar10", "folder"]


@dataclass(frozen=True, kw_only=True)
class ShardsConfig:
    """Options of `pipeline shards`.

    Parameters
    ----------
    source
        `digits` (scikit-learn's 1,797 images of handwritten digits, needs no input), `cifar10` (train.tar and
        test.tar or folders of class folders), or `folder` (any folder or tar of images; a folder's name is its
        images' class).
    out
        Folder for the tar shards.
    input
        Where the images are.
    split
        `train`, `test` or `all`.
    samples_per_shard
        Images a tar.
    """

    source: SourceName
    out: Path
    input: Path | None = None
    split: str = "train"
    samples_per_shard: int = 10_000

    def __post_init__(self) -> None:
        _at_least_one("samples_per_shard", self.samples_per_shard)


@dataclass(frozen=True, kw_only=True)
class ModelsConfig:
    """Options of `pipeline models`: there are none."""


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Options of `pipeline extract`.

    Parameters
    ----------
    model
        A name that timm or open_clip knows (see `pipeline models`), or `local-dir:PATH` with config.json and
        model.safetensors.
    shards
        Glob of WebDataset tars, in quotes.
    layers
        Hook points, separated by commas: `blocks.N` (residual stream after block N) or `norm` (after the final norm).
    out
        Folder of the store. If it holds an unfinished store of the same plan, the extraction goes on there.
    tokens
        Which tokens to store: `cls`, `patch`, `all`, or `mean` (one row an image: the mean of its patches).
    weights
        A weights file instead of the library's own cache or hub.
    random_weights
        Random weights, on purpose. Without this, missing weights are an error.
    image_size
        Input height and width in pixels; the model's own by default.
    dtype
        Of the stored activations.
    batch_size
        Images a forward pass.
    workers
        Ray actors, each with its own encoder. By default one a GPU, or one a CPU core without GPUs.
    address
        Of a running Ray cluster (`auto`, `HOST:PORT`); by default Ray runs on this machine alone, for as long as the
        command does.
    limit
        Take only the first so many images.
    seed
        Of the order of rows within a shard, and of random weights.
    """

    model: str
    shards: str
    layers: str | list[str]
    out: Path
    tokens: str = "cls"
    weights: Path | None = None
    random_weights: bool = False
    image_size: int | None = None
    dtype: Literal["float16", "float32", "bfloat16"] = "float16"
    batch_size: int = 64
    workers: int | None = None
    address: str | None = None
    limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens not in TOKEN_SELECTIONS:
            raise PipelineError(f"expected --tokens {'|'.join(TOKEN_SELECTIONS)}, found {self.tokens!r}")
        if not self.layer_names or len(set(self.layer_names)) != len(self.layer_names):
            raise PipelineError(f"expected --layers as names separated by commas, each once, found {self.layers!r}")
        if self.weights is not None and self.random_weights:
            raise PipelineError("expected --weights or --random_weights, found both: leave one out")
        for name in ("batch_size", "workers", "limit", "image_size"):
            _at_least_one(name, getattr(self, name))
        if self.seed < 0:
            raise PipelineError(f"expected --seed of at least 0, found {self.seed}")

    @property
    def layer_names(self) -> Sequence[str]:
        """The layers, one by one."""
        names = self.layers.split(",") if isinstance(self.layers, str) else self.layers
        return [name.strip() for name in names if name.strip()]

    @property
    def encoder(self) -> EncoderRequest:
        """What to load."""
        return EncoderRequest(
            model=self.model,
            weights=self.weights,
            random_weights=self.random_weights,
            image_size=self.image_size,
            seed=self.seed,
        )


def _at_least_one(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise PipelineError(f"expected --{name} of at least 1, found {value}")
