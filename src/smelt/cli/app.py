"""The `smelt` command: its subcommands, and how they end when something is wrong."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from .bench import bench
from .compile import compile_
from .export import export
from .inspect import inspect_
from .recipes import recipes
from .run import run
from .tune import tune
from .verify import verify

BAD_INPUT, INTERRUPTED = 2, 130


class Commands(TyperGroup):
    """Subcommands. What users can mend ends as one line on stderr; anything else is a bug and keeps its traceback."""

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order in which they are used, not in that of the alphabet."""
        return list(self.commands)

    def invoke(self, ctx: Any) -> Any:
        """Run a subcommand."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        except Exception as fault:
            errors = sys.modules.get(f"{__package__.rpartition('.')[0]}.ir.errors")
            if errors is None or not isinstance(fault, errors.SmeltError):  # not loaded: usage faults and --help
                raise
            print(f"error: {' '.join(str(fault).split())}", file=sys.stderr)
            raise typer.Exit(BAD_INPUT) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _version(asked: bool) -> None:
    if asked:
        print(f"smelt {__version__}")
        raise typer.Exit


@app.callback()
def smelt(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Compile models by recipes, and run what comes out.

    \b
    smelt recipes                                       what there is
    smelt compile MODEL all-four -o out.smelt --calibration text.txt
    smelt run out.smelt "def fib(n):"
    """


app.command("compile")(compile_)
app.command("run")(run)
app.command("export")(export)
app.command("recipes")(recipes)
app.command("inspect")(inspect_)
app.command("verify")(verify)
app.command("tune")(tune)
app.command("bench")(bench)


def main() -> None:
    """The entry point; SystemExit carries the exit code."""
    try:
        app()
    except KeyboardInterrupt:  # before a command has begun
        sys.exit(INTERRUPTED)
