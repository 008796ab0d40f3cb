"""ViTs of timm, by their own names or as `local-dir:PATH` (config.json and model.safetensors)."""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch import nn

from pipeline.encoders.base import EncoderRequest, HookedViT, check_weights_file, state_sha256
from pipeline.errors import PipelineError, WeightsError

LOCAL_DIR = "local-dir:"


def knows(model: str) -> bool:
    """Whether timm has a model of this name (with or without a tag), or it is a `local-dir:`."""
    return model.startswith(LOCAL_DIR) or timm.is_model(model.split(".", 1)[0])


def load(request: EncoderRequest) -> HookedViT:
    """Load a timm ViT with its own preprocessing.

    Raises
    ------
    WeightsError
        If weights are missing or do not fit.
    PipelineError
        If it is not a ViT.
    """
    model, origin = _create(request)
    if not all(hasattr(model, name) for name in ("blocks", "patch_embed", "num_prefix_tokens", "embed_dim")):
        raise PipelineError(
            f"expected a ViT (blocks, patch_embed, prefix tokens), found {type(model).__name__} for {request.model}: "
            "'pipeline models' lists encoders that work"
        )
    parts: Any = model
    n_prefix = int(parts.num_prefix_tokens)
    n_register = int(getattr(parts, "num_reg_tokens", 0) or 0)
    n_cls = n_prefix - n_register
    grid = (int(parts.patch_embed.grid_size[0]), int(parts.patch_embed.grid_size[1]))
    ranges = {
        "cls": (0, n_cls),
        "register": (n_cls, n_prefix),
        "patch": (n_prefix, n_prefix + grid[0] * grid[1]),
    }
    modules: dict[str, nn.Module] = {f"blocks.{i}": block for i, block in enumerate(parts.blocks)}
    if not isinstance(parts.norm, nn.Identity):
        modules["norm"] = parts.norm
    data = resolve_model_data_config(model)
    if request.image_size is not None:
        # resolve_model_data_config reads the pretrained size: the transform must follow the model that was made.
        data["input_size"] = (3, request.image_size, request.image_size)
    transform: Any = create_transform(**data, is_training=False)
    preprocessing = {name: list(v) if isinstance(v, tuple) else v for name, v in data.items()}
    return HookedViT(
        model=model,
        forward=parts.forward_features,
        modules=modules,
        width=int(parts.embed_dim),
        token_ranges={kind: span for kind, span in ranges.items() if span[1] > span[0]},
        grid=grid,
        transform=transform,
        description={
            "model": _portable_name(request.model),
            "library": "timm",
            "weights": {"origin": origin, "sha256": state_sha256(model)},
            "preprocessing": preprocessing,
        },
    )


def _create(request: EncoderRequest) -> tuple[nn.Module, str]:
    """Return the model and where its weights come from."""
    name = request.model
    local = name.startswith(LOCAL_DIR)
    options: dict[str, Any] = {} if request.image_size is None else {"img_size": request.image_size}
    if local:
        _check_local_dir(Path(name.removeprefix(LOCAL_DIR)))
    else:
        _check_tag(name)
    if request.random_weights:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(request.seed)
            return timm.create_model(name, pretrained=False, **options), f"random, seed {request.seed}"
    if request.weights is not None:
        # As an overlay of pretrained_cfg the file goes through the model's own key conversion; timm's
        # `checkpoint_path` would skip it.
        options["pretrained_cfg_overlay"] = {"file": str(check_weights_file(request.weights)), "source": "file"}
        origin = request.weights.name
    else:
        origin = "local-dir" if local else "hub"
    try:
        return timm.create_model(name, pretrained=True, **options), origin
    except Exception as error:  # timm, torch, safetensors and the hub each raise their own
        raise missing_weights(request, error) from error


def missing_weights(request: EncoderRequest, error: Exception) -> WeightsError:
    """Return the error for weights that could not be had."""
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if request.weights is not None:
        return WeightsError(
            f"expected weights of {request.model} in '{request.weights}', found a file that does not load into it "
            f"({reason}): give the file that belongs to this model"
        )
    return WeightsError(
        f"expected weights for {request.model}, found none that load ({reason}). Give a file with --weights FILE, "
        "connect to the library's hub, or ask for --random_weights if that is what you mean"
    )


def _check_local_dir(folder: Path) -> None:
    missing = [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]
    if missing:
        raise WeightsError(
            f"expected config.json and model.safetensors in '{folder}' (timm's local-dir form), "
            f"found no {' and no '.join(missing)}: check the path behind '{LOCAL_DIR}'"
        )


def _check_tag(name: str) -> None:
    architecture, _, tag = name.partition(".")
    if tag:
        known = [one.partition(".")[2] for one in timm.list_pretrained(f"{architecture}.*")]
        if tag not in known:
            raise PipelineError(
                f"expected a tag of {architecture} that timm knows ({', '.join(known) or 'none'}), found {tag!r}"
            )


def _portable_name(model: str) -> str:
    """A store's identity must not depend on where a folder lies: `local-dir:` keeps the folder's own name."""
    if model.startswith(LOCAL_DIR):
        return LOCAL_DIR + Path(model.removeprefix(LOCAL_DIR)).resolve().name
    return model
