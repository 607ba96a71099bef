"""Knobs in other homes: pushed to a hub of models, and pulled from it."""
