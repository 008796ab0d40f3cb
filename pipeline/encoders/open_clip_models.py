"""Image towers of open_clip, as `ARCHITECTURE` or `ARCHITECTURE/PRETRAINED_TAG`, e.g. `ViT-B-32/openai`."""

import logging
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2

from pipeline.encoders.base import EncoderRequest, HookedViT, check_weights_file, state_sha256
from pipeline.encoders.timm_models import missing_weights
from pipeline.errors import PipelineError, WeightsError


def knows(model: str) -> bool:
    """Whether open_clip has an architecture of this name."""
    return model.split("/", 1)[0] in open_clip.list_models()


def load(request: EncoderRequest) -> HookedViT:
    """Load an open_clip image tower with its own preprocessing.

    Raises
    ------
    WeightsError
        If no weights are named, or they are missing.
    PipelineError
        If the tower is not open_clip's own ViT.
    """
    architecture, _, tag = request.model.partition("/")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag and tag not in tags:
        raise PipelineError(f"expected a tag of {architecture} that open_clip knows ({', '.join(tags)}), found {tag!r}")
    model, origin = _create(request, architecture, tag, tags)
    visual: Any = model.visual
    if not hasattr(visual, "transformer") or not hasattr(visual, "grid_size"):
        raise PipelineError(
            f"expected an open_clip ViT image tower, found {type(visual).__name__} for {request.model}: "
            "'pipeline models' lists encoders that work"
        )
    grid = (int(visual.grid_size[0]), int(visual.grid_size[1]))
    config = dict(visual.preprocess_cfg)
    transform: Any = image_transform_v2(PreprocessCfg(**config), is_train=False)
    return HookedViT(
        model=visual,
        forward=visual,
        modules={f"blocks.{i}": block for i, block in enumerate(visual.transformer.resblocks)},
        width=int(visual.transformer.width),
        token_ranges={"cls": (0, 1), "patch": (1, 1 + grid[0] * grid[1])},
        grid=grid,
        transform=transform,
        description={
            "model": request.model,
            "library": "open_clip",
            "weights": {"origin": origin, "sha256": state_sha256(visual)},
            "preprocessing": {name: list(v) if isinstance(v, tuple) else v for name, v in config.items()},
        },
    )


def _create(request: EncoderRequest, architecture: str, tag: str, tags: list[str]) -> tuple[Any, str]:
    """Return the model and where its weights come from."""
    options: dict[str, Any] = {}
    if request.image_size is not None:
        options["force_image_size"] = request.image_size
    # Quick GELU and mean/std belong to the weights, not to the architecture: open_clip looks them up by the tag
    # alone, and would skip them for a file.
    known = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
    if known:
        options["force_quick_gelu"] = bool(known.get("quick_gelu"))
        options["force_preprocess_cfg"] = {
            name: known[name] for name in ("mean", "std", "interpolation", "resize_mode") if name in known
        }
    if request.random_weights:
        with torch.random.fork_rng(devices=[]), _silenced():
            torch.manual_seed(request.seed)
            return open_clip.create_model(architecture, pretrained=None, **options), f"random, seed {request.seed}"
    if request.weights is not None:
        source, origin = str(check_weights_file(request.weights)), request.weights.name
    elif tag:
        source, origin = tag, "hub"
    else:
        raise WeightsError(
            f"expected weights for {architecture}, found none named. Add a tag ({architecture}/"
            f"{tags[0] if tags else 'TAG'}; known: {', '.join(tags) or 'none'}), give --weights FILE, "
            "or ask for --random_weights if that is what you mean"
        )
    try:
        return open_clip.create_model(architecture, pretrained=source, require_pretrained=True, **options), origin
    except Exception as error:  # open_clip, torch, safetensors and the hub each raise their own
        raise missing_weights(request, error) from error


class _silenced:
    """Mutes open_clip's warning that there are no pretrained weights: here they were refused on purpose."""

    def __enter__(self) -> None:
        self._level = logging.root.level
        logging.root.setLevel(logging.ERROR)

    def __exit__(self, *_error: object) -> None:
        logging.root.setLevel(self._level)
