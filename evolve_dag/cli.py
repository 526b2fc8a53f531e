"""``evolve``: run, look at and question experiments. Heavy libraries are imported inside the commands that need them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evolve_dag.errors import ConfigError, EvolveError

if TYPE_CHECKING:
    from rich.console import Console

    from evolve_dag.reporting.summary import LineageSummary
    from evolve_dag.store import Store

USAGE, FAILED, INTERRUPTED = 2, 1, 130

app = typer.Typer(
    name="evolve",
    help="Self-evolving LLM agents: roll out, extract experience, distill it, evaluate, promote; again.",
    epilog="A first run: evolve run configs/pocket.yaml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
pocket = typer.Typer(help="The pocket policy and its world: rebuild the weights, watch an episode.", no_args_is_help=True)
app.add_typer(pocket, name="pocket")

StoreOption = Annotated[
    Path | None, typer.Option("--store", metavar="DIR", help="Folder of the artifacts. Default: EVOLVE_STORE, else .evolve")
]
ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="Experiment file, e.g. configs/pocket.yaml")]
LineageArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="Experiment file, or the name of an experiment")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON")]


def main() -> None:
    """Entry point: turns the project's own errors into one clean message and an exit code."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars would run through ours
    try:
        app()
    except EvolveError as error:
        if os.environ.get("EVOLVE_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USAGE if isinstance(error, ConfigError) else FAILED)
    except BrokenPipeError:  # `evolve ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)


@app.command()
def run(
    config: ConfigArgument,
    iterations: Annotated[
        int | None, typer.Option(min=1, max=99, metavar="K", help="Bring iterations 1..K up to date. Default: the file's")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Another seed than the file's; its lineage is named <experiment>-s<N>"),
    ] = None,
    store: StoreOption = None,
) -> None:
    """Run an experiment; what is up to date is not computed again.

    A run that was stopped or killed goes on where it was: give the same command again.
    """
    from evolve_dag.assets import launch
    from evolve_dag.reporting.report import write_report
    from evolve_dag.reporting.summary import summarize
    from evolve_dag.reporting.table import print_summary

    with _interruptible("run the same command to resume"):
        result = launch.run(config, seed=seed, iterations=iterations, root=_root(store), console=_console(stderr=True))
        opened = _store(store)
        summary = summarize(opened, result.experiment.experiment, config=str(config), recomputed=result.recomputed)
        console = _console()
        if result.runs == 0:
            which = "iteration 1 is" if result.iterations == 1 else f"iterations 1 to {result.iterations} are"
            console.print(f"nothing to recompute: {which} up to date", highlight=False)
        print_summary(summary, console)
        path = write_report([summary], _report_path([summary], opened))
        print(f"report: {path}")


@app.command()
def status(config: LineageArgument, json: JsonOption = False, store: StoreOption = None) -> None:
    """Results, digests and costs of an experiment, iteration by iteration."""
    from evolve_dag.reporting.summary import status_json
    from evolve_dag.reporting.table import print_summary

    summary = _summary(config, _store(store))
    if json:
        _print_json(status_json(summary))
    else:
        print_summary(summary, _console())


@app.command()
def report(
    configs: Annotated[list[str], typer.Argument(metavar="CONFIG...", help="Experiment files or names, compared side by side")],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Default: <store>/reports/<name>.html")] = None,
    store: StoreOption = None,
) -> None:
    """Write an HTML report with the curves of one or several experiments."""
    from evolve_dag.reporting.report import write_report

    opened = _store(store)
    summaries = [_summary(config, opened) for config in configs]
    print(write_report(summaries, out or _report_path(summaries, opened)))


@app.command()
def trace(
    identifier: Annotated[
        str, typer.Argument(metavar="ID", help="A digest (six characters or more), an item's id, or <task>#<rollout>")
    ],
    json: JsonOption = False,
    store: StoreOption = None,
) -> None:
    """Walk an artifact, a principle or a score row back to its origins and forward to its uses."""
    from evolve_dag.trace import render
    from evolve_dag.trace import trace as walk

    traced = walk(_store(store), identifier)
    if json:
        _print_json(traced.to_dict())
    else:
        _console().print(render(traced))


@app.command()
def sql(
    query: Annotated[str, typer.Argument(metavar="SQL", help="One SELECT; `show tables` lists the views")],
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV")] = False,
    rows: Annotated[int, typer.Option(min=1, help="Most rows of the table; CSV holds all")] = 50,
    store: StoreOption = None,
) -> None:
    """Ask the store in SQL (DuckDB)."""
    from evolve_dag.query import run_sql

    frame = run_sql(_store(store), query)
    if csv:
        import json as json_module

        import polars as pl

        nested = [name for name, kind in frame.schema.items() if kind.is_nested()]
        as_text = [
            pl.Series(name, [json_module.dumps(v, default=str) for v in frame[name].to_list()], dtype=pl.String)
            for name in nested
        ]
        sys.stdout.write(frame.with_columns(as_text).write_csv())
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for name, kind in frame.schema.items():
        table.add_column(Text(name), justify="right" if kind.is_numeric() else "left")
    for row in frame.head(rows).iter_rows():
        table.add_row(
            *(Text("" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)) for value in row)
        )
    _console().print(table)
    if frame.height > rows:
        print(f"{rows} of {frame.height} rows: --rows {frame.height} shows all")


