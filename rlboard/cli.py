"""Every loop of every track as a Typer command.

Options and help come from the loops' sources without importing them, so that `--help` and a mistyped option answer
at once; torch is imported when a loop is about to run.
"""

from __future__ import annotations

import inspect
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from rlboard import __version__, distributed
from rlboard.commands import PANEL, add_commands, sweep_of
from rlboard.config import Option, options_of
from rlboard.errors import RlboardError, UsageError, plain_warnings
from rlboard.registry import TRACKS, Loop, SourceError, Track, read_loop
from rlboard.run import RunOptions, check_log_dir, execute


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"rlboard {__version__}")
        raise typer.Exit


VERSION = typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)


def build_app(tracks: Iterable[Track] = TRACKS) -> typer.Typer:
    """The command line of `tracks`: one command a loop, one group a named track."""
    app = typer.Typer(
        name="rlboard",
        help="Complete, fast, readable training examples that fill TensorBoard properly.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="markdown",
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def root(version: Annotated[bool, VERSION] = False) -> None: ...

    add_commands(app)
    for track in tracks:
        target = app
        if track.group:
            empty = "" if track.files() else " It has no loops yet."
            target = typer.Typer(help=f"The {track.group} track.{empty}", no_args_is_help=True)
            target.callback()(lambda: None)  # a group even while it has one command or none
            app.add_typer(target, name=track.group)
        for path in track.files():
            try:
                loop = read_loop(track, path)
            except SourceError as error:
                typer.echo(f"rlboard: skipped {error}", err=True)
            else:
                target.command(loop.command, help=loop.doc, short_help=loop.doc.partition("\n\n")[0])(_command(loop))
                if track.group and loop.name == "train":
                    short = f"Search the options of `{track.group} {loop.command}`: see `rlboard sweep --help`."
                    target.command("sweep", help=short, rich_help_panel=PANEL)(sweep_of(f"{track.group}/{loop.name}"))
    return app


def _command(loop: Loop) -> Any:
    """A function with the signature that Typer reads: one parameter an option, each None where it was not given."""
    plumbing = [_with_presets(option, loop) if option.name == "preset" else option for option in options_of(RunOptions)]

    def command(**given: Any) -> int:
        return _run(loop, {option: given[option.name] for option in (*loop.options, *plumbing)})

    parameters = [_parameter(option, "Hyperparameters") for option in loop.options]
    parameters += [_parameter(option, "Run") for option in plumbing]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return command


def _with_presets(option: Option, loop: Loop) -> Option:
    """The option `--preset` with the names that a loop knows, and in its help what they stand for."""
    described = (
        f"{name}: {', '.join(f'{key} {value}' for key, value in values.items())}"
        for name, values in loop.presets.items()
    )
    return replace(option, choices=("", *loop.presets), help="; ".join((option.help, *described)))


def _parameter(option: Option, panel: str) -> inspect.Parameter:
    """An option as Typer sees it: text, because `Option.parse` knows better what to say about a wrong value."""
    known = [option.range if not option.choices else "", f"default {option.default}" if option.default else ""]
    words = f"{option.help} ({'; '.join(filter(None, known))})" if any(known) else option.help
    flags = [option.flag, *([option.alias] if option.alias else [])]
    if option.type is bool:
        flags = [f"{option.flag}/--no-{option.flag[2:]}"]
    if option.argument:
        argument = typer.Argument(help=words, metavar=option.flag, show_default=False)
        default = inspect.Parameter.empty if option.required else None
        annotation = Annotated[str if option.required else str | None, argument]  # type: ignore[valid-type]
        return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
    metavar = "|".join(filter(None, option.choices)) or {int: "INTEGER", float: "NUMBER", str: "TEXT"}.get(option.type)
    described = typer.Option(*flags, help=words, metavar=metavar, show_default=False, rich_help_panel=panel)
    kind = bool if option.type is bool else str
    return inspect.Parameter(
        option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, described]
    )


def _run(loop: Loop, given: dict[Option, str | bool | None]) -> int:
    """Runs `loop` with what the user gave; options left out take the preset's value, else their default."""
    chosen: dict[str, Any] = {
        option.name: option.parse(value) if isinstance(value, str) else value
        for option, value in given.items()
        if value is not None
    }
    plumbing = RunOptions(**{spec.name: chosen.pop(spec.name) for spec in fields(RunOptions) if spec.name in chosen})
    check_log_dir(plumbing.log_dir)
    command = ["rlboard", *filter(None, (loop.track.group, loop.command))]
    command += [option.spelled(value) for option, value in given.items() if value is not None]
    _check_processes(loop, plumbing)
    with distributed.connected():
        return _resume(loop, chosen, plumbing, command) if plumbing.resume else _begin(loop, chosen, plumbing, command)


