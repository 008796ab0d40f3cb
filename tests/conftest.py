"""What all tests share: where the repository and the data beside it are, and small real inputs made once."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach a hub


@pytest.fixture(scope="session")
def digits_vit() -> str:
    """The mini ViT, as a user names it."""
    return f"local-dir:{ROOT / 'examples' / 'digits_vit'}"


@pytest.fixture(scope="session")
def digits_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits' test split as tar shards of 100 images."""
    from pipeline.shards import write_shards
    from pipeline.sources import open_source

    out = tmp_path_factory.mktemp("shards")
    write_shards(open_source("digits", None, "test"), out, name="digits-test", samples_per_shard=100)
    return out


@pytest.fixture(scope="session")
def digits_store(digits_shards: Path, digits_vit: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed store of the digits' test split, made by the command, on Ray."""
    from pipeline.cli import main

    out = tmp_path_factory.mktemp("stores") / "digits"
    command = f"extract --model {digits_vit} --shards {digits_shards}/*.tar --layers blocks.1,blocks.3 --tokens all"
    assert main([*command.split(), "--out", str(out), "--dtype", "float32"]) == 0
    return out
