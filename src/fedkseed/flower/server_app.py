"""The Flower ServerApp: settings and run folder, then the strategy."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp


def server_app() -> ServerApp:
    """A ServerApp that federates as `[tool.flwr.app.config]` says, and goes on with the run that its folder holds."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        # here, since nodes import this package too, and theirs shall start without torch
        from fedkseed.flower.building import build_strategy
        from fedkseed.flower.config import read_config
        from fedkseed.runs.folder import RunFolder

        config = read_config(context.run_config)
        with RunFolder(config.run, config).held():  # before the folder is read: nobody moves the run on meanwhile
            build_strategy(config).start(grid)

    return app
