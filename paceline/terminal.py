"""What commands share: progress bars, tables, one-line warnings and failures, and TraceSets by name."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from calibration import TraceSet

Progress = Callable[[str, int, int], None]


class Failsafe(click.Group):
    """Turns expected failures into one line, warnings into one line each, and Ctrl-C into a plain goodbye."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        warnings.showwarning = _show_warning
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("\ninterrupted: nothing was left half-written", err=True)
            ctx.exit(130)
        except Exception as fault:
            from calibration.errors import PacelineError

            if isinstance(fault, PacelineError):
                raise click.ClickException(str(fault)) from None
            raise


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    from calibration.errors import PacelineWarning

    if issubclass(category, PacelineWarning):
        click.echo(f"{category.__name__}: {message}", err=True)


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Show one bar per stage on the terminal; give the callback ``(stage, done, total)``."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True), speed_estimate_period=300) as bars:
        tasks: dict[str, Any] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                # What an interrupted run had done is not speed: the estimate counts from here.
                tasks[stage] = bars.add_task(stage, total=total, completed=done)
            bars.update(tasks[stage], completed=done, total=total)

        yield advance


def stage(progress: Progress, name: str) -> Callable[[int, int], None]:
    """Give a callback ``(done, total)`` for one stage."""
    return lambda done, total: progress(name, done, total)


def say(*objects: Any) -> None:
    """Print tables and text to the terminal."""
    from rich.console import Console

    Console().print(*objects)


def read_traces(source: str) -> TraceSet:
    """Read a TraceSet from a folder, or a bundled one by name."""
    from calibration.errors import TraceError, did_you_mean
    from calibration.traces import TraceSet, bundled, bundled_names

    if source in bundled_names() and not Path(source).exists():
        return bundled(source)
    if not Path(source).exists():
        raise TraceError(f"{source}: no such folder or bundled TraceSet{did_you_mean(source, bundled_names())}")
    return TraceSet.read(source)


def command_line() -> str:
    """Give the command line as it was typed, without the folder of the program."""
    import shlex

    return shlex.join(["paceline", *sys.argv[1:]])
