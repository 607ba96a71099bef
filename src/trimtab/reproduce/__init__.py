"""Published claims re-measured under one protocol: settings from a recipe file, a table, plots, and what holds."""
