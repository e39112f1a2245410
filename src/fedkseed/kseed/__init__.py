"""The method: steps along seeds, messages of scalars, the ledger, and the state machines of server and client."""
