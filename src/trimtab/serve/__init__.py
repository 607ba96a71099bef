"""The HTTP server: OpenAI's interface with knobs per request, and the playground."""
