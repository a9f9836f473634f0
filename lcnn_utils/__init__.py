"""LCNN Lab: low-curvature neural networks, taught and reproduced.

Rooms, from the ground up: ``lab`` (device, folders, seeds); ``nn`` and ``data``; ``curvature``, ``attacks``,
``saliency``; ``training``; ``experiments``; and for the notebooks ``measurements``,
``figures``, ``widgets``, ``exercises``.

Reference: S. Srinivas, K. Matoba, H. Lakkaraju, F. Fleuret, *Efficient Training of Low-Curvature Neural Networks*,
NeurIPS 2022, arXiv:2206.07144.
"""

__version__ = "0.1.0"
