"""Extraction on Ray: deals the plan's missing units to encoder actors. The only file that imports Ray.

    driver: plan - committed units --unit, its images' addresses--> actor --shards--> store
                                   <--receipt: counts only-----------

Activations never pass through Ray: an actor writes to the store, and the driver learns numbers. At most two units an
actor are in flight (one at work, one waiting), so memory does not depend on the size of the data set. Nothing here
remembers progress: the store does, and giving the same command again does what is missing.

Ray Data was rejected: see docs/decisions/0001-ray-actors-not-ray-data.md.
"""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import torch

from pipeline.encoders.base import EncoderRequest
from pipeline.encoders.registry import load_encoder
from pipeline.errors import PipelineError, WeightsError
from pipeline.extract import UnitExtractor
from pipeline.plan import ExtractionPlan
from stores.objects import LocalObjects
from stores.writer import StoreWriter

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
_LIBRARIES = ("softbudget", "numpy", "open_clip_torch", "pillow", "ray", "timm", "torch", "torchvision", "zarr")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where an extraction stands."""

    n_images: int
    """Encoded or found committed."""
    n_units: int
    """Committed."""
    n_failed: int
    """Images of the units committed in this call that could not be read."""


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """What an extraction did.

    Parameters
    ----------
    store_id
        Of the sealed store.
    n_images
        Encoded in this call; those committed before are not counted.
    n_failed
        Images of the whole store that could not be read.
    seconds
        From the first unit dealt to the last one committed.
    """

    store_id: str
    n_images: int
    n_failed: int
    seconds: float


class EncoderActor:
    """An encoder, and the units that it is given one by one; questions are answered meanwhile, in another thread."""

    def __init__(
        self, request: EncoderRequest, out: Path, images_root: Path, batch_size: int, n_threads: int, sha256: str
    ) -> None:
        device = "cuda" if ray.get_gpu_ids() else "cpu"
        torch.set_num_threads(n_threads)
        encoder: Any = load_encoder(request)
        found = encoder.description["weights"]["sha256"]
        if found != sha256:
            raise WeightsError(
                f"expected the weights that the plan was made with (sha256 {sha256[:12]}), found others "
                f"({found[:12]}) on this worker: put the same weights on all machines"
            )
        encoder.model.to(device)
        self._n_images = 0
        self._extractor = UnitExtractor(
            encoder,
            StoreWriter.attach(LocalObjects(out)),
            images_root=images_root,
            batch_size=batch_size,
            device=device,
            n_threads=max(1, n_threads),
        )

    def ready(self) -> None:
        """Return once the encoder is loaded."""

    def extract(self, unit: int, images: Any) -> int:
        """Do a unit; return how many of its images failed."""
        return self._extractor.extract(unit, images, self._count).n_failed

    @ray.method(concurrency_group="questions")
    def n_images(self) -> int:
        """Return how many images have been encoded so far."""
        return self._n_images

    def _count(self, n: int) -> None:
        self._n_images += n


_REMOTE: Any = ray.remote  # Ray's annotations know neither concurrency groups nor what the decorator adds
_ACTOR: Any = _REMOTE(concurrency_groups={"questions": 1})(EncoderActor)


def run_extraction(
    plan: ExtractionPlan,
    request: EncoderRequest,
    *,
    out: Path,
    batch_size: int,
    workers: int | None,
    address: str | None,
    on_progress: Callable[[Progress], None],
) -> Extraction:
    """Do every unit of a plan that the store at `out` lacks, then seal it.

    Parameters
    ----------
    plan
        Made before: this only carries it out.
    request
        What each actor loads.
    out
        The store's folder, which all machines reach under this path.
    batch_size
        Images a forward pass.
    workers
        Actors; None means one a GPU, or one a CPU core.
    address
        Of a Ray cluster; None starts one here.
    on_progress
        Called about twice a second.

    Raises
    ------
    StoreError
        If `out` holds another plan's store, or cannot be written.
    PipelineError
        If a worker fails; what was committed stays.
    """
    writer = StoreWriter.begin(LocalObjects(out), plan.store, images_root=str(plan.images_root))
    missing = [unit for unit in range(plan.store.layout.n_units) if unit not in writer.committed()]
    n_here = sum(len(plan.store.layout.unit_samples(unit)) for unit in missing)
    started = time.monotonic()
    if missing:
        with _cluster(address, workers) as (n_workers, resources):
            sha256 = plan.store.encoder["weights"]["sha256"]
            actors = [
                _ACTOR.options(**resources).remote(
                    request, out.resolve(), plan.images_root, batch_size, _threads(resources), sha256
                )
                for _ in range(min(n_workers, len(missing)))
            ]
            with _clear_errors():
                ray.get([actor.ready.remote() for actor in actors])
                started = time.monotonic()
                for progress in _deal(plan, missing, actors):
                    on_progress(progress)
    seconds = time.monotonic() - started
    store_id = writer.seal(versions={name: version(name) for name in _LIBRARIES})
    n_failed = sum(writer.receipt(unit).n_failed for unit in range(plan.store.layout.n_units))
    return Extraction(store_id=store_id, n_images=n_here, n_failed=n_failed, seconds=seconds)


def _deal(plan: ExtractionPlan, missing: list[int], actors: list[Any]) -> Iterator[Progress]:
    """Deal units to actors, two in flight each; yield where things stand until all are committed."""
    layout = plan.store.layout
    n_before = layout.n_samples - sum(len(layout.unit_samples(unit)) for unit in missing)
    n_units = layout.n_units - len(missing)
    n_failed = 0
    todo = iter(missing)
    in_flight: dict[Any, Any] = {}

    def deal(actor: Any) -> None:
        unit = next(todo, None)
        if unit is not None:
            in_flight[actor.extract.remote(unit, plan.unit_images(unit))] = actor

    for _ in range(2):
        for actor in actors:
            deal(actor)
    while in_flight:
        done, _ = ray.wait(list(in_flight), timeout=_POLL_SECONDS)
        for reference in done:
            n_failed += ray.get(reference)
            n_units += 1
            deal(in_flight.pop(reference))
        n_images = n_before + sum(ray.get([actor.n_images.remote() for actor in actors]))
        yield Progress(n_images=n_images, n_units=n_units, n_failed=n_failed)


@contextlib.contextmanager
def _cluster(address: str | None, workers: int | None) -> Generator[tuple[int, dict[str, float]]]:
    """Yield the number of actors and what each takes of a cluster, ours or one that runs already."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    n_cores = os.cpu_count() or 1
    options: dict[str, Any] = {} if address else {"num_cpus": max(n_cores, workers or 0), "include_dashboard": False}
    try:
        ray.init(address=address or "local", logging_level=logging.ERROR, log_to_driver=False, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PipelineError(
            f"expected a Ray cluster at --address {address}, found none ({reason}): start one with 'ray start --head', "
            "or leave --address out"
        ) from None
    try:
        available = ray.cluster_resources()
        n_gpus, n_cpus = int(available.get("GPU", 0)), int(available.get("CPU", 1))
        if n_gpus:
            n = workers or n_gpus
            yield n, {"num_gpus": min(1.0, n_gpus / n), "num_cpus": max(1, n_cpus // n)}
        else:
            n = workers or n_cpus
            yield n, {"num_cpus": max(1, n_cpus // n)}
    finally:
        ray.shutdown()


def _threads(resources: dict[str, float]) -> int:
    """Threads of an actor: the cores that it takes."""
    return int(resources["num_cpus"])


@contextlib.contextmanager
def _clear_errors() -> Generator[None]:
    """Turn Ray's errors, which carry a remote traceback, into those that the workers raised."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, ValueError):  # PipelineError, StoreError: written for the user
            raise cause from None
        raise PipelineError(f"a worker failed: {type(cause).__name__}: {cause}") from error
    except ray.exceptions.RayActorError as error:
        reason = " ".join(str(error).split())[:300]
        raise PipelineError(
            f"a worker died ({reason}). Units committed before are safe: give the same command again"
        ) from None
