"""Encoders by name: what `pipeline models` lists, and the way from a name to a loaded encoder."""

import difflib
from dataclasses import dataclass
from typing import Any

import open_clip
import timm
import torch

from pipeline.encoders import open_clip_models, timm_models
from pipeline.encoders.base import Encoder, EncoderRequest
from pipeline.errors import UnknownModelError

LISTED = (
    ("DINOv2", "vit_small_patch14_dinov2.lvd142m"),
    ("DINOv2", "vit_base_patch14_dinov2.lvd142m"),
    ("DINOv2", "vit_large_patch14_dinov2.lvd142m"),
    ("DINOv2", "vit_giant_patch14_dinov2.lvd142m"),
    ("DINOv2 + registers", "vit_base_patch14_reg4_dinov2.lvd142m"),
    ("DINOv2 + registers", "vit_large_patch14_reg4_dinov2.lvd142m"),
    ("MAE", "vit_base_patch16_224.mae"),
    ("MAE", "vit_large_patch16_224.mae"),
    ("MAE", "vit_huge_patch14_224.mae"),
    ("CLIP", "ViT-B-32/openai"),
    ("CLIP", "ViT-L-14/openai"),
    ("CLIP", "ViT-L-14/laion2b_s32b_b82k"),
    ("CLIP", "ViT-L-14/datacomp_xl_s13b_b90k"),
    ("supervised", "vit_base_patch16_224.augreg_in21k"),
    ("supervised", "vit_large_patch16_224.augreg_in21k_ft_in1k"),
)
"""Family and name of the encoders that people ask for; any other ViT of the two libraries works by its own name."""


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """A line of `pipeline models`."""

    family: str
    name: str
    library: str
    width: int
    n_layers: int
    n_tokens: int
    image_size: int
    licence: str
    weights: str


def load_encoder(request: EncoderRequest) -> Encoder:
    """Load an encoder.

    Raises
    ------
    UnknownModelError
        If neither library has it; the message offers the nearest names.
    WeightsError, PipelineError
        See the libraries' own modules.
    """
    for library in (timm_models, open_clip_models):
        if library.knows(request.model):
            return library.load(request)
    known = dict.fromkeys((*(name for _, name in LISTED), *timm.list_pretrained("vit_*"), *open_clip.list_models()))
    near = difflib.get_close_matches(request.model, known, n=3, cutoff=0.3)
    raise UnknownModelError(
        f"expected an encoder that timm or open_clip knows, found {request.model!r}"
        + (f": did you mean {' or '.join(near)}?" if near else ": 'pipeline models' lists some")
    )


def list_models() -> list[ModelEntry]:
    """Return the listed encoders, measured on their architectures without any weights."""
    return [_timm_entry(family, name) if "/" not in name else _clip_entry(family, name) for family, name in LISTED]


def _timm_entry(family: str, name: str) -> ModelEntry:
    with torch.device("meta"):
        model: Any = timm.create_model(name, pretrained=False)
    config = model.pretrained_cfg
    grid = model.patch_embed.grid_size
    return ModelEntry(
        family=family,
        name=name,
        library="timm",
        width=model.embed_dim,
        n_layers=len(model.blocks),
        n_tokens=model.num_prefix_tokens + grid[0] * grid[1],
        image_size=config["input_size"][-1],
        licence=config.get("license") or "unstated",
        weights=f"hub: {config['hf_hub_id']}",
    )


def _clip_entry(family: str, name: str) -> ModelEntry:
    architecture, tag = name.split("/")
    vision = (open_clip.get_model_config(architecture) or {})["vision_cfg"]
    source = open_clip.get_pretrained_cfg(architecture, tag)
    grid = vision["image_size"] // vision["patch_size"]
    return ModelEntry(
        family=family,
        name=name,
        library="open_clip",
        width=vision["width"],
        n_layers=vision["layers"],
        n_tokens=1 + grid * grid,
        image_size=vision["image_size"],
        licence="mit",
        weights=f"hub: {str(source.get('hf_hub') or source.get('url')).rstrip('/')}",
    )
