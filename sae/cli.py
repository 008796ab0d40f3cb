"""`sae fit | eval | report`: parses arguments and prints; the work is elsewhere."""

import json
import sys

from rich.console import Console
from rich.table import Table

from sae.config import EvalConfig, FitConfig, ReportConfig
from sae.errors import SaeError
from stores.commandline import Command, progress_bar, run_commands
from stores.errors import StoreError


def fit_command(config: FitConfig) -> int:
    """Train an SAE."""
    from sae.train import fit

    with progress_bar("training", 1.0, unit="steps") as advance:

        def on_step(_step: int, n_steps: int, note: str) -> None:
            advance(1 / n_steps, note)

        result = fit(config, on_step)
    if result.n_resumed == result.n_steps:
        print(f"{config.out}: trained before ({result.n_steps} steps)")
        return 0
    n_here = result.n_steps - result.n_resumed
    rate = n_here * config.batch_size / result.seconds
    print(f"{config.out}: {result.n_steps} steps ({n_here} now in {result.seconds:.1f} s, {rate:,.0f} rows/s)")
    return 0


def eval_command(config: EvalConfig) -> int:
    """Evaluate an SAE on a store."""
    from sae.evaluate import evaluate
    from stores.reader import Store

    store = Store.open(config.store)
    embeddings = None if config.embeddings is None else Store.open(config.embeddings)
    with progress_bar("evaluating", store.layout.n_rows, unit="rows") as advance:
        result = evaluate(
            config.run,
            store,
            tokens=config.tokens,
            batch_size=config.batch_size,
            embeddings=embeddings,
            on_rows=advance,
        )
    metrics = result.to_json()
    out = config.out or config.run / "eval"
    out.mkdir(parents=True, exist_ok=True)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    for group in ("reconstruction", "latents", "monosemanticity", "purity"):
        for name, value in (metrics[group] or {}).items():
            print(f"{group:<16}{name:<17}{value:.4f}" if isinstance(value, float) else f"{group:<16}{name:<17}{value}")
    return 0


def report_command(config: ReportConfig) -> int:
    """Compare several SAEs on a store: a table, and an HTML page with their top images."""
    from sae.evaluate import evaluate
    from sae.report.html import table_of, write_report
    from stores.reader import Store

    store = Store.open(config.store)
    runs = config.run_paths
    with progress_bar("evaluating", store.layout.n_rows * len(runs), unit="rows") as advance:
        evaluations = [
            evaluate(path, store, tokens=config.tokens, batch_size=config.batch_size, on_rows=advance) for path in runs
        ]
    write_report(
        evaluations,
        store,
        config.out,
        images_root=config.images,
        n_latents=config.n_latents,
        n_images=config.n_images,
    )
    header, *lines = table_of(evaluations)
    table = Table(box=None, pad_edge=False)
    for i, title in enumerate(header):
        table.add_column(title, justify="left" if i == 0 else "right")
    for line in lines:
        table.add_row(*line)
    Console(width=120).print(table)
    print(f"{config.out}: {len(runs)} runs on {store.layout.n_samples} images")
    return 0


COMMANDS = (
    Command("fit", "Train a Top-k SAE on an activation store. The same command resumes.", FitConfig, fit_command),
    Command("eval", "Evaluate a trained SAE on a store: metrics.json and a table.", EvalConfig, eval_command),
    Command("report", "Compare trained SAEs: a table, and an HTML page with top images.", ReportConfig, report_command),
)


def main(argv: list[str] | None = None) -> int:
    """Run a command line."""
    return run_commands(
        "sae", "Activations to a dictionary: train, evaluate and compare SAEs.", COMMANDS, (SaeError, StoreError), argv
    )


if __name__ == "__main__":
    sys.exit(main())
