"""`fedkseed watch`: a run's report in a browser while the run goes on."""

from pathlib import Path

from fedkseed.cli.console import say
from fedkseed.report.live import Watch


def watch_command(run: Path, port: int) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        FedKSeedError: there is no run, or the port cannot be had.
    """
    with Watch(run, port) as server:
        say(f"watching {run}: {server.address} (Ctrl-C ends the watching, not the run)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("no longer watching; the run is as it was")
