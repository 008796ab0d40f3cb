"""The README's commands, run as they stand there."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

BLOCKS = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.M | re.S)


def _run(script: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=cwd,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_first_block_is_the_two_commands() -> None:
    assert [line.split("#")[0].split() for line in BLOCKS[0].splitlines()] == [["make", "demo"], ["make", "test"]]


def test_the_commands_work_one_after_another(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples" / "digits_vit", tmp_path / "examples" / "digits_vit")
    result = _run(BLOCKS[1], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "sound" in result.stdout
    metrics = json.loads((tmp_path / "work" / "run" / "eval" / "metrics.json").read_text())
    assert metrics["reconstruction"]["r2"] > 0.5
    assert metrics["monosemanticity"]["mean"] > metrics["monosemanticity"]["floor"]
    page = (tmp_path / "work" / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 12
    assert "http://" not in page
    assert "https://" not in page


def test_the_demo_shows_that_monosemanticity_rises_at_little_cost(tmp_path: Path) -> None:
    result = _run(f"{sys.executable} {ROOT / 'examples' / 'demo.py'} --out demo", tmp_path)
    assert result.returncode == 0, result.stderr
    found = {
        name: json.loads((tmp_path / "demo" / "runs" / name / "eval" / "metrics.json").read_text())
        for name in ("none", "off_support", "l1_l2")
    }
    base = found["none"]
    for name in ("off_support", "l1_l2"):
        assert found[name]["monosemanticity"]["mean"] > base["monosemanticity"]["mean"] + 0.05
        assert found[name]["reconstruction"]["r2"] > base["reconstruction"]["r2"] - 0.02
    assert re.search(r"^together\s+[\d.]+ s$", result.stdout, flags=re.M)


@pytest.mark.parametrize("program", ["pipeline", "stores", "sae"])
def test_help_names_every_command(program: str, tmp_path: Path) -> None:
    result = _run(f"{program} --help", tmp_path)
    assert result.returncode == 0
    for command in {"pipeline": ["shards", "models", "extract"], "stores": ["info", "verify"]}.get(
        program, ["fit", "eval", "report"]
    ):
        assert command in result.stdout


def test_a_printed_config_can_be_given_back(tmp_path: Path) -> None:
    first = _run("sae fit --store s --out r --k 7 --print_config", tmp_path)
    (tmp_path / "c.yaml").write_text(first.stdout)
    second = _run("sae fit --config c.yaml --latents 99 --print_config", tmp_path)
    assert second.returncode == 0, second.stderr
    assert "k: 7" in second.stdout
    assert "latents: 99" in second.stdout
