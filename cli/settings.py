"""Gives a command one flag for each setting of a cluster, straight from the settings' own table."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Optional

import typer
from pydantic.fields import FieldInfo

from cluster.config import ClusterConfig, flag_of, load

CONFIG = inspect.Parameter(
    "config",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[Optional[Path], typer.Option("--config", help="YAML file of settings (or TANDEM_CONFIG)")],  # noqa: UP045
)


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """A command that takes --config and every setting as a flag, and calls `command` with what is effective.

    Keyword parameters of `command` become options beside them. Raises ConfigError as `load` does.
    """
    own = [
        each for each in inspect.signature(command, eval_str=True).parameters.values() if each.kind is each.KEYWORD_ONLY
    ]

    def run(config: Path | None = None, **flags: object) -> None:
        options = {each.name: flags.pop(each.name) for each in own}
        given = {key: value for key, value in flags.items() if value is not None}
        command(load(given, os.environ, config), **options)

    parameters = [CONFIG, *own, *(_parameter(key, info) for key, info in ClusterConfig.model_fields.items())]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    run.__doc__, run.__name__ = command.__doc__, command.__name__
    return run


def _parameter(key: str, info: FieldInfo) -> inspect.Parameter:
    flag, kind = flag_of(key), str
    if info.annotation is bool:
        flag, kind = f"{flag}/--no-{flag[2:]}", bool  # type: ignore[assignment]
    elif info.annotation is int:
        kind = int  # type: ignore[assignment]
    default = info.default_factory() if info.default_factory else info.default  # type: ignore[call-arg]
    shown = default.human_readable() if key == "kv_memory" else default
    help_text = f"{info.description} (default: {shown})" if shown not in ("", None) else str(info.description)
    option = typer.Option(flag, help=help_text, show_default=False)
    return inspect.Parameter(
        key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Optional[kind], option]  # noqa: UP045
    )  # fmt: skip
