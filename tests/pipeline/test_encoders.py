from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform

from pipeline.encoders.base import EncoderRequest, stored_positions
from pipeline.encoders.registry import LISTED, list_models, load_encoder
from pipeline.errors import PipelineError, UnknownModelError, WeightsError


def _images(n: int = 3, size: tuple[int, int] = (300, 240)) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(n)]


def _request(model: str, **options: object) -> EncoderRequest:
    return EncoderRequest(model=model, random_weights=True, **options)  # pyright: ignore[reportArgumentType]


def test_timm_layers_equal_a_direct_forward_pass_in_float32() -> None:
    encoder = load_encoder(_request("vit_tiny_patch16_224", seed=3))
    torch.manual_seed(3)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    images = _images()
    batch = torch.stack([transform(image) for image in images])
    assert torch.equal(batch, torch.stack([encoder.transform(image) for image in images]))
    with torch.inference_mode():
        final, taken = model.forward_intermediates(batch, indices=[2, 7], return_prefix_tokens=True, output_fmt="NLC")
    # Asked for in another order than they run: each still comes under its own name.
    found = encoder.encode(batch, ["blocks.7", "norm", "blocks.2"], "all")
    for name, (patches, prefix) in zip(("blocks.2", "blocks.7"), taken, strict=True):
        assert torch.equal(found[name], torch.cat([prefix, patches], dim=1))
    assert torch.equal(found["norm"], final)
    assert torch.equal(encoder.encode(batch, ["blocks.7"], "cls")["blocks.7"], taken[1][1])
    assert torch.equal(encoder.encode(batch, ["blocks.7"], "patch")["blocks.7"], taken[1][0])
    mean = encoder.encode(batch, ["blocks.7"], "mean")["blocks.7"]
    assert torch.equal(mean, taken[1][0].mean(dim=1, keepdim=True))


def test_open_clip_layers_equal_a_direct_forward_pass_in_float32() -> None:
    encoder = load_encoder(_request("ViT-B-32", seed=5))
    torch.manual_seed(5)
    model, _, transform = open_clip.create_model_and_transforms("ViT-B-32", pretrained=None)
    images = _images(2)
    batch = torch.stack([transform(image) for image in images])
    assert torch.equal(batch, torch.stack([encoder.transform(image) for image in images]))
    seen: list[torch.Tensor] = []
    model.eval().visual.transformer.resblocks[4].register_forward_hook(lambda _m, _i, output: seen.append(output))
    with torch.inference_mode():
        model.encode_image(batch)
    found = encoder.encode(batch, ["blocks.4"], "all")["blocks.4"]
    assert found.shape == (2, 50, 768)
    assert torch.equal(found, seen[0])


def test_registers_are_told_from_patches() -> None:
    encoder = load_encoder(_request("vit_small_patch14_reg4_dinov2", image_size=56))
    assert encoder.token_ranges == {"cls": (0, 1), "register": (1, 5), "patch": (5, 21)}
    assert encoder.grid == (4, 4)
    assert stored_positions(encoder, "patch") == tuple(range(5, 21))


def test_an_image_size_reaches_the_transform_too() -> None:
    encoder = load_encoder(_request("vit_small_patch14_dinov2.lvd142m", image_size=224))
    assert encoder.transform(_images(1)[0]).shape == (3, 224, 224)
    assert encoder.description["preprocessing"]["input_size"] == [3, 224, 224]


def test_random_weights_are_the_seeds_and_leave_the_generator_alone() -> None:
    torch.manual_seed(9)
    expected = torch.rand(1)
    torch.manual_seed(9)
    first, again, other = (load_encoder(_request("vit_tiny_patch16_224", seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    digests = [encoder.description["weights"]["sha256"] for encoder in (first, again, other)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    "model", ["vit_small_patch14_dinov2.lvd142m", "vit_base_patch16_224.mae", "ViT-B-32", "ViT-B-32/openai"]
)
def test_missing_weights_are_an_error(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_arguments: object, **_options: object) -> None:
        raise OSError("the hub cannot be reached")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    monkeypatch.setattr("open_clip.pretrained.download_pretrained", offline)
    monkeypatch.setattr("open_clip.factory.download_pretrained", offline)
    with pytest.raises(WeightsError, match="--random_weights"):
        load_encoder(EncoderRequest(model=model))


def test_a_weights_file_goes_through_the_models_own_key_conversion(tmp_path: Path) -> None:
    made = timm.create_model("vit_base_patch16_224.mae", pretrained=False)
    # MAE's published files nest the weights under "model" and carry a decoder that timm's conversion leaves out.
    state = {**made.state_dict(), "mask_token": torch.zeros(1, 1, 768)}
    torch.save({"model": state}, tmp_path / "mae.pth")
    loaded = load_encoder(EncoderRequest(model="vit_base_patch16_224.mae", weights=tmp_path / "mae.pth"))
    reference = load_encoder(_request("vit_base_patch16_224.mae"))
    assert loaded.description["weights"]["sha256"] != reference.description["weights"]["sha256"]
    x = torch.rand(1, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(loaded.encode(x, ["norm"], "all")["norm"], made.eval().forward_features(x))


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (EncoderRequest(model="vit_smal_patch14_dinov2"), UnknownModelError, "did you mean vit_small_patch14_dinov2"),
        (EncoderRequest(model="vit_small_patch14_dinov2.x"), PipelineError, r"lvd142m"),
        (EncoderRequest(model="ViT-B-32/x"), PipelineError, "openai"),
        (EncoderRequest(model="local-dir:/nowhere"), WeightsError, "config.json"),
        (EncoderRequest(model="resnet18", random_weights=True), PipelineError, "expected a ViT"),
        (EncoderRequest(model="vit_base_patch16_224.mae", weights=Path("/nowhere")), WeightsError, "check --weights"),
    ],
)
def test_a_wrong_name_or_file_is_one_clear_error(
    request_: EncoderRequest, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        load_encoder(request_)


def test_the_listed_models_exist_with_the_sizes_that_are_listed() -> None:
    entries = {entry.name: entry for entry in list_models()}
    assert list(entries) == [name for _, name in LISTED]
    assert (
        entries["vit_giant_patch14_dinov2.lvd142m"].width,
        entries["vit_giant_patch14_dinov2.lvd142m"].n_tokens,
    ) == (
        1536,
        1370,
    )
    assert entries["ViT-L-14/openai"].n_tokens == 257
