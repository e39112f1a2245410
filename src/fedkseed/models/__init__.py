"""A torch model as base weights plus coefficients: its parameters and their identity, its base, sweeps, binding, loading."""
