"""Curvature: measured (the Hessian) and bounded, layer by layer."""

from .bound_graph import channel_slopes
from .bounds import certified_radius, curvature_bound, layer_terms, local_bound, normalised_bound, published_bound
from .hessian import SCALARS, evaluating, geometry, gradient_and_hvp, measuring, scalar_of, top_direction

__all__ = [
    "SCALARS",
    "certified_radius",
    "channel_slopes",
    "curvature_bound",
    "evaluating",
    "geometry",
    "gradient_and_hvp",
    "layer_terms",
    "local_bound",
    "measuring",
    "normalised_bound",
    "published_bound",
    "scalar_of",
    "top_direction",
]
