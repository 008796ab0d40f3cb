"""Training an SAE on a store.

The loop is `fit`; what a step changes is in `Trainer`, whose whole state goes into a checkpoint, so that a run that was
stopped at any moment ends with the same bits as one that was not (on one CPU; tests/sae/test_train.py).
"""

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from sae.checkpoint import Run
from sae.config import FitConfig
from sae.errors import DivergedError
from sae.model import TopKSAE
from sae.objectives import Terms, objective
from stores.loader import Loader
from stores.reader import Store
from stores.sampling import ALGORITHM

log = logging.getLogger(__name__)

MAX_DEAD_AFTER = 10_000_000

# Options that change how a run is carried out, not what it computes.
_FREE_OPTIONS = frozenset({"store", "out", "checkpoint_every", "log_every", "device"})


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """What `fit` did.

    Parameters
    ----------
    n_steps
        Steps of the whole run.
    n_resumed
        Of which were done in earlier calls.
    seconds
        Of this call's training.
    """

    n_steps: int
    n_resumed: int
    seconds: float


class Trainer:
    """An SAE with its optimiser and its dead-latent counts: what a step changes.

    Parameters
    ----------
    config
        Of the run.
    d_in
        Width of the activations.
    n_steps
        Of the whole run, for the learning rate's schedule.
    dead_after
        Rows without being selected after which a latent is dead.
    device
        Where to train.
    """

    def __init__(self, config: FitConfig, *, d_in: int, n_steps: int, dead_after: int, device: torch.device) -> None:
        self.config = config
        self.objective = config.objective
        self.n_steps = n_steps
        self.dead_after = dead_after
        generator = torch.Generator().manual_seed(config.seed)
        self.sae = TopKSAE(config.model(d_in), generator=generator).to(device)
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=config.peak_lr)
        self.step = 0
        # Per latent: rows since it was last selected, and rows that have selected it.
        self.rows_since = torch.zeros(config.latents, dtype=torch.int64, device=device)
        self.rows_selected = torch.zeros(config.latents, dtype=torch.int64, device=device)

    @property
    def dead(self) -> Tensor:
        """Bool (M,): latents that count as dead now."""
        return self.rows_since >= self.dead_after

    @property
    def lr(self) -> float:
        """The learning rate of the next step: a linear warm-up, then a cosine down to 0."""
        n_warmup = int(self.config.warmup * self.n_steps)
        if self.step < n_warmup:
            return self.config.peak_lr * (self.step + 1) / n_warmup
        done = (self.step - n_warmup) / max(self.n_steps - n_warmup, 1)
        return self.config.peak_lr * 0.5 * (1 + math.cos(math.pi * done))

    def update(self, x: Tensor) -> Terms:
        """Take a step on raw activations (N, D).

        Raises
        ------
        DivergedError
            If the loss or a gradient is not finite; weights and optimiser are as before the step.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        terms = objective(self.sae, self.sae.normalise(x), self.objective, self.dead)
        self.optimizer.zero_grad(set_to_none=True)
        terms.loss.backward()
        self.sae.remove_parallel_gradient_()
        norm = torch.nn.utils.clip_grad_norm_(self.sae.parameters(), self.config.clip_norm)
        if not (math.isfinite(terms.loss.item()) and math.isfinite(norm.item())):
            raise DivergedError(
                f"step {self.step}: expected a finite loss and gradient, found {terms.loss.item()} and {norm.item()}: "
                "lower --lr or --strength"
            )
        self.optimizer.step()
        self.sae.renormalise_decoder_()
        selected = terms.selection.indices[terms.selection.kept]
        self.rows_selected += torch.bincount(selected, minlength=self.config.latents)
        self.rows_since += len(x)
        self.rows_since[terms.active] = 0
        self.step += 1
        return terms

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and numbers that `restore` takes."""
        tensors = {f"sae.{name}": value for name, value in self.sae.state_dict().items()}
        for name, parameter in self.sae.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"adam.{name}.{key}"] = value
        tensors["rows_since"] = self.rows_since
        tensors["rows_selected"] = self.rows_selected
        return tensors, {"step": self.step}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Go back to a `state`."""
        self.sae.load_state_dict({k.removeprefix("sae."): v for k, v in tensors.items() if k.startswith("sae.")})
        for name, parameter in self.sae.named_parameters():
            prefix = f"adam.{name}."
            # Adam's step count stays on the CPU, its moments are where the parameter is.
            self.optimizer.state[parameter] = {
                key.removeprefix(prefix): value if value.ndim == 0 else value.to(parameter.device)
                for key, value in tensors.items()
                if key.startswith(prefix)
            }
        self.rows_since.copy_(tensors["rows_since"])
        self.rows_selected.copy_(tensors["rows_selected"])
        self.step = int(state["step"])


def fit(config: FitConfig, on_step: Callable[[int, int, str], None] = lambda step, n_steps, note: None) -> FitResult:
    """Train an SAE, or go on with a run that was stopped.

    Parameters
    ----------
    config
        What to do.
    on_step
        Called after each step with its number, the number of steps, and a few words.

    Raises
    ------
    StoreError
        If the store cannot be used.
    RunMismatchError
        If `config.out` holds another run.
    DivergedError
        If training diverges; names the last checkpoint.
    """
    store = Store.open(config.store)
    loader = Loader(
        store,
        layer=config.layer,
        batch_size=config.batch_size,
        seed=config.seed,
        token_kinds=None if config.tokens is None else (config.tokens,),
        chunks_per_pool=config.chunks_per_pool,
    )
    run = Run(config.out)
    run.begin(_record(config, store, loader))
    n_steps = config.epochs * loader.n_batches
    if run.finished:
        return FitResult(n_steps=n_steps, n_resumed=n_steps, seconds=0.0)

    trainer = Trainer(
        config,
        d_in=loader.layer.width,
        n_steps=n_steps,
        dead_after=config.dead_after or min(MAX_DEAD_AFTER, loader.n_rows),
        device=_device(config.device),
    )
    statistics = store.statistics(loader.layer.name)
    trainer.sae.set_normalisation(statistics.mean, statistics.variance)
    checkpoint = run.load_checkpoint()
    if checkpoint is not None:
        trainer.restore(*checkpoint)
        log.info("going on from step %d of %d", trainer.step, n_steps)
    n_resumed = trainer.step
    _drop_lines_after(run, trainer.step)

    started = time.monotonic()
    _train(trainer, loader, run, on_step)
    run.save_model(trainer.sae, {"layer": loader.layer.name, "rows_selected": trainer.rows_selected.tolist()})
    return FitResult(n_steps=n_steps, n_resumed=n_resumed, seconds=time.monotonic() - started)


def _train(trainer: Trainer, loader: Loader, run: Run, on_step: Callable[[int, int, str], None]) -> None:
    config, device = trainer.config, trainer.rows_since.device
    last_checkpoint = trainer.step
    with run.metrics_path.open("a") as lines:
        while trainer.step < trainer.n_steps:
            epoch, start = divmod(trainer.step, loader.n_batches)
            for batch in loader.epoch(epoch, start=start):
                x = batch.x.to(device)
                try:
                    terms = trainer.update(x)
                except DivergedError as error:
                    raise DivergedError(
                        f"{error}. The last good checkpoint is that of step {last_checkpoint}"
                    ) from None
                if trainer.step % config.log_every == 0 or trainer.step == trainer.n_steps:
                    line = _measure(trainer, terms, epoch)
                    lines.write(json.dumps(line) + "\n")
                    on_step(trainer.step, trainer.n_steps, f"R² {line['r2']:.3f}, {line['n_dead']} dead")
                else:
                    on_step(trainer.step, trainer.n_steps, "")
                if trainer.step % config.checkpoint_every == 0:
                    lines.flush()
                    run.save_checkpoint(trainer.step, *trainer.state())
                    last_checkpoint = trainer.step


@torch.no_grad()
def _measure(trainer: Trainer, terms: Terms, epoch: int) -> dict[str, float | int]:
    """Return a line of metrics.jsonl: figures of the last batch, before its step."""
    return {
        "step": trainer.step,
        "epoch": epoch,
        "lr": trainer.optimizer.param_groups[0]["lr"],
        "loss": terms.loss.item(),
        "mse": terms.mse.item(),
        "aux": terms.aux.item(),
        "off_support": terms.off_support.item(),
        "l1_l2": terms.l1_l2.item(),
        "r2": 1 - terms.mse.item(),  # E‖x̃‖² = D: the share of variance explained, up to the batch's own
        "l0": terms.selection.kept.sum(dim=1).float().mean().item(),
        "n_active": int(terms.active.sum()),
        "n_dead": int(trainer.dead.sum()),
    }


def _record(config: FitConfig, store: Store, loader: Loader) -> dict[str, Any]:
    options = {name: value for name, value in asdict(config).items() if name not in _FREE_OPTIONS}
    return {
        "options": {**options, "layer": loader.layer.name},
        "store": {"id": store.id, "stream": ALGORITHM},
        "store_uri": store.objects.uri,
        "encoder": store.plan.encoder,
        "versions": {name: version(name) for name in ("softbudget", "numpy", "torch")},
    }


def _drop_lines_after(run: Run, step: int) -> None:
    """Forget what was logged after the checkpoint that training goes on from: it comes again."""
    if not run.metrics_path.exists():
        return
    kept: list[str] = []
    for line in run.metrics_path.read_text().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:  # the line that was being written
            break
    run.metrics_path.write_text("".join(kept))


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
