"""The command `tandem`: it names the verbs, and turns errors that are meant for people into one line and a status."""

from __future__ import annotations

import sys
from collections.abc import Iterable

import grpc
import typer

from benchmarks.workload import BadWorkload
from cli.bench import bench
from cli.chaos import chaos
from cli.configuration import show_config
from cli.doctor import doctor
from cli.down import down
from cli.drain import drain
from cli.explain import explain
from cli.keys import keys
from cli.logs import logs
from cli.migrate import Refused, migrate
from cli.scale import scale
from cli.serve import serve
from cli.settings import with_settings
from cli.status import status
from cluster.config import ConfigError
from cluster.key_file import KeyFileError
from cluster.run_file import NoCluster
from cluster.secret_files import SecretError
from tandem.errors import TandemError
from tandem.tls import TlsError

app = typer.Typer(
    name="tandem",
    help="Serves language models from separate prefill and decode workers.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
app.command("serve")(with_settings(serve))
app.command("status")(status)
app.command("explain")(explain)
app.command("migrate")(migrate)
app.command("drain")(drain)
app.command("scale")(scale)
app.command("logs")(logs)
app.command("down")(down)
app.command("bench")(bench)
app.add_typer(chaos)
app.add_typer(keys)
app.command("doctor")(with_settings(doctor))
app.command("config")(with_settings(show_config))


def main() -> None:
    """The entry of the command line. Status 2: a setting is wrong; 1: it could not be done."""
    try:
        app()
    except (ConfigError, KeyFileError, SecretError, TlsError) as error:
        _fail(str(error), 2)
    except BadWorkload as error:
        _fail(str(error), 2)
    except NoCluster as error:
        _fail(str(error), 1)
    except Refused as error:
        _fail(str(error), 1)
    except TandemError as error:
        _fail(error.message, 1)
    except grpc.RpcError as error:
        _fail(_sentence(error), 1)


def _sentence(error: grpc.RpcError) -> str:
    """What the cluster says, when it was the cluster that refused."""
    trailers: Iterable[tuple[str, str | bytes]] = error.trailing_metadata() or ()  # type: ignore[assignment]
    if any(key == "tandem-code" for key, _ in trailers):
        return str(error.details())
    return f"the cluster does not answer: {error.details()}"


def _fail(message: str, status_code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status_code)


if __name__ == "__main__":
    main()
