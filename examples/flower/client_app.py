"""A client's side of the app; its name, data and model come from the SuperNode's --node-config."""

from fedkseed.flower import client_app

app = client_app()
