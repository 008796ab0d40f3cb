import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from sae.checkpoint import Run
from sae.cli import main
from sae.config import FitConfig
from sae.errors import DivergedError, RunMismatchError, SaeError
from sae.train import Trainer, fit
from tests.stores.build import make_plan, write_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "s"
    plan = make_plan(n_samples=200, samples_per_unit=40, rows_per_chunk=12, layers=(("blocks.0", "float32", 12),))
    write_store(path, plan)
    return path


def _config(store: Path, out: Path, **options: object) -> FitConfig:
    plain: dict[str, object] = {
        "k": 4,
        "latents": 48,
        "batch_size": 64,
        "epochs": 6,
        "checkpoint_every": 10,
        "lr": 3e-3,
    }
    return FitConfig(store=str(store), out=out, **{**plain, **options})  # pyright: ignore[reportArgumentType]


def _weights(path: Path) -> dict[str, torch.Tensor]:
    return Run(path).load_model()[0].state_dict()


def _same(first: Path, second: Path) -> bool:
    a, b = _weights(first), _weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_training_improves_reconstruction(store: Path, tmp_path: Path) -> None:
    fit(_config(store, tmp_path, epochs=30))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["mse"] < 0.8 * lines[0]["mse"]
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})


def test_decoder_rows_have_unit_norm_and_inputs_unit_scale(store: Path, tmp_path: Path) -> None:
    fit(_config(store, tmp_path))
    weights = _weights(tmp_path)
    torch.testing.assert_close(weights["W_d"].norm(dim=1), torch.ones(48))
    assert 1.5 < float(weights["s_in"]) < 2.5  # the store's rows have standard deviation 2


def test_the_same_options_give_the_same_bits_and_another_seed_others(store: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fit(_config(store, tmp_path / name, seed=seed))
    assert _same(tmp_path / "a", tmp_path / "b")
    assert not _same(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize("regularizer", ["none", "off_support", "l1_l2"])
@pytest.mark.parametrize("stop", [1, 10, 23])
def test_a_run_that_stops_after_any_step_ends_with_the_same_bits(
    store: Path, tmp_path: Path, regularizer: str, stop: int
) -> None:
    options = {"regularizer": regularizer, "strength": 0.01, "dead_after": 100}
    fit(_config(store, tmp_path / "whole", **options))

    class Stop(Exception):
        pass

    def on_step(step: int, _n: int, _note: str) -> None:
        if step == stop:
            raise Stop

    with pytest.raises(Stop):
        fit(_config(store, tmp_path / "stopped", **options), on_step)
    result = fit(_config(store, tmp_path / "stopped", **options))
    assert result.n_resumed == stop - stop % 10 - (10 if stop % 10 == 0 else 0)
    assert _same(tmp_path / "whole", tmp_path / "stopped")
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "stopped")]
    assert logs[0] == logs[1]


def test_a_killed_fit_resumes_to_the_same_bits(store: Path, tmp_path: Path) -> None:
    program = str(Path(sys.executable).parent / "sae")
    command = [program, "fit", "--store", str(store), "--k", "4", "--latents", "48", "--batch_size", "64"]
    command += ["--epochs", "60", "--checkpoint_every", "20", "--regularizer", "l1_l2", "--strength", "0.01"]
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    process = subprocess.Popen([*command, "--out", str(tmp_path / "killed")], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed" / "checkpoints").glob("0*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "sae.safetensors").exists()
    subprocess.run([*command, "--out", str(tmp_path / "killed")], check=True, capture_output=True)
    assert _same(tmp_path / "whole", tmp_path / "killed")


def test_a_finished_run_is_not_trained_again(store: Path, tmp_path: Path) -> None:
    fit(_config(store, tmp_path))
    before = (tmp_path / "sae.safetensors").read_bytes()
    result = fit(_config(store, tmp_path))
    assert result.n_resumed == result.n_steps
    assert (tmp_path / "sae.safetensors").read_bytes() == before


def test_other_options_in_the_same_folder_are_refused_with_what_differs(store: Path, tmp_path: Path) -> None:
    fit(_config(store, tmp_path))
    with pytest.raises(RunMismatchError, match="k: 4 there, 5 here"):
        fit(_config(store, tmp_path, k=5))


def test_a_store_that_was_moved_is_the_same_store(store: Path, tmp_path: Path) -> None:
    fit(_config(store, tmp_path / "run"))
    shutil.copytree(store, tmp_path / "moved")
    assert fit(_config(tmp_path / "moved", tmp_path / "run")).seconds == 0


def test_divergence_stops_before_the_weights_are_touched(store: Path, tmp_path: Path) -> None:
    trainer = Trainer(_config(store, tmp_path), d_in=12, n_steps=10, dead_after=100, device=torch.device("cpu"))
    before = {name: value.clone() for name, value in trainer.sae.state_dict().items()}
    x = torch.randn(8, 12)
    x[3, 5] = float("nan")
    with pytest.raises(DivergedError, match="step 0"):
        trainer.update(x)
    assert all(torch.equal(before[name], value) for name, value in trainer.sae.state_dict().items())


def test_a_latent_is_dead_after_so_many_rows_without_selection(store: Path, tmp_path: Path) -> None:
    trainer = Trainer(_config(store, tmp_path), d_in=12, n_steps=10, dead_after=64, device=torch.device("cpu"))
    with torch.no_grad():
        trainer.sae.b_e[:5] = -1e6
    for _ in range(2):
        assert not trainer.dead.any()
        terms = trainer.update(torch.randn(32, 12))
    assert trainer.dead[:5].all()
    assert not trainer.dead[terms.active].any()
    assert trainer.rows_selected[:5].sum() == 0
    assert int(trainer.rows_selected.sum()) == 2 * 32 * 4


def test_the_learning_rate_rises_then_falls_to_zero(store: Path, tmp_path: Path) -> None:
    config = _config(store, tmp_path, warmup=0.1, lr=1e-2)
    trainer = Trainer(config, d_in=12, n_steps=100, dead_after=64, device=torch.device("cpu"))
    rates: list[float] = []
    for trainer.step in range(100):
        rates.append(trainer.lr)
    assert np.argmax(rates) in (9, 10)
    assert rates[0] == pytest.approx(1e-3)
    assert max(rates) == pytest.approx(1e-2)
    assert rates[-1] < 1e-5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--k 0", "--k of at least 1"),
        ("--k 99 --latents 48", "at most --latents"),
        ("--strength -1", "--strength"),
        ("--regularizer l3", "regularizer"),
        ("--layer blocks.7", "blocks.0"),
        ("--tokens register", "register"),
        ("--epochs two", "epochs"),
    ],
)
def test_a_bad_value_is_one_line_and_exit_2(
    arguments: str, message: str, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--store", str(store), "--out", str(tmp_path / "r"), *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert message in error


def test_an_unfinished_run_cannot_be_evaluated(store: Path, tmp_path: Path) -> None:
    with pytest.raises(SaeError, match="expected a run"):
        Run(tmp_path).load_model()
    Run(tmp_path).begin({"options": {}, "store": {}})
    with pytest.raises(SaeError, match="give the 'sae fit' command again"):
        Run(tmp_path).load_model()


def test_a_damaged_model_is_refused(store: Path, tmp_path: Path) -> None:
    fit(_config(store, tmp_path))
    path = tmp_path / "sae.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SaeError, match="damaged"):
        Run(tmp_path).load_model()
