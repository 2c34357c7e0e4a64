"""`tandem keys`: makes, lists and revokes API keys in the file that a cluster is served with."""

from __future__ import annotations

import datetime
import json
import os
import re
from pathlib import Path
from typing import Annotated

import typer
import yaml
from pydantic import ValidationError
from rich.table import Table

from cli.options import AsJson
from cli.shown import console
from cluster.config import ConfigError
from cluster.key_file import KeySpec, changing, read_keys
from cluster.secret_files import fresh_secret
from router.api_keys import KEY_PREFIX, digest_of
from tandem.near_miss import did_you_mean
from tandem.request import PRIORITY_MAX

keys = typer.Typer(name="keys", add_completion=False, help="API keys: make, list, revoke.", no_args_is_help=True)

FILE = typer.Option("--file", help="YAML file of keys (or TANDEM_API_KEYS)", show_default=False)
WIDTH = 240  # where no terminal cuts names off
_UNITS = {"h": "hours", "d": "days", "w": "weeks"}


@keys.callback()
def group() -> None:
    """API keys. A running cluster takes changes of its file within seconds."""


@keys.command("create")
def create(
    name: Annotated[str, typer.Argument(help="whose it is", show_default=False)],
    file: Annotated[Path | None, FILE] = None,
    expires: Annotated[str, typer.Option(help="a date, a time, or from now: 12h, 30d, 4w")] = "",
    requests_per_minute: Annotated[int | None, typer.Option(help="limit", min=1)] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="limit on prompt and answer tokens", min=1)] = None,
    concurrent: Annotated[int | None, typer.Option(help="limit on requests at once", min=1)] = None,
    priority_max: Annotated[
        int | None, typer.Option(help="the highest priority that it may ask for", min=0, max=PRIORITY_MAX)
    ] = None,
    tenant: Annotated[str, typer.Option(help="whose prefix cache it shares; nobody else sees what is cached")] = "",
    operator: Annotated[bool, typer.Option("--operator", help="may see, move, drain and stop everything")] = False,
    as_json: AsJson = False,
) -> None:
    """Print a new key, once, and add its hash to the file; without a file, print the entry."""
    key = KEY_PREFIX + fresh_secret()
    try:
        spec = KeySpec(
            name=name, sha256=digest_of(key).hex(), expires=expiry(expires), tenant=tenant, operator=operator,
            requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute, concurrent=concurrent,
            priority_max=priority_max,
        )  # fmt: skip
    except ValidationError as error:
        detail = error.errors()[0]
        raise ConfigError(f"{detail['loc'][0]}: {detail['input']!r}: {detail['msg']}") from None
    path = _path(file)
    if path is not None:
        with changing(path) as specs:
            if any(each.name == name for each in specs):
                raise ConfigError(f"name: {name!r} has a key in {path} already; revoke it, or choose another name")
            specs.append(spec)
    if as_json:
        told = {"key": key, "file": None if path is None else str(path), "entry": spec.document()}
        typer.echo(json.dumps(told, default=str))
        return
    typer.echo(f"key of {name}, shown this once: {key}")
    if path is None:
        typer.echo(yaml.safe_dump([spec.document()], sort_keys=False).rstrip())
    else:
        typer.echo(f"its hash is in {path}")


@keys.command("list")
def listing(
    file: Annotated[Path | None, FILE] = None,
    as_json: AsJson = False,
) -> None:
    """Show whose keys there are, and their limits."""
    specs = read_keys(_needed(file))
    if as_json:
        typer.echo(json.dumps([spec.model_dump(mode="json", exclude={"sha256"}) for spec in specs], indent=2))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("name", "tenant", "operator", "state", "requests/min", "tokens/min", "at once", "priority"):
        table.add_column(column, no_wrap=True)
    for spec in specs:
        limits = (spec.requests_per_minute, spec.tokens_per_minute, spec.concurrent, spec.priority_max)
        shown = ("" if limit is None else str(limit) for limit in limits)
        table.add_row(spec.name, spec.tenant, "yes" if spec.operator else "", state(spec), *shown)
    console(WIDTH).print(table)


@keys.command("revoke")
def revoke(
    name: Annotated[str, typer.Argument(help="whose key", show_default=False)],
    file: Annotated[Path | None, FILE] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key worthless; requests of it that run are ended."""
    path = _needed(file)
    with changing(path) as specs:
        found = [number for number, spec in enumerate(specs) if spec.name == name]
        if not found:
            hint = did_you_mean(name, [spec.name for spec in specs])
            raise ConfigError(f"name: {name!r} has no key in {path}{hint}")
        specs[found[0]] = specs[found[0]].model_copy(update={"revoked": True})
    if as_json:
        typer.echo(json.dumps({"revoked": name, "file": str(path)}))
    else:
        typer.echo(f"revoked the key of {name}; a running cluster takes notice within seconds")


def expiry(text: str, now: datetime.datetime | None = None) -> datetime.datetime | None:
    """The time that is meant. Raises ConfigError."""
    if not text:
        return None
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0) if now is None else now
    try:
        if (from_now := re.fullmatch(r"(\d{1,6})([hdw])", text)) is not None:
            return now + datetime.timedelta(**{_UNITS[from_now[2]]: int(from_now[1])})
        time = datetime.datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise ConfigError(f"expires: {text!r} is no date, no time, and not like 12h, 30d or 4w") from None
    return time if time.tzinfo is not None else time.replace(tzinfo=datetime.UTC)


def state(spec: KeySpec) -> str:
    """Whether the key is good."""
    if spec.revoked:
        return "revoked"
    if spec.expires is None:
        return "good"
    past = spec.expires <= datetime.datetime.now(datetime.UTC)
    return f"{'expired' if past else 'good until'} {spec.expires.isoformat(timespec='minutes')}"


def _path(file: Path | None) -> Path | None:
    variable = os.environ.get("TANDEM_API_KEYS")
    return file or (Path(variable) if variable else None)


def _needed(file: Path | None) -> Path:
    path = _path(file)
    if path is None:
        raise ConfigError("file: is missing; give --file or TANDEM_API_KEYS")
    return path
