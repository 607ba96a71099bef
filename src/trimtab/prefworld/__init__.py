"""PrefWorld: a bundled world whose preferences are known exactly and graded by programs."""
