"""What commands share: progress bars, tables, one-line warnings and failures, and TraceSets by name."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from calibration import TraceSet
    from calibration.common.progress import StageProgress

_WORDS = "paceline.words"
"""Where the root context keeps the words of the command."""


class Failsafe(click.Group):
    """Turns expected failures into one line, warnings into one line each, and Ctrl-C into a plain goodbye.

    Nothing that it prints of a failure or a warning holds a secret that the command was given.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Remember the words of the command."""
        ctx.meta[_WORDS] = tuple(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        warnings.showwarning = _show_warning
        try:
            return super().invoke(ctx)
        except click.ClickException as fault:
            vars(fault)["message"] = _concealed(fault.message)
            raise
        except KeyboardInterrupt:
            click.echo("\ninterrupted: nothing was left half-written", err=True)
            ctx.exit(130)
        except Exception as fault:
            from calibration.common.errors import PacelineError

            if isinstance(fault, PacelineError):
                raise click.ClickException(_concealed(str(fault))) from None
            told = "".join(traceback.format_exception(fault))
            if _concealed(told) == told:
                raise
            click.echo(_concealed(told), err=True)
            ctx.exit(1)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    from calibration.common.errors import PacelineWarning

    if issubclass(category, PacelineWarning):
        click.echo(_concealed(f"{category.__name__}: {message}"), err=True)


@contextmanager
def progress_bars() -> Iterator[StageProgress]:
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


def stage(progress: StageProgress, name: str) -> Callable[[int, int], None]:
    """Give a callback ``(done, total)`` for one stage."""
    return lambda done, total: progress(name, done, total)


def say(*objects: Any) -> None:
    """Print tables and text to the terminal."""
    from rich.console import Console

    Console().print(*objects)


def read_traces(source: str) -> TraceSet:
    """Read a TraceSet from a folder, or a bundled one by name."""
    from calibration.common.errors import TraceError, did_you_mean
    from calibration.traces import TraceSet, bundled, bundled_names

    if source in bundled_names() and not Path(source).exists():
        return bundled(source)
    if not Path(source).exists():
        raise TraceError(f"{source}: no such folder or bundled TraceSet{did_you_mean(source, bundled_names())}")
    return TraceSet.read(source)


def command_line() -> str:
    """Give the command line as it was typed, without the folder of the program and without secrets."""
    import shlex

    from calibration.common.secrets import redacted

    return shlex.join(["paceline", *redacted(_words())])


def _words() -> tuple[str, ...]:
    context = click.get_current_context(silent=True)
    return tuple(sys.argv[1:]) if context is None else context.meta.get(_WORDS, tuple(sys.argv[1:]))


def _concealed(text: str) -> str:
    """Give `text` without the secrets of the command that runs: those in its words and in the environment."""
    from calibration.common.secrets import concealed, environment_secrets, secrets_of

    return concealed(text, [*secrets_of(_words()), *environment_secrets(_words())])
