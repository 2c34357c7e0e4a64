"""`tandem config`: the settings in force, and where each comes from."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from cluster.config import Effective


def show_config(effective: Effective) -> None:
    """Print the effective settings with their origins: flags, TANDEM_* variables, --config file, defaults."""
    table = Table("setting", "value", "from", box=None, pad_edge=False)
    for key, value in effective.config.model_dump(mode="json").items():
        shown = (
            effective.config.kv_memory.human_readable() if key == "kv_memory" else str("" if value is None else value)
        )
        table.add_row(key, shown, effective.origins[key])
    Console(soft_wrap=True).print(table)
