"""`argosy k8s ...`: what serving/cli.py calls."""

from __future__ import annotations

import typer
import typer.main
from typer.exceptions import TyperException

from k8s.tool import commands, diagnosis, exits, operations
from k8s.tool.exits import ToolError

REGISTERED = (commands, operations, diagnosis)
"""Modules whose commands there are."""


def main(arguments: list[str]) -> int:
    """An exit code of exits.MEANINGS."""
    try:
        return int(commands.app(arguments, prog_name="argosy k8s", standalone_mode=False) or 0)
    except ToolError as error:
        typer.echo(f"error: {error}", err=True)
        return error.code
    except TyperException as error:  # wrong usage, which is an error here and not the 2 that means changes
        if text := str(error):
            known = typer.main.get_command(commands.app).commands  # type: ignore[attr-defined]
            command = " ".join(["argosy k8s", *(name for name in arguments[:1] if name in known)])
            typer.echo(f"error: {text.rstrip('.')}; `{command} --help` lists what there is", err=True)
        return exits.ERROR
    except (typer.Abort, KeyboardInterrupt):
        return 130
