import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stores import spec
from stores.cli import main
from stores.objects import LocalObjects
from stores.writer import StoreWriter
from tests.stores.build import (
    THREE_DTYPES,
    activations_of,
    commit_all,
    files_in,
    flip_byte,
    forge,
    make_plan,
    samples_of,
    write_store,
)


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A command line takes over the root logger, which here belongs to pytest."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in ("pipeline", "sae", "stores")}
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "store"
    write_store(folder, make_plan(layers=THREE_DTYPES), failed=(3,))
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "store"))


def one_line(text: str) -> str:
    lines = text.splitlines()
    assert len(lines) == 1, text
    return lines[0]


# --- info -----------------------------------------------------------------------------------------------------------


def test_info_says_what_a_store_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for line in (
        f"id       {spec.sha256((folder / 'manifest.json').read_bytes())}",
        "images   37 (1 failed), 2 classes",
        "source   1 tar shards in /images",
        "encoder  test (none), weights random 000000000000",
        "tokens   all: 3 an image",
        "rows     111 in 5 units of 24",
        "chunks   19 of 6 rows",
    ):
        assert line in out.splitlines()
    assert re.search(r"layer +blocks\.2: bfloat16 × 3, mean norm \d+\.\d{3}, 0 NaN or Inf", out)


def test_info_says_how_many_bytes_and_objects_there_are(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["info", str(folder)])
    files = {key: data for key, data in files_in(folder).items() if key not in ("zarr.json", "manifest.json")}
    assert f"{sum(map(len, files.values()))} in {len(files)} objects" in capsys.readouterr().out


def test_info_tells_of_nan_and_does_not_refuse_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = StoreWriter.begin(LocalObjects(tmp_path), make_plan(n_samples=8), images_root="/images")
    activations = activations_of(writer.plan, 0)
    activations["blocks.0"][0, 0, :2] = float("nan")
    writer.commit(0, activations, samples_of(writer.plan, 0))
    writer.seal(versions={})
    assert main(["info", str(tmp_path)]) == 0
    assert "2 NaN or Inf" in capsys.readouterr().out


def test_info_needs_nothing_of_source_and_encoder_that_the_format_does_not_demand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make_plan(n_samples=3)
    bare = spec.StorePlan(**{**vars(plan), "source": {}, "encoder": {}})
    write_store(tmp_path / "store", bare)
    assert main(["info", str(tmp_path / "store")]) == 0
    assert "rows     9" in capsys.readouterr().out


# --- verify ---------------------------------------------------------------------------------------------------------


def test_verify_of_a_sound_store_says_so_and_ends_with_0(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(folder)]) == 0
    store_id = spec.sha256((folder / "manifest.json").read_bytes())
    line = one_line(capsys.readouterr().out)
    assert re.fullmatch(rf"{folder}: sound \(\d+ objects, \d+ bytes, id {store_id}\)", line)


