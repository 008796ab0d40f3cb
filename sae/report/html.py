"""One self-contained HTML page: a table of metrics, and the same latents of every run with their top images.

Runs of one seed begin with the same weights and see the same batches, so a latent's number means the same in each: the
page shows latents side by side. Which ones is drawn by lot among those that fire in every run: no picking of pretty
ones.
"""

import base64
import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from sae.errors import SaeError
from sae.evaluate import Evaluation
from stores.reader import Store

_MIME = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp", b"GIF8": "image/gif"}


@dataclass(frozen=True)
class Column:
    """A column of the metrics table: its name, how to print a value, and which direction is better (0: neither)."""

    name: str
    title: str
    precision: int
    better: int


COLUMNS = (
    Column("r2", "R²", 3, 1),
    Column("ms_mean", "mean MS", 3, 1),
    Column("ms_median", "median MS", 3, 1),
    Column("n_dead", "dead", 0, -1),
    Column("purity", "purity", 3, 1),
    Column("l0", "L0", 1, 0),
    Column("effective", "effective latents", 1, -1),
)


def name_of(evaluation: Evaluation) -> str:
    """Return a run's name: its regularizer and strength."""
    options = evaluation.options
    return (
        options["regularizer"]
        if options["regularizer"] == "none"
        else f"{options['regularizer']} {options['strength']:g}"
    )


def figures_of(evaluation: Evaluation) -> dict[str, float | None]:
    """Return the figures of the metrics table, by column name."""
    return {
        "r2": evaluation.reconstruction.r2,
        "ms_mean": evaluation.monosemanticity.mean,
        "ms_median": evaluation.monosemanticity.median,
        "n_dead": evaluation.use.n_dead,
        "purity": None if evaluation.purity is None else evaluation.purity.mean_binary,
        "l0": evaluation.use.l0,
        "effective": evaluation.effective_latents,
    }


def table_of(evaluations: Sequence[Evaluation]) -> list[list[str]]:
    """Return the metrics table as text, a header and a line a run."""
    lines = [["regularizer", *(column.title for column in COLUMNS)]]
    for evaluation in evaluations:
        figures = figures_of(evaluation)
        lines.append([name_of(evaluation), *(_text(figures[column.name], column) for column in COLUMNS)])
    return lines


def write_report(
    evaluations: Sequence[Evaluation],
    store: Store,
    out: Path,
    *,
    images_root: Path | None,
    n_latents: int,
    n_images: int,
) -> None:
    """Write the page.

    Parameters
    ----------
    evaluations
        Of several runs, all on `store` and the same rows.
    store
        Whose images are shown.
    out
        The file.
    images_root
        Folder of the tar shards, where they have moved.
    n_latents, n_images
        How many to show, and how many images for each.

    Raises
    ------
    StoreError
        If the images are not where they were.
    """
    shown = _draw_latents(evaluations, n_latents)
    images: dict[int, str] = {}
    rows = [
        {
            "latent": latent,
            "runs": [
                _top_images(evaluation, store, latent, n_images, images, images_root) for evaluation in evaluations
            ],
        }
        for latent in shown
    ]
    base = figures_of(evaluations[0])
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        (files("sae.report") / "report.html.j2").read_text()
    )
    page = template.render(
        columns=COLUMNS,
        runs=[
            {
                "name": name_of(evaluation),
                "path": str(evaluation.run),
                "options": evaluation.options,
                "cells": [_cell(figures_of(evaluation)[c.name], base[c.name], c, i == 0) for c in COLUMNS],
            }
            for i, evaluation in enumerate(evaluations)
        ],
        latents=rows,
        images=images,
        store=store,
        first=evaluations[0],
        floor=evaluations[0].monosemanticity.floor,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page)


def _draw_latents(evaluations: Sequence[Evaluation], n: int) -> list[int]:
    """Return latents by lot among those that fire on enough images in every run."""
    n_firings = np.stack([evaluation.codes.n_firings() for evaluation in evaluations])
    if len({evaluation.codes.n_latents for evaluation in evaluations}) > 1:
        raise SaeError("expected runs with as many latents each, found different --latents: report them apart")
    fires = np.flatnonzero((n_firings >= 2).all(axis=0))
    drawn = np.random.default_rng(0).permutation(fires)[:n]
    return sorted(int(latent) for latent in drawn)


def _top_images(
    evaluation: Evaluation, store: Store, latent: int, n: int, images: dict[int, str], root: Path | None
) -> dict[str, Any]:
    """Return what the page shows of a latent in a run; add the images that it needs to `images`."""
    column = evaluation.codes.matrix[:, [latent]].tocoo()
    values, samples = column.data, evaluation.samples[column.coords[0]]
    # An image with several rows counts once, by its strongest one.
    best: dict[int, float] = {}
    for sample, value in zip(samples.tolist(), values.tolist(), strict=True):
        best[sample] = max(value, best.get(sample, -np.inf))
    top = sorted(best, key=lambda sample: (-best[sample], sample))[:n]
    for sample in top:
        if sample not in images:
            data = store.image_bytes(sample, root)
            images[sample] = f"data:{_mime(data)};base64,{base64.b64encode(data).decode()}"
    labels = store.labels
    score = float(evaluation.monosemanticity.scores[latent])
    label = -1 if evaluation.purity is None else int(evaluation.purity.label[latent])
    return {
        "top": [
            {"sample": sample, "value": best[sample], "class": _class(store, int(labels[sample]))} for sample in top
        ],
        "n_images": len(best),
        "score": None if np.isnan(score) else score,
        "class": _class(store, label),
        "purity": None if evaluation.purity is None else float(evaluation.purity.binary[latent]),
    }


def _class(store: Store, label: int) -> str:
    if label < 0:
        return ""
    return store.classes[label] if label < len(store.classes) else str(label)


def _mime(data: bytes) -> str:
    return next((mime for magic, mime in _MIME.items() if data.startswith(magic)), "application/octet-stream")


def _text(value: float | None, column: Column) -> str:
    return "–" if value is None or np.isnan(value) else f"{value:.{column.precision}f}"


def _cell(value: float | None, base: float | None, column: Column, is_base: bool) -> dict[str, str]:
    """Return a cell's text, its difference from the first run's, and whether that is better or worse."""
    if value is None or base is None or is_base:
        return {"text": _text(value, column), "difference": "", "tone": ""}
    difference = value - base
    good = round(difference, column.precision) * column.better  # what prints as 0 is neither
    return {
        "text": _text(value, column),
        "difference": f"{difference:+.{column.precision}f}",
        "tone": "better" if good > 0 else "worse" if good < 0 else "",
    }
