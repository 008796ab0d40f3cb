import io
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.cli import main
from pipeline.encoders.base import EncoderRequest
from pipeline.encoders.registry import load_encoder
from pipeline.extract import UnitExtractor
from pipeline.plan import make_plan
from pipeline.preprocess import DecodeError, decode
from pipeline.shards import find_shards, index_of, write_shards
from pipeline.sources import open_source
from pipeline.sources.base import Sample
from stores.objects import LocalObjects
from stores.reader import Store
from stores.writer import StoreWriter


def _extract(shards: Path, model: str, out: Path, **options: object) -> Store:
    """Extract without Ray, as its actors do."""
    encoder = load_encoder(EncoderRequest(model=model))
    indexes = [index_of(path) for path in find_shards(f"{shards}/*.tar")]
    plan = make_plan(
        indexes, encoder, layers=["blocks.1", "blocks.3"], tokens="all", dtype="float32", seed=0, **options
    )  # pyright: ignore[reportArgumentType]
    writer = StoreWriter.begin(LocalObjects(out), plan.store, images_root=str(plan.images_root))
    extractor = UnitExtractor(encoder, writer, images_root=plan.images_root, batch_size=64)
    for unit in range(plan.store.layout.n_units):
        extractor.extract(unit, plan.unit_images(unit))
    writer.seal(versions={})
    return Store.open(out)


def test_every_row_is_the_encoders_own_output_for_its_image_and_token(digits_store: Path, digits_vit: str) -> None:
    store = Store.open(digits_store)
    encoder = load_encoder(EncoderRequest(model=digits_vit))
    images = [Image.open(io.BytesIO(sample.image)).convert("RGB") for sample in open_source("digits", None, "test")]
    batch = torch.stack([encoder.transform(image) for image in images])
    expected = encoder.encode(batch, ["blocks.1", "blocks.3"], "all")
    n = store.layout.n_rows
    samples, tokens = store.rows("sample", 0, n), store.rows("token", 0, n)
    assert n == 355 * 17
    assert store.samples["key"].to_pylist() == [sample.key for sample in open_source("digits", None, "test")]
    assert store.labels.tolist() == [sample.label for sample in open_source("digits", None, "test")]
    for layer, values in expected.items():
        # Other batches than the extraction's: products of floats differ in their last bits.
        np.testing.assert_allclose(store.rows(layer, 0, n), values.numpy()[samples, tokens], rtol=1e-4, atol=1e-4)


def test_ray_and_a_plain_loop_over_the_units_make_the_same_rows(
    digits_store: Path, digits_shards: Path, digits_vit: str, tmp_path: Path
) -> None:
    on_ray, plain = Store.open(digits_store), _extract(digits_shards, digits_vit, tmp_path)
    assert on_ray.plan.digest == plain.plan.digest
    n = plain.layout.n_rows
    assert np.array_equal(on_ray.rows("sample", 0, n), plain.rows("sample", 0, n))
    np.testing.assert_allclose(on_ray.rows("blocks.3", 0, n), plain.rows("blocks.3", 0, n), rtol=1e-4, atol=1e-4)


def test_an_image_that_cannot_be_read_keeps_its_place(tmp_path: Path, digits_vit: str) -> None:
    good = list(open_source("digits", None, "test"))[:70]
    bad = Sample("broken", good[0].image[:40], "png", 3)

    class Some:
        classes = tuple("0123456789")

        def __len__(self) -> int:
            return 71

        def __iter__(self):
            yield from (*good[:10], bad, *good[10:])

    write_shards(Some(), tmp_path / "shards", name="some", samples_per_shard=100)
    store = _extract(tmp_path / "shards", digits_vit, tmp_path / "store")
    assert store.manifest.n_failed == 1
    assert np.flatnonzero(~store.ok_samples).tolist() == [10]
    line = store.samples.slice(10, 1).to_pylist()[0]
    assert line["key"] == "broken"
    assert line["status"].startswith("failed: ")
    samples = store.rows("sample", 0, store.layout.n_rows)
    rows = store.rows("blocks.3", 0, store.layout.n_rows)
    assert np.isnan(rows[samples == 10]).all()
    assert np.isfinite(rows[samples != 10]).all()
    assert store.statistics("blocks.3").count == 70 * 17


