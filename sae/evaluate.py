"""Evaluating a trained SAE on a store: one pass, all metrics of docs/objective.md that one SAE has alone."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae.checkpoint import Run
from sae.errors import SaeError
from sae.metrics.activation_profile import ActivationProfileMeter
from sae.metrics.codes import SparseCodes
from sae.metrics.latents import EffectiveLatentsMeter, LatentUse, LatentUseMeter
from sae.metrics.monosemanticity import Monosemanticity, monosemanticity
from sae.metrics.purity import Purity, purity
from sae.metrics.reconstruction import Reconstruction, ReconstructionMeter
from sae.model import Selection
from stores.loader import Loader
from stores.reader import Store


@dataclass(frozen=True)
class Evaluation:
    """Metrics of an SAE on the rows of a store, and the codes that they come from.

    Parameters
    ----------
    run
        Folder of the run.
    options
        What the run was asked.
    store_id, tokens
        The rows: of which store, and of which kinds.
    codes
        (N, M), a line a row.
    samples
        int64 (N,): each row's image.
    reconstruction, use, monosemanticity, purity
        See sae.metrics; `purity` is None where no image has a label.
    effective_latents
        Mean of (‖a‖₁/‖a‖₂)².
    profile
        Mean of the r-th largest activation, (M,).
    n_never_trained
        Latents that no row selected in training.
    embeddings_id
        The store whose embeddings judged monosemanticity.
    """

    run: Path
    options: dict[str, Any]
    store_id: str
    tokens: tuple[str, ...]
    codes: SparseCodes
    samples: np.ndarray
    reconstruction: Reconstruction
    use: LatentUse
    monosemanticity: Monosemanticity
    purity: Purity | None
    effective_latents: float
    profile: np.ndarray
    n_never_trained: int
    embeddings_id: str

    def to_json(self) -> dict[str, Any]:
        """Return the metrics as plain JSON: what metrics.json holds."""
        scores = self.monosemanticity
        return {
            "run": str(self.run),
            "options": self.options,
            "store": {"id": self.store_id, "tokens": list(self.tokens), "n_rows": self.use.n_rows},
            "reconstruction": {
                "r2": self.reconstruction.r2,
                "fvu": self.reconstruction.fvu,
                "cosine": self.reconstruction.cosine,
                "nmse": self.reconstruction.nmse,
            },
            "latents": {
                "l0": self.use.l0,
                "n_dead": self.use.n_dead,
                "n_never_trained": self.n_never_trained,
                "n_dense": self.use.n_dense,
                "effective": self.effective_latents,
            },
            "monosemanticity": {
                "mean": scores.mean,
                "median": scores.median,
                "floor": scores.floor,
                "n_without_score": scores.n_without_score,
                "embeddings": self.embeddings_id,
            },
            "purity": None
            if self.purity is None
            else {
                "binary": self.purity.mean_binary,
                "weighted": self.purity.mean_weighted,
                "n_active": self.purity.n_active,
            },
            "activation_profile": self.profile.tolist(),
        }


@torch.inference_mode()
def evaluate(
    run_path: Path,
    store: Store,
    *,
    tokens: str | None,
    batch_size: int,
    embeddings: Store | None = None,
    on_rows: Callable[[int], None] = lambda n: None,
) -> Evaluation:
    """Evaluate a finished run on a store.

    Parameters
    ----------
    run_path
        Folder of the run.
    store
        Must have the run's layer, in the same width, from the same weights.
    tokens
        Kind of rows, or `all`; None takes `cls` where the store has it, else all.
    batch_size
        Rows encoded at a time.
    embeddings
        A store with one row an image, whose embeddings judge monosemanticity; None takes the rows themselves.
    on_rows
        Called with the number of rows of each batch.

    Raises
    ------
    SaeError
        If the run is not finished, or the store is another encoder's.
    StoreError
        If the store has no such rows.
    """
    run = Run(run_path)
    sae, facts = run.load_model()
    config = run.config()
    _check_same_encoder(run, config, store)
    layer = store.layer(facts["layer"])
    loader = Loader(store, layer=layer.name, batch_size=batch_size, token_kinds=_token_kinds(store, tokens))

    rows, use = ReconstructionMeter(), LatentUseMeter(sae.config.n_latents)
    effective, profile = EffectiveLatentsMeter(), ActivationProfileMeter(sae.config.n_latents)
    selections: list[Selection] = []
    samples: list[np.ndarray] = []
    own_embeddings: list[np.ndarray] = []
    for batch in loader.in_order():
        a = sae.activate(sae.pre_activations(sae.normalise(batch.x)))
        selection = sae.select(a)
        rows.update(batch.x.numpy(), sae.denormalise(sae.decode(selection)).numpy())
        effective.update(a.numpy())
        profile.update(a.numpy())
        selections.append(selection)
        samples.append(batch.samples)
        if embeddings is None:
            own_embeddings.append(batch.x.numpy())
        on_rows(len(batch.samples))
    codes = SparseCodes.from_selections(selections, sae.config.n_latents)
    use.update(codes)
    of_rows = np.concatenate(samples)
    judged_by = np.concatenate(own_embeddings) if embeddings is None else _embeddings_of(embeddings, store, of_rows)
    labels = store.labels[of_rows]
    return Evaluation(
        run=run_path,
        options=config["options"],
        store_id=store.id,
        tokens=tuple(sorted({store.plan.tokens.kind(int(p)) for p in loader.positions})),
        codes=codes,
        samples=of_rows,
        reconstruction=rows.result(),
        use=use.result(),
        monosemanticity=monosemanticity(codes, judged_by),
        purity=purity(codes, labels) if (labels >= 0).any() else None,
        effective_latents=effective.result(),
        profile=profile.result(),
        n_never_trained=sum(n == 0 for n in facts["rows_selected"]),
        embeddings_id=(embeddings or store).id,
    )


def _token_kinds(store: Store, tokens: str | None) -> tuple[str, ...] | None:
    if tokens is None:
        kinds = {store.plan.tokens.kind(position) for position in store.plan.tokens.positions}
        return ("cls",) if "cls" in kinds else None
    return None if tokens == "all" else (tokens,)


def _check_same_encoder(run: Run, config: dict[str, Any], store: Store) -> None:
    trained_on, here = config["encoder"], store.plan.encoder
    if trained_on["weights"]["sha256"] != here["weights"]["sha256"]:
        raise SaeError(
            f"expected a store of the encoder that '{run.path}' was trained on ({trained_on['model']}, weights "
            f"{trained_on['weights']['sha256'][:12]}), found {here['model']}, weights {here['weights']['sha256'][:12]}"
            ": evaluate on activations of the same model"
        )
    if trained_on["preprocessing"] != here["preprocessing"]:
        raise SaeError(
            f"expected a store with the preprocessing that '{run.path}' was trained on "
            f"({trained_on['preprocessing']}), found {here['preprocessing']}"
        )


def _embeddings_of(embeddings: Store, store: Store, samples: np.ndarray) -> np.ndarray:
    """Return the embedding of each row's image from another store, matched by the images' keys; (N, D')."""
    if len(embeddings.plan.tokens.positions) != 1:
        raise SaeError(
            f"expected one row an image in {embeddings.objects.uri}, found {len(embeddings.plan.tokens.positions)}: "
            "extract it with --tokens cls or mean"
        )
    loader = Loader(embeddings, batch_size=4096)
    batches = list(loader.in_order())
    keys = embeddings.samples["key"].to_pylist()
    place = {keys[sample]: row for row, sample in enumerate(np.concatenate([batch.samples for batch in batches]))}
    wanted = store.samples["key"].to_pylist()
    missing = [wanted[sample] for sample in np.unique(samples) if wanted[sample] not in place]
    if missing:
        raise SaeError(
            f"expected every image of {store.objects.uri} in {embeddings.objects.uri}, found {len(missing)} missing "
            f"(first: {missing[0]}): extract both from the same shards"
        )
    vectors = np.concatenate([batch.x.numpy() for batch in batches])
    return vectors[[place[wanted[sample]] for sample in samples]]
