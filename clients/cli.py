"""`hub chat` on the command line."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command("chat")(chat)


def chat(
    model: Annotated[str, typer.Argument(metavar="REF", help="A reference, a mixture, or the base's name.")],
    url: Annotated[
        str | None, typer.Option(envvar="MULTIGRAFT_URL", help="A running server (default: start one for this chat).")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base of a server that is started (default: REF's own).")] = None,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
) -> None:
    """Talk to a model; an empty line or Ctrl-D ends it. MULTIGRAFT_API_KEY is sent if it is set."""
    from clients.chat import Conversation
    from clients.errors import ClientError

    try:
        with _server(url, base, model) as at:
            conversation = Conversation(at, model, key=os.environ.get("MULTIGRAFT_API_KEY"), system=system)
            while text := _ask():
                for piece in conversation.say(text):
                    typer.echo(piece, nl=False)
                typer.echo(f"\n  [{conversation.served_by}]")
    except ClientError as error:
        typer.echo(f"hub chat: {error}", err=True)
        raise typer.Exit(1) from None


@contextmanager
def _server(url: str | None, base: str | None, model: str) -> Iterator[str]:
    from clients.local import serving

    if url is not None:
        yield url.rstrip("/")
        return
    with tempfile.TemporaryDirectory(prefix="multigraft-chat-") as room:
        typer.echo("starting a server ...", err=True)
        with serving(base or _base_of(model), Path(room) / "server.log") as at:
            yield at


def _base_of(model: str) -> str:
    """What the hub says that the first adapter of a mixture was made for; a name that it does not know is a base's."""
    from clients.local import COMMAND

    first = model.split("+")[0].split("*")[0]
    shown = subprocess.run([*COMMAND, "show", first, "--json"], capture_output=True, text=True, check=False)
    if shown.returncode:
        return model
    return str(json.loads(shown.stdout)["manifest"]["base"]["name"])


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
