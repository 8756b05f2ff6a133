"""Capture: hooks, streaming statistics, the stage that runs a model, and the driver."""
