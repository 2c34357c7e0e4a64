"""`tandem config`: the settings in force, and where each comes from."""

from __future__ import annotations

import json

from pydantic import ByteSize
from rich.console import Console
from rich.table import Table

from cli.options import AsJson
from cli.settings import with_settings
from cluster.config import Effective, without_password


@with_settings
def show_config(effective: Effective, *, as_json: AsJson = False) -> None:
    """Print the effective settings with their origins: flags, TANDEM_* variables, --config file, defaults."""
    values = effective.config.model_dump(mode="json")
    values["redis"] = without_password(effective.config.redis)
    if as_json:
        print(
            json.dumps({key: {"value": each, "from": effective.origins[key]} for key, each in values.items()}, indent=2)
        )
        return
    table = Table("setting", "value", "from", box=None, pad_edge=False)
    for key, value in values.items():
        shown = "" if value is None else str(value)
        if key in ("kv_memory", "swap_memory"):
            config = effective.config
            shown = ByteSize(config.swap_bytes if key == "swap_memory" else config.kv_memory).human_readable()
        table.add_row(key, shown, effective.origins[key])
    Console(soft_wrap=True).print(table)