def test_the_bytes_of_an_image_can_be_shown_again(digits_store: Path, tmp_path: Path) -> None:
    store = Store.open(digits_store)
    for number, sample in enumerate(open_source("digits", None, "test")):
        assert store.image_bytes(number) == sample.image
    with pytest.raises(ValueError, match="give the folder in which the shards are now"):
        store.image_bytes(0, tmp_path)


def test_the_same_command_again_changes_nothing(
    digits_store: Path, digits_shards: Path, digits_vit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Store.open(digits_store).id
    command = f"extract --model {digits_vit} --shards {digits_shards}/*.tar --layers blocks.1,blocks.3 --tokens all"
    assert main([*command.split(), "--out", str(digits_store), "--dtype", "float32"]) == 0
    assert "all committed before" in capsys.readouterr().out
    assert Store.open(digits_store).id == before


def test_another_plan_in_the_same_folder_is_refused_with_what_differs(
    digits_store: Path, digits_shards: Path, digits_vit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"extract --model {digits_vit} --shards {digits_shards}/*.tar --layers blocks.2 --tokens all"
    assert main([*command.split(), "--out", str(digits_store)]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert "layers" in error


def test_a_killed_extraction_resumes_to_the_same_store(digits_shards: Path, digits_vit: str, tmp_path: Path) -> None:
    program = str(Path(sys.executable).parent / "pipeline")
    command = [program, "extract", "--model", digits_vit, "--shards", f"{digits_shards}/*.tar"]
    command += ["--layers", "blocks.3", "--tokens", "all", "--workers", "1"]
    undisturbed = tmp_path / "undisturbed"
    subprocess.run([*command, "--out", str(undisturbed)], check=True, capture_output=True)
    out = tmp_path / "killed"
    process = subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(out.glob("commits/*.json")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # Ray's own processes end with their driver; what they had committed until then stays.
    subprocess.run([*command, "--out", str(out)], check=True, capture_output=True)
    assert Store.open(out).id == Store.open(undisturbed).id


def test_units_that_are_lost_are_made_again(
    digits_store: Path, digits_shards: Path, digits_vit: str, tmp_path: Path
) -> None:
    out = tmp_path / "store"
    shutil.copytree(digits_store, out)
    (out / "manifest.json").unlink()
    for path in (*out.glob("commits/000002.*"), *out.glob("*/c/2"), *out.glob("*/c/2/0")):
        if path.is_file():
            path.unlink()
    command = f"extract --model {digits_vit} --shards {digits_shards}/*.tar --layers blocks.1,blocks.3 --tokens all"
    assert main([*command.split(), "--out", str(out), "--dtype", "float32"]) == 0
    assert Store.open(out).id == Store.open(digits_store).id


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--layers blocks.9", "blocks.0 … norm"),
        ("--layers blocks.1,blocks.1", "each once"),
        ("--layers blocks.1 --tokens registers", "cls|patch|all|mean"),
        ("--layers blocks.1 --workers 0", "--workers of at least 1"),
        ("--layers blocks.1 --weights a --random_weights", "leave one out"),
        ("--layers blocks.1 --dtype int8", "dtype"),
    ],
)
def test_a_bad_value_is_one_line_and_exit_2(
    arguments: str,
    message: str,
    digits_shards: Path,
    digits_vit: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = f"extract --model {digits_vit} --shards {digits_shards}/*.tar --out {tmp_path / 'out'} {arguments}"
    assert main(command.split()) == 2
    captured = capsys.readouterr()
    assert len(captured.err.strip().splitlines()) == 1
    assert message in captured.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "1", "LA", "I;16"])
def test_images_of_any_mode_become_rgb(mode: str) -> None:
    data = io.BytesIO()
    Image.new(mode, (5, 4)).save(data, "TIFF" if mode in ("CMYK", "LA") else "PNG")
    image = decode(data.getvalue())
    assert (image.mode, image.size) == ("RGB", (5, 4))


def test_a_rotated_photograph_is_set_upright() -> None:
    data = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(data, "JPEG", exif=exif)
    assert decode(data.getvalue()).size == (4, 8)


@pytest.mark.parametrize("data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 30])
def test_what_is_no_image_has_a_reason(data: bytes) -> None:
    with pytest.raises(DecodeError, match=r"\S"):
        decode(data)
