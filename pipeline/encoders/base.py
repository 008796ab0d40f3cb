"""What an encoder is to the pipeline, and the one implementation: a ViT whose layers are read by forward hooks.

Shapes: B images, L the encoder's own sequence, T stored tokens, D width.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.errors import PipelineError, WeightsError

TOKEN_SELECTIONS = ("cls", "patch", "all", "mean")


@dataclass(frozen=True, kw_only=True)
class EncoderRequest:
    """Which encoder, with which weights.

    Parameters
    ----------
    model
        A timm name with its tag, an open_clip name (`ViT-B-32/openai` for weights that it knows), or `local-dir:PATH`.
    weights
        A weights file, read with the library's own key conversion; None takes the library's own (its cache, or
        its hub).
    random_weights
        Random weights instead: for tests of architecture and speed, never by accident.
    image_size
        Height and width of the input in pixels, for the transform too; None takes the model's own.
    seed
        Of random weights.
    """

    model: str
    weights: Path | None = None
    random_weights: bool = False
    image_size: int | None = None
    seed: int = 0


class Encoder(Protocol):
    """A frozen image encoder whose layers can be read."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the hook points: `blocks.0`, … (residual stream after a block), `norm` (after the final norm)."""
        ...

    @property
    def width(self) -> int:
        """Features of the residual stream, D."""
        ...

    @property
    def token_ranges(self) -> dict[str, tuple[int, int]]:
        """Kind of token (`cls`, `register`, `patch`) to its [start, stop) in the sequence."""
        ...

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        ...

    @property
    def description(self) -> dict[str, Any]:
        """What a store records: model, library, weights with their sha256, preprocessing. Plain JSON."""
        ...

    def transform(self, image: Image.Image) -> Tensor:
        """Return an RGB image as the encoder's input, float32 (3, H, W)."""
        ...

    def encode(self, images: Tensor, layers: Sequence[str], tokens: str) -> dict[str, Tensor]:
        """Return float32 (B, T, D) for each layer, the tokens of the selection in sequence order.

        Parameters
        ----------
        images
            float32 (B, 3, H, W).
        layers
            Names from `self.layers`.
        tokens
            `cls`, `patch`, `all`, or `mean` (over the patches; T is 1).
        """
        ...


class HookedViT:
    """A ViT from any library, read by forward hooks on modules that are known by name.

    Parameters
    ----------
    model
        The module that `forward` runs.
    forward
        Runs the model on (B, 3, H, W); its result is ignored.
    modules
        Layer name to the module whose output is (B, L, D).
    width, token_ranges, grid, transform, description
        See `Encoder`.
    """

    def __init__(
        self,
        *,
        model: nn.Module,
        forward: Callable[[Tensor], Any],
        modules: dict[str, nn.Module],
        width: int,
        token_ranges: dict[str, tuple[int, int]],
        grid: tuple[int, int],
        transform: Callable[[Image.Image], Tensor],
        description: dict[str, Any],
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.layers = tuple(modules)
        self.width = width
        self.token_ranges = token_ranges
        self.grid = grid
        self.description = description
        self._forward = forward
        self._modules = modules
        self._transform = transform

    def transform(self, image: Image.Image) -> Tensor:
        """Return an RGB image as the encoder's input, float32 (3, H, W)."""
        return self._transform(image)

    @torch.inference_mode()
    def encode(self, images: Tensor, layers: Sequence[str], tokens: str) -> dict[str, Tensor]:
        """Return float32 (B, T, D) for each layer (see `Encoder.encode`)."""
        read: dict[str, Tensor] = {}

        def reader(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
            def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
                read[name] = self._select(output, tokens)

            return hook

        # Each hook knows its layer's name: the order in which hooks run plays no part.
        handles = [self._modules[name].register_forward_hook(reader(name)) for name in layers]
        try:
            self._forward(images)
        finally:
            for handle in handles:
                handle.remove()
        return read

    def _select(self, output: Tensor, tokens: str) -> Tensor:
        if tokens == "all":
            return output.float()
        start, stop = self.token_ranges["cls" if tokens == "cls" else "patch"]
        selected = output[:, start:stop].float()
        return selected.mean(dim=1, keepdim=True) if tokens == "mean" else selected


def stored_positions(encoder: Encoder, tokens: str) -> tuple[int, ...]:
    """Return the positions in the encoder's sequence that a selection stores; (-1,) for `mean`.

    Raises
    ------
    PipelineError
        If the selection is unknown, or the encoder has no such tokens.
    """
    if tokens not in TOKEN_SELECTIONS:
        raise PipelineError(f"expected --tokens {'|'.join(TOKEN_SELECTIONS)}, found {tokens!r}")
    if tokens == "mean":
        return (-1,)
    if tokens == "all":
        return tuple(range(max(stop for _, stop in encoder.token_ranges.values())))
    if tokens not in encoder.token_ranges:
        raise PipelineError(
            f"expected an encoder with a {tokens} token, found only {'/'.join(encoder.token_ranges)} in "
            f"{encoder.description['model']}: choose --tokens mean, patch or all"
        )
    return tuple(range(*encoder.token_ranges[tokens]))


def state_sha256(model: nn.Module) -> str:
    """Return the sha256 of a model's weights: names, dtypes, shapes and bytes, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_weights_file(path: Path) -> Path:
    """Return `path` if it is a file.

    Raises
    ------
    WeightsError
        If it is not.
    """
    if not path.is_file():
        raise WeightsError(f"expected a weights file at '{path}', found none: check --weights")
    return path
