"""The command `tandem`: it names the verbs, and turns errors that are meant for people into one line and a status."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from cli.sentences import EXPECTED, told
from tandem.near_miss import did_you_mean

# In the order in which help shows them. A verb's module is imported when the verb is asked for: all take a second.
VERBS = {
    "serve": ("cli.serve", "serve"),
    "status": ("cli.status", "status"),
    "top": ("cli.top", "top"),
    "explain": ("cli.explain", "explain"),
    "migrate": ("cli.migrate", "migrate"),
    "drain": ("cli.drain", "drain"),
    "scale": ("cli.scale", "scale"),
    "flip": ("cli.flip", "flip"),
    "logs": ("cli.logs", "logs"),
    "down": ("cli.down", "down"),
    "bench": ("cli.bench", "bench"),
    "chaos": ("cli.chaos", "chaos"),
    "keys": ("cli.keys", "keys"),
    "doctor": ("cli.doctor", "doctor"),
    "pod": ("cli.pod", "pod"),
    "config": ("cli.configuration", "show_config"),
}


class Verbs(TyperGroup):
    """The verbs, each built when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All names."""
        return list(VERBS)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The verb that the words begin with; one that there is not is refused with the nearest that there is."""
        known = not args or args[0] in VERBS or args[0].startswith("-")
        if not known and not ctx.resilient_parsing:
            ctx.fail(f"No such command {args[0]!r}{did_you_mean(args[0], VERBS)}")
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The verb of that name, or None."""
        if cmd_name not in VERBS:
            return None
        module, name = VERBS[cmd_name]
        verb = getattr(import_module(module), name)
        if not isinstance(verb, typer.Typer):
            single = typer.Typer(add_completion=False)
            single.command(cmd_name)(verb)
            verb = single
        return get_command(verb)


app = typer.Typer(
    cls=Verbs,
    name="tandem",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def tandem() -> None:
    """Serves language models from separate prefill and decode workers."""


def main() -> None:
    """The entry of the command line. Status 2: a setting is wrong; 1: it could not be done."""
    try:
        app()
    except EXPECTED as error:
        message, exit_status = told(error)
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(exit_status) from None


if __name__ == "__main__":
    main()
