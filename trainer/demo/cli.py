"""`hub demo` on the command line. No torch until it runs."""

import os
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command("demo")(demo)


def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave the server up at the end, until Ctrl-C.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="The server's port; 0 takes a free one.")] = 0,
) -> None:
    """Train, push, serve, swap, compare and fuse on the embedded base: minutes, no network, no GPU."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see docs/decisions/0009
    from clients.errors import ClientError
    from trainer.demo.command import run_demo
    from trainer.errors import TrainError

    try:
        run_demo(keep=keep, port=port)
    except (TrainError, ClientError) as error:
        typer.echo(f"hub demo: {error}", err=True)
        raise typer.Exit(1) from None
