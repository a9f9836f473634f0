"""Curvature: measured (the Hessian) and bounded, layer by layer."""

from .bound_graph import channel_slopes
from .bounds import certified_radius, curvature_bound, layer_terms, local_bound, normalised_bound, published_bound
from .hessian import geometry, gradient_and_hvp, length
from .premises import SCALARS, evaluating, measuring, prepare, scalar_of
