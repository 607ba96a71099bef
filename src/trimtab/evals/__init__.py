"""Graders, the sandbox for model-written code, tasks, statistics and reports."""
