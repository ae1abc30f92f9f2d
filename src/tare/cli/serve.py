"""`tare serve`: the daemon in the foreground."""

from __future__ import annotations

import gc

import click


@click.command()
@click.option("--config", "path", metavar="FILE", help="A TOML file of settings.")
@click.option("--root", metavar="DIR", help="What lasts: images, layers, records.  [default: /var/lib/tare]")
@click.option("--run", metavar="DIR", help="What a reboot ends: sockets, namespaces.  [default: /run/tare]")
@click.option("--socket", metavar="PATH", help="Where to listen.  [default: tare.sock in the run directory]")
def serve(path: str | None, root: str | None, run: str | None, socket: str | None) -> None:
    """Serve CRI on a unix socket until told to stop.

    Containers outlive it: started again, it finds the pods it left. Several daemons can serve on one machine when each
    has its own --root and --run.
    """
    gc.disable()  # nothing of what is imported is garbage, and looking for it takes a tenth of the time
    from tare import app, config

    gc.freeze()
    gc.enable()

    def settings() -> config.Config:
        return config.load(path, root=root, run=run, socket=socket)

    app.serve(settings(), settings)
