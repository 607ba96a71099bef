"""Engines that pack many requests into a step: what they share, one by transformers, and a plugin for vLLM."""
