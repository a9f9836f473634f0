"""Curvature: measured (the Hessian) and bounded, layer by layer."""

from .bound_graph import channel_slopes
from .bounds import certified_radius, curvature_bound, layer_terms, local_bound, normalised_bound, published_bound
from .hessian import geometry, gradient_and_hvp, length
from .premises import SCALARS, evaluating, measuring, prepare, scalar_of

__all__ = ["SCALARS", "certified_radius", "channel_slopes", "curvature_bound", "evaluating", "geometry"]
__all__ += ["gradient_and_hvp", "layer_terms", "length", "local_bound", "measuring", "normalised_bound", "prepare"]
__all__ += ["published_bound", "scalar_of"]