def _check_processes(loop: Loop, plumbing: RunOptions) -> None:
    """Raises UsageError where torchrun has started several processes of what one process does."""
    size = distributed.world().size
    if size > 1 and plumbing.seeds > 1:
        raise UsageError(f"--seeds and {size} processes of torchrun do not go together: start it without torchrun")
    if size > 1 and not getattr(loop.load(), "DISTRIBUTED", False):
        seeds = "; --seeds N trains N runs side by side" if any(each.name == "seed" for each in loop.options) else ""
        raise UsageError(f"rlboard {loop.command} trains in one process: start it without torchrun{seeds}")


def _begin(loop: Loop, chosen: dict[str, Any], plumbing: RunOptions, command: list[str]) -> int:
    """Begins a run, or, where torchrun has restarted its processes, goes on with the one they had begun."""
    values = loop.defaults(plumbing.preset, smoke=plumbing.smoke) | chosen
    here = distributed.world()
    if here.job and plumbing.seeds == 1:
        from rlboard.resume import of_job

        begun = distributed.share(lambda: of_job(loop, values, Path(plumbing.log_dir), here.job))
        if begun and begun.facts["status"] != "completed":
            again = replace(plumbing, resume=str(begun.directory), preset="", smoke=False, run_name="")
            return _resume(loop, {}, again, command)
        if begun and here.restarts:  # a process failed when all was done
            return 0
    if plumbing.seeds > 1:
        from rlboard.seeds import execute_seeds

        return execute_seeds(loop, values, plumbing, command)
    from rlboard.instruments import INSTRUMENTS  # with torch and all that it brings

    return execute(loop, values, plumbing, command, INSTRUMENTS[plumbing.log])


def _resume(loop: Loop, chosen: dict[str, Any], plumbing: RunOptions, command: list[str]) -> int:
    """Goes on with a run; its own options hold where the user gave no others."""
    for name, given in (("--seeds", plumbing.seeds > 1), ("--smoke", plumbing.smoke), ("--preset", plumbing.preset)):
        if given:
            raise UsageError(f"--resume and {name} do not go together: the run has its options")
    if plumbing.run_name and not plumbing.fork:
        raise UsageError("--run-name is for a new run: leave it out, or add --fork")
    from rlboard.instruments import INSTRUMENTS
    from rlboard.resume import prepare

    resumption = distributed.share(
        lambda: prepare(loop, plumbing.resume, Path(plumbing.log_dir), chosen, fork=plumbing.fork)
    )
    for notice in resumption.notices:
        typer.echo(f"rlboard: {notice}: an earlier checkpoint is taken", err=True)
    if seeds := resumption.facts.get("seeds"):
        from rlboard.seeds import execute_seeds

        group = replace(plumbing, seeds=len(seeds))
        return execute_seeds(loop, resumption.config, group, command, resumption, chosen)
    return execute(loop, resumption.config, plumbing, command, INSTRUMENTS[plumbing.log], resumption)


def _with_last(arguments: Sequence[str]) -> list[str]:
    """The command line with `--resume` alone spelled out as `--resume=last`."""
    follows = [*arguments[1:], "-"]
    return [
        "--resume=last" if word == "--resume" and following.startswith("-") else word
        for word, following in zip(arguments, follows, strict=False)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code; a mistake of the user's is one line on standard error."""
    plain_warnings()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch's profiler warns of its own bookkeeping
    words = _with_last(sys.argv[1:] if arguments is None else arguments)
    try:
        with distributed.one_voice():
            return _obey(words)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:  # the reader of our output has gone: say nothing more, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    finally:
        if arguments is None:  # the process ends: one more Ctrl-C ends it at once, without a traceback of its clean-up
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _obey(words: Sequence[str]) -> int:
    try:
        return int(build_app()(args=words, prog_name="rlboard", standalone_mode=False) or 0)
    except RlboardError as error:
        distributed.give_up(error)
        return _complain(str(error), error.exit_code)
    except typer.TyperException as error:
        distributed.give_up(error)
        return _complain(error.format_message(), error.exit_code)


def _complain(message: str, code: int) -> int:
    if message:  # none where the help has been shown instead
        typer.echo(f"rlboard: {' '.join(message.split())}", err=True)
    return code
