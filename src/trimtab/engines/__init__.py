"""Fast engines with knobs per request: what they share, and a plugin for vLLM."""
