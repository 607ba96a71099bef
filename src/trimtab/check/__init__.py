"""Is this model's residual stream read and written where we think? On a real model, or a random twin of it."""

from trimtab.check.conformance import CHECKS, Finding, Report, check
from trimtab.check.trace import Trace, tracing
from trimtab.check.twin import default_config, twin

__all__ = ["CHECKS", "Finding", "Report", "Trace", "check", "default_config", "tracing", "twin"]
