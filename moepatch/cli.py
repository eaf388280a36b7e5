"""The command line: ``moepatch inspect``, ``moepatch doctor``, ``moepatch bench``.

Data goes to standard output, errors to standard error. Exit codes: 0 done (inspect: every mixture of experts is served), 1 error, 2 some
mixtures are served, 3 none is, or nothing. Whatever is heavy is imported by the command that needs it.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(name="moepatch", add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

#: What typer raises for a wrong command line; some versions carry their own copy of click, so it is named through typer.
_UsageError = typer.BadParameter.__base__


def main() -> None:
    """Runs the command line and ends the process. A wrong command line is an error (1): 2 means *served in part*."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
        sys.exit(code)
    except _UsageError as error:
        error.show()
        sys.exit(1)
    except typer.Abort:
        sys.exit(1)
    except BrokenPipeError:
        # The reader went away (`| head`). The interpreter flushes again on its way out: what is left goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        typer.echo(f"moepatch {__version__}")
        raise typer.Exit


@app.callback()
def moepatch(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Patches Hugging Face mixture-of-experts models in place."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps off the terminal what libraries warn and log. Only for a command, whose process nobody shares: it is one setting for all threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import logging

        level = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            yield
        finally:
            logging.set_verbosity(level)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(metavar="DIR|config.json", help="A model's directory or its config.json; nothing is downloaded.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what moepatch would do to a model, without its weights.

    Exit code: 0 it can be patched with every mixture of experts in it, 2 with some of them, 3 with none of them or not at all, 1 error.
    """
    with _quiet():
        from .errors import MoePatchError
        from .inspection import inspect as look

        try:
            inspection = look(model)
        except MoePatchError as error:
            typer.echo(f"moepatch: {error}", err=True)
            raise typer.Exit(1) from None
        if as_json:
            typer.echo(inspection.to_json())
        else:
            from .render import terminal

            terminal.print_view(terminal.view_of_inspection(inspection))
    raise typer.Exit(inspection.exit_code)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say which backends and libraries this machine has, and why the others are missing."""
    with _quiet():
        from .inspection import backend_rows
        from .planning import SCHEMA_VERSION

        versions, rows = _versions(), backend_rows()
    if as_json:
        facts: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "versions": versions, "backends": [row.to_dict() for row in rows]}
        typer.echo(json.dumps(facts, indent=2))
    else:
        from .render import terminal

        terminal.print_view(terminal.view_of_environment(versions, rows))


@app.command()
def bench(
    model: Annotated[str, typer.Argument(metavar="DIR|config.json", help="A model's directory or its config.json; no weights are read.")],
    tokens: Annotated[int | None, typer.Option(min=1, help="Of one sequence; 4096 on a GPU, 256 without one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time a model's modules on this machine: transformers' code and every backend, forward and backward, with random weights.

    Exit code: 0 done, 1 error, 3 there is nothing that moepatch serves.
    """
    with _quiet():
        from . import source
        from .bench import bench as timed
        from .errors import MoePatchError
        from .needs import best_device
        from .planning import SCHEMA_VERSION, make_plan

        try:
            file = source.config_path(Path(model))
            found = source.meta_model(source.read_config(file)[0], str(file))
        except MoePatchError as error:
            typer.echo(f"moepatch: {error}", err=True)
            raise typer.Exit(1) from None
        rows = []
        for row in timed(found, make_plan(found), best_device(), tokens):
            rows.append(row)
            if sys.stderr.isatty():
                typer.echo(f"\r\033[K{row.pattern}: {row.stack}", nl=False, err=True)
        if sys.stderr.isatty():
            typer.echo("\r\033[K", nl=False, err=True)
    if as_json:
        typer.echo(json.dumps({"schema_version": SCHEMA_VERSION, "versions": _versions(), "rows": [row.to_dict() for row in rows]}, indent=2))
    else:
        from .render import terminal

        terminal.print_view(terminal.view_of_bench(f"{type(found).__name__} on {_machine_words()}, milliseconds forward and backward", rows))
    raise typer.Exit(0 if rows else 3)


def _machine_words() -> str:
    import torch

    threads = torch.get_num_threads()
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"the CPU, {threads} thread{'s' if threads != 1 else ''}"


def _versions() -> dict[str, str]:
    """Versions by name, and the GPUs."""
    import torch
    import transformers

    from . import __version__

    versions = {
        "moepatch": __version__,
        "python": f"{platform.python_version()} ({platform.system()} {platform.machine()})",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda or "torch was built without it",
    }
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        versions[f"gpu {i}"] = f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
    if torch.cuda.device_count() == 0:
        versions["gpu"] = "none"
    return versions