@app.command()
def doctor(store: StoreOption = None) -> None:
    """Check the installation and say what is missing for which feature."""
    from rich.text import Text

    from evolve_dag.doctor import examine

    console = _console()
    broken = False
    marks = {"ok": ("ok     ", "green"), "note": ("note   ", "yellow"), "broken": ("BROKEN ", "bold red")}
    for finding in examine(_root(store)):
        broken = broken or finding.state == "broken"
        mark, colour = marks[finding.state]
        console.print(Text.assemble((mark, colour), (f"{finding.subject:<20} ", "bold"), finding.text), soft_wrap=True)
    if broken:
        raise typer.Exit(FAILED)


@app.command()
def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the web interface")] = 3000,
    store: StoreOption = None,
) -> None:
    """Open Dagster's web interface on the instance and the store that `evolve run` uses."""
    from evolve_dag.assets import launch

    launch.open_ui(_root(store), port)


@pocket.command("pretrain")
def pretrain(
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Default: the folder in the package")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    scale: Annotated[float, typer.Option(min=0.001, max=10, help="Share of the tokens that the shipped weights saw")] = 1.0,
    processes: Annotated[int, typer.Option(min=1, help="One thread each; decides the result, as the seed does")] = 2,
    measure: Annotated[bool, typer.Option(help="Measure copying, obedience and recall afterwards (measured.json)")] = True,
) -> None:
    """Make the weights of the pocket policy anew (about 20 minutes on 2 cores)."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from evolve_dag.environments.pocket.pretrain import pretrain_recipe
    from evolve_dag.inference.folders import POCKET

    folder = out or POCKET
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with _interruptible("the weights were not written"), Progress(*columns, console=_console(stderr=True)) as bars:
        task = bars.add_task("pretraining", total=1.0)
        pretrain_recipe(
            folder,
            seed=seed,
            scale=scale,
            processes=processes,
            on_progress=lambda line: bars.update(
                task, completed=line["done"], description=f"stage {line['stage']}, loss {line['loss']:.3f}"
            ),
        )
    print(f"weights: {folder}")
    if measure:
        from evolve_dag.environments.pocket.measure import write

        with _interruptible("the weights are written, their measurement is not"):
            _print_json(write(folder))


@pocket.command("measure")
def measure_policy(
    folder: Annotated[Path | None, typer.Option("--model", metavar="DIR", help="Default: the weights that ship")] = None,
    card: Annotated[Path | None, typer.Option("--card", metavar="FILE", help="Write the model card there too")] = None,
    per_state: Annotated[int, typer.Option(min=10, help="Conversations per state")] = 150,
) -> None:
    """Measure copying, habit, obedience, indifference and recall of a pocket policy (measured.json beside the weights)."""
    from evolve_dag.environments.pocket.measure import write
    from evolve_dag.inference.folders import POCKET

    with _interruptible("nothing was written"):
        _print_json(write(folder or POCKET, card, per_state=per_state))


@pocket.command("play")
def play(
    config: Annotated[Path, typer.Argument(metavar="[CONFIG]", help="Experiment file")] = Path("configs/pocket.yaml"),
    iteration: Annotated[
        int | None, typer.Option(min=1, metavar="K", help="policy(K). Default: the newest in the store")
    ] = None,
    task: Annotated[str | None, typer.Option(metavar="ID", help="A development task. Default: one by the seed")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    experience: Annotated[bool, typer.Option(help="Whether the policy sees its experience")] = True,
    store: StoreOption = None,
) -> None:
    """Watch one episode: every thought, call and observation, and the items selected at each step."""
    from evolve_dag.config import load_experiment
    from evolve_dag.environments.pocket.play import play as watch

    experiment = load_experiment(config)
    watch(experiment, _store(store), iteration=iteration, task=task, seed=seed, with_experience=experience, console=_console())


# -- inside


def _root(store: Path | None) -> Path:
    from evolve_dag.registry import default_store

    return store or default_store()


def _store(store: Path | None) -> Store:
    from evolve_dag.store import Store

    return Store(_root(store))


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr)


def _print_json(content: object) -> None:
    import json

    print(json.dumps(content, indent=2, ensure_ascii=False))


def _summary(config: str, store: Store) -> LineageSummary:
    """A lineage by experiment file, or by the name under which the store knows it."""
    from evolve_dag import registry
    from evolve_dag.reporting.summary import summarize

    known = {entry.name: entry for entry in registry.entries(store.root)}
    if config in known and not Path(config).exists():
        return summarize(store, config, config=str(known[config].config))
    return summarize(store, registry.load_seeded(Path(config)).experiment, config=config)


def _report_path(summaries: Sequence[LineageSummary], store: Store) -> Path:
    name = summaries[0].experiment if len(summaries) == 1 else "comparison"
    return store.root / "reports" / f"{name}.html"


@contextmanager
def _interruptible(remedy: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print(f"\ninterrupted: {remedy}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


if __name__ == "__main__":
    main()