def test_verify_of_a_damaged_store_names_each_damaged_object_and_ends_with_1(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_byte(folder / "blocks.0/c/2/0", 3)
    flip_byte(folder / "sample/c/0", 3)
    assert main(["verify", str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [re.search(r"^damaged: '(\S+)' in", line).group(1) for line in lines[:-1]] == [  # type: ignore[union-attr]
        "blocks.0/c/2/0",
        "sample/c/0",
    ]
    assert re.fullmatch(rf"{folder}: 2 of \d+ objects are damaged", lines[-1])


@pytest.mark.parametrize("key", ["commits/000001.json", "commits/000001.parquet", "samples.parquet", "plan.json"])
def test_verify_of_damaged_metadata_ends_with_1_too(folder: Path, capsys: pytest.CaptureFixture[str], key: str) -> None:
    flip_byte(folder / key, 3)
    assert main(["verify", str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"damaged: '{key}'")


def test_verify_tells_its_progress_on_stderr(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["verify", str(folder)])
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("verifying: ") for line in lines)
    assert lines[-1].startswith("verifying: 100% of ")


# --- errors: one line, exit code 2 ----------------------------------------------------------------------------------


def unsealed(path: Path) -> None:
    StoreWriter.begin(LocalObjects(path), make_plan(), images_root="/images")


def cut(path: Path) -> None:
    write_store(path)
    (path / "blocks.0/c/1/0").unlink()


def too_new(path: Path) -> None:
    write_store(path)
    forge(path, lambda manifest: manifest.update(format_version=2))


def a_folder_in_an_objects_place(path: Path) -> None:
    write_store(path)
    (path / "manifest.json").unlink()
    (path / "manifest.json").mkdir()


@pytest.mark.parametrize("command", ["info", "verify"])
@pytest.mark.parametrize(
    ("make", "says"),
    [
        pytest.param(lambda path: None, "found no plan.json there: give the folder", id="nothing"),
        pytest.param(lambda path: path.write_bytes(b""), "found no plan.json there", id="a file"),
        pytest.param(unsealed, "is not sealed: 0 of 5 units are there", id="unsealed"),
        pytest.param(cut, "blocks.0/c/1/0 is missing", id="cut"),
        pytest.param(too_new, "expected store format version 1, found 2", id="too new"),
        pytest.param(a_folder_in_an_objects_place, "is not sealed", id="a folder in the manifest's place"),
    ],
)
def test_a_store_that_cannot_be_used_is_one_line_on_stderr_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, make: object, says: str
) -> None:
    make(tmp_path / "store")  # type: ignore[operator]
    assert main([command, str(tmp_path / "store")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    line = one_line(err)
    assert line.startswith("stores: error: ")
    assert says in line


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        pytest.param([], "{info,verify}", id="no command"),
        pytest.param(["inform"], "inform", id="unknown command"),
        pytest.param(["info"], "store", id="no store"),
        pytest.param(["info", "x", "y"], "y", id="too many arguments"),
        pytest.param(["info", "x", "--frobnicate", "1"], "frobnicate", id="unknown option"),
        pytest.param(["info", "--config", "/nowhere.yaml"], "/nowhere.yaml", id="no such config"),
    ],
)
def test_a_command_line_that_makes_no_sense_is_one_line_on_stderr_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    line = one_line(err)
    assert line.startswith("stores: error: ")
    assert says in line


@pytest.mark.parametrize(
    "text", ["store: [1, 2]\n", "shop: x\n", "store: {\n", "- a\n"], ids=["type", "unknown key", "no YAML", "a list"]
)
def test_a_config_that_makes_no_sense_is_one_line_on_stderr_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert main(["info", "--config", str(tmp_path / "config.yaml")]) == 2
    assert one_line(capsys.readouterr().err).startswith("stores: error: ")


def test_an_interrupted_command_says_so_and_ends_with_130(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("stores.cli.verify", interrupt)
    assert main(["verify", str(folder)]) == 130
    assert "interrupted" in " ".join(capsys.readouterr().err.split())


# --- help and configs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--help"], ["usage: stores", "info", "Say what a store is", "verify", "Check every sha256"]),
        (["info", "--help"], ["store", "The store's folder", "--config", "--print_config"]),
        (["verify", "--help"], ["Check every sha256, crc32c and statistic of a store.", "The store's folder"]),
    ],
    ids=["stores", "info", "verify"],
)
def test_help_is_printed_and_ends_with_0(
    capsys: pytest.CaptureFixture[str], arguments: list[str], says: list[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert [text for text in says if text not in out] == []


def test_print_config_prints_what_would_run_and_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["info", "/nowhere", "--print_config"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == "store: /nowhere\n"


def test_a_config_file_gives_the_options(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(f"store: {folder}\n")
    assert main(["verify", "--config", str(tmp_path / "config.yaml")]) == 0
    assert f"{folder}: sound" in capsys.readouterr().out


def test_the_command_line_overrides_the_config_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("store: /nowhere\n")
    assert main(["verify", "--config", str(tmp_path / "config.yaml"), str(folder)]) == 0
    assert f"{folder}: sound" in capsys.readouterr().out


def test_a_printed_config_can_be_given_back(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["info", str(folder), "--print_config"])
    (tmp_path / "config.yaml").write_text(capsys.readouterr().out)
    assert main(["info", "--config", str(tmp_path / "config.yaml")]) == 0


def test_a_store_in_a_folder_with_spaces_and_umlauts_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = StoreWriter.begin(LocalObjects(tmp_path / "ein Möbel"), make_plan(n_samples=3), images_root="/images")
    commit_all(writer)
    writer.seal(versions={})
    assert main(["verify", str(tmp_path / "ein Möbel")]) == 0
    assert "ein Möbel: sound" in capsys.readouterr().out


def test_the_command_is_a_program() -> None:
    ended = subprocess.run([sys.executable, "-m", "stores.cli", "info", "/nowhere"], capture_output=True, text=True)
    assert ended.returncode == 2
    assert one_line(ended.stderr).startswith("stores: error: expected an activation store at /nowhere")
