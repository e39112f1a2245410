"""The server's side of the app."""

from fedkseed.flower import server_app

app = server_app()
