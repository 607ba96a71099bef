"""Text and models in: the only caller of the tokenizer, and what loads a model with it."""

from trimtab.render.loading import Loaded, has_model_class, load, load_config, load_empty, model_class
from trimtab.render.pieces import Pieces
from trimtab.render.renderer import Rendered, Renderer

__all__ = [
    "Loaded",
    "Pieces",
    "Rendered",
    "Renderer",
    "has_model_class",
    "load",
    "load_config",
    "load_empty",
    "model_class",
]
