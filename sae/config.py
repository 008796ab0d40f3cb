"""The options of `sae`'s commands: frozen, checked when built. The model's and the objective's own are beside them."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sae.errors import SaeError
from sae.model import Activation, SAEConfig
from sae.objectives import Mask, ObjectiveConfig

Regularizer = Literal["none", "off_support", "l1_l2"]


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Options of `sae fit`.

    Parameters
    ----------
    store
        A sealed activation store.
    out
        Folder of the run. If it holds an unfinished run of the same options, training goes on there.
    layer
        Which layer; the store's last by default.
    tokens
        Train on rows of this kind only (`cls`, `register`, `patch` or `mean`); all rows by default.
    k
        The budget: latents selected a row.
    latents
        Size of the dictionary, M.
    regularizer
        `off_support` (ℓ1 of what the budget left out) or `l1_l2` (ratio of norms), both on the activations before
        Top-k of the batch's active latents (arXiv 2606.27321); or `none`.
    strength
        Its weight beside the mean squared error. The paper's λ is this times D / N (input width, rows a batch).
        Has no part with `none`.
    mask
        `batch_active`, or `none`: the paper's ablation, which penalises all latents.
    activation
        `relu`, or `identity`.
    epochs
        Passes over the store.
    batch_size
        Rows a step.
    lr
        Adam's learning rate after warm-up, falling to 0 by a cosine. By default 0.001 · sqrt(8192 / M), at most 0.003.
    warmup
        Share of the steps in which the learning rate rises from 0.
    clip_norm
        Largest global norm of the gradient.
    aux
        Weight of the auxiliary loss that revives dead latents (Gao et al. 2024).
    k_aux
        Dead latents that take part in it, a row; D / 2 by default.
    dead_after
        Rows without being selected after which a latent is dead; by default an epoch's, at most 10 million.
    seed
        Of the initialisation and of the order of rows.
    chunks_per_pool
        Chunks of the store that are mixed at a time.
    checkpoint_every
        Steps between checkpoints.
    log_every
        Steps between lines of metrics.jsonl.
    device
        `cpu`, `cuda`, or `auto`.
    """

    store: str
    out: Path
    layer: str | None = None
    tokens: str | None = None
    k: int = 32
    latents: int = 8192
    regularizer: Regularizer = "none"
    strength: float = 0.1
    mask: Mask = "batch_active"
    activation: Activation = "relu"
    epochs: int = 10
    batch_size: int = 4096
    lr: float | None = None
    warmup: float = 0.05
    clip_norm: float = 1.0
    aux: float = 1 / 32
    k_aux: int | None = None
    dead_after: int | None = None
    seed: int = 0
    chunks_per_pool: int = 128
    checkpoint_every: int = 500
    log_every: int = 10
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        for name in ("k", "latents", "epochs", "batch_size", "chunks_per_pool", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise SaeError(f"expected --{name} of at least 1, found {getattr(self, name)}")
        for name in ("k_aux", "dead_after"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SaeError(f"expected --{name} of at least 1, found {value}")
        for name in ("lr", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise SaeError(f"expected --{name} above 0, found {value}")
        if not 0 <= self.warmup < 1:
            raise SaeError(f"expected --warmup from 0 up to 1, found {self.warmup}")
        if self.seed < 0:
            raise SaeError(f"expected --seed of at least 0, found {self.seed}")
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise SaeError(f"expected --strength of at least 0, found {self.strength}")
        if self.k > self.latents:
            raise SaeError(f"expected --k of at most --latents {self.latents}, found {self.k}")

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up."""
        # Smaller dictionaries bear larger steps (Gao et al. 2024, appendix A.3: ∝ 1/√M). The constant is a
        # first choice that trains the demo; it has not been tuned yet.
        return self.lr or min(3e-3, 1e-3 * math.sqrt(8192 / self.latents))

    def model(self, d_in: int) -> SAEConfig:
        """Return the SAE's shape for activations of width `d_in`."""
        return SAEConfig(d_in=d_in, n_latents=self.latents, k=self.k, activation=self.activation)

    @property
    def objective(self) -> ObjectiveConfig:
        """The objective."""
        return ObjectiveConfig(
            off_support=self.strength if self.regularizer == "off_support" else 0.0,
            l1_l2=self.strength if self.regularizer == "l1_l2" else 0.0,
            aux=self.aux,
            k_aux=self.k_aux,
            mask=self.mask,
        )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Options of `sae eval`.

    Parameters
    ----------
    run
        Folder of a finished run.
    store
        The store to evaluate on: same encoder and layer, images that the SAE was not trained on.
    out
        Folder for metrics.json; RUN/eval by default.
    tokens
        Rows to evaluate on: `cls`, `register`, `patch`, `mean` or `all`. By default one row an image: `cls` where the
        store has it, else whatever it holds.
    embeddings
        A second store with one row an image, whose embeddings judge monosemanticity; by default the activations
        themselves do.
    batch_size
        Rows encoded at a time.
    """

    run: Path
    store: str
    out: Path | None = None
    tokens: Literal["cls", "register", "patch", "mean", "all"] | None = None
    embeddings: str | None = None
    batch_size: int = 2048

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise SaeError(f"expected --batch_size of at least 1, found {self.batch_size}")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Options of `sae report`.

    Parameters
    ----------
    runs
        Folders of finished runs, separated by commas; the first is what the others are compared with.
    store
        The store to evaluate on, whose images are shown.
    out
        The HTML file.
    tokens
        As for `sae eval`.
    images
        Folder of the store's tar shards, if they have moved.
    n_latents
        Latents to show.
    n_images
        Images to show for each.
    batch_size
        Rows encoded at a time.
    """

    runs: str | list[str]
    store: str
    out: Path
    tokens: Literal["cls", "register", "patch", "mean", "all"] | None = None
    images: Path | None = None
    n_latents: int = 12
    n_images: int = 12
    batch_size: int = 2048

    def __post_init__(self) -> None:
        for name in ("n_latents", "n_images", "batch_size"):
            if getattr(self, name) < 1:
                raise SaeError(f"expected --{name} of at least 1, found {getattr(self, name)}")
        if not self.run_paths:
            raise SaeError("expected --runs as folders separated by commas, found none")

    @property
    def run_paths(self) -> list[Path]:
        """The runs' folders."""
        runs = self.runs.split(",") if isinstance(self.runs, str) else self.runs
        return [Path(run.strip()) for run in runs if run.strip()]
