"""A run's folder: what it was asked, what it has done, what it has learned. Nothing in it is pickled.

    RUN/config.json                        options, store id, versions
    RUN/metrics.jsonl                      a line every few steps
    RUN/checkpoints/NNNNNNNN.safetensors   all that going on needs: weights, Adam's moments, counts, place in the stream
    RUN/sae.safetensors                    the finished SAE, with its shape in the header

Checkpoints are written under a temporary name, synced, then renamed: one that is there is whole.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sae.errors import RunMismatchError, SaeError
from sae.model import SAEConfig, TopKSAE

_KEPT = 2


class Run:
    """A run's folder.

    Parameters
    ----------
    path
        The folder; made by `begin`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def model_path(self) -> Path:
        """The finished SAE."""
        return self.path / "sae.safetensors"

    @property
    def metrics_path(self) -> Path:
        """The training's log."""
        return self.path / "metrics.jsonl"

    @property
    def finished(self) -> bool:
        """Whether training has ended."""
        return self.model_path.is_file()

    def begin(self, record: dict[str, Any]) -> None:
        """Write what the run was asked, or check that it is the same as before.

        Parameters
        ----------
        record
            Plain JSON; of `options` and `store`, everything must agree.

        Raises
        ------
        RunMismatchError
            If the folder holds another run; names what differs.
        """
        path = self.path / "config.json"
        if not path.exists():
            _write_atomically(path, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())
            return
        there = self.config()
        differing = [
            f"{name}: {there.get(part, {}).get(name)!r} there, {value!r} here"
            for part in ("options", "store")
            for name, value in record[part].items()
            if there.get(part, {}).get(name) != value
        ]
        if differing:
            raise RunMismatchError(
                f"{self.path} holds a run with other options ({'; '.join(differing)}). "
                "Give the options that began it, or another --out"
            )

    def config(self) -> dict[str, Any]:
        """Return what the run was asked.

        Raises
        ------
        SaeError
            If the folder holds no run.
        """
        path = self.path / "config.json"
        try:
            return json.loads(path.read_bytes())
        except FileNotFoundError:
            raise SaeError(
                f"expected a run at '{self.path}', found no config.json there: give the folder of 'sae fit --out'"
            ) from None
        except ValueError as error:
            raise SaeError(f"expected JSON in '{path}', found something else ({error})") from None

    def save_checkpoint(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Write a checkpoint and remove all but the newest two."""
        folder = self.path / "checkpoints"
        _write_atomically(folder / f"{step:08d}.safetensors", _packed(tensors, state))
        for old in sorted(folder.glob("*.safetensors"))[:-_KEPT]:
            old.unlink()

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the tensors and state of the newest checkpoint; None if there is none."""
        paths = sorted((self.path / "checkpoints").glob("*.safetensors"))
        return _unpacked(paths[-1]) if paths else None

    def save_model(self, sae: TopKSAE, facts: dict[str, Any]) -> None:
        """Write the finished SAE."""
        state = {"config": asdict(sae.config), **facts}
        _write_atomically(self.model_path, _packed(dict(sae.state_dict()), state))

    def load_model(self) -> tuple[TopKSAE, dict[str, Any]]:
        """Return the finished SAE and what was written with it.

        Raises
        ------
        SaeError
            If training has not finished, or the file is not an SAE.
        """
        if not self.finished:
            self.config()  # says so if there is no run at all
            raise SaeError(
                f"expected a finished run at '{self.path}', found no {self.model_path.name}: "
                "give the 'sae fit' command again, it goes on from its last checkpoint"
            )
        tensors, state = _unpacked(self.model_path)
        try:
            sae = TopKSAE(SAEConfig(**state.pop("config")), generator=torch.Generator().manual_seed(0))
            sae.load_state_dict(tensors)
        except (KeyError, TypeError, RuntimeError) as error:
            raise SaeError(
                f"expected an SAE in '{self.model_path}', found something else ({error}): train it again"
            ) from None
        return sae, state


def _packed(tensors: dict[str, Tensor], state: dict[str, Any]) -> bytes:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(plain, metadata={"softbudget": json.dumps(state, sort_keys=True)})


def _unpacked(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return tensors, json.loads(file.metadata()["softbudget"])
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise SaeError(f"expected a file of softbudget at '{path}', found a damaged one ({error}): remove it") from None


def _write_atomically(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SaeError(
            f"could not write '{path}' ({len(data)} bytes): {error.strerror or error}. The checkpoint before it is "
            "safe: make room and give the same command again"
        ) from error
