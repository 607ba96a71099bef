"""transformers' continuous batching with knobs per request: many requests in one step, on a machine without vLLM."""
