"""A run: its settings, its folder, its records and events, and what drives its rounds."""
