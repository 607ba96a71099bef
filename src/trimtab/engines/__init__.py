"""Engines for many: knobs per request in vLLM, and learning on many workers."""
