"""`m3d keys`: who may enter the gateway. What it needs is imported when it runs, as help must come at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engine.cli.entrance import check_installed

KeysFile = Annotated[Path, typer.Option("--keys", help="file of the keys, as `m3d keys add` makes it")]
ROLES_HELP = (
    "ask, upload, admin, with commas between them; a scan belongs to the key that uploaded it, so that ask alone can "
    "ask about none"
)
keys = typer.Typer(no_args_is_help=True, help="Say who may enter the gateway: add, list and revoke keys.")


@keys.command(help="Make a key, and print it as the last word: it is kept nowhere and cannot be shown again.")
def add(
    name: Annotated[str, typer.Argument(help="who gets it: letters, digits, dots, underscores and dashes")],
    file: KeysFile,
    role: Annotated[str, typer.Option(help=ROLES_HELP)] = "ask,upload",
    days: Annotated[float | None, typer.Option(help="days until it expires (default: never)")] = None,
    rate_per_minute: Annotated[int | None, typer.Option(help="requests a minute (default: the gateway's)")] = None,
    concurrency: Annotated[int | None, typer.Option(help="requests at a time (default: the gateway's)")] = None,
    max_upload_mb: Annotated[int | None, typer.Option(help="MB of an upload (default: the gateway's)")] = None,
) -> None:
    check_installed()
    from engine.gateway.keys import add as add_key

    limits = dict(rate_per_minute=rate_per_minute, concurrency=concurrency, max_upload_mb=max_upload_mb)
    roles = tuple(each.strip() for each in role.split(","))
    print(f"key of {name} ({', '.join(roles)}): {add_key(file, name, roles, days=days, **limits)}")


@keys.command("list", help="Print the names of the keys, their roles and when they expire.")
def list_(file: KeysFile) -> None:
    check_installed()
    from datetime import datetime, timezone

    from engine.gateway.keys import read

    for key in read(file).keys:
        end = "never" if key.expires is None else f"{datetime.fromtimestamp(key.expires, timezone.utc):%Y-%m-%d %H:%M}Z"
        limits = {name: getattr(key, name) for name in ("rate_per_minute", "concurrency", "max_upload_mb")}
        own = " ".join(f"{name}={value}" for name, value in limits.items() if value is not None)
        state = "expired" if key.has_expired() else "expires"
        print(f"{key.name}\t{','.join(key.roles)}\t{state} {end}\t{own}".rstrip())


@keys.command(help="Take a key back: it is refused from now on, without a restart.")
def revoke(name: Annotated[str, typer.Argument(help="whose key")], file: KeysFile) -> None:
    check_installed()
    from engine.gateway.keys import revoke as revoke_key

    revoke_key(file, name)
    print(f"revoked {name}")
