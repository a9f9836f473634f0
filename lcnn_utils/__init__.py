"""LCNN Lab: low-curvature neural networks, taught and reproduced.

Rooms (import them as ``from lcnn_utils import curvature``; each loads when first used): ``nn`` (the paper's layers,
networks), ``data``, ``curvature``, ``attacks``, ``saliency``, ``training``, ``experiments``, ``studies``, ``figures``,
``explorers`` and ``exercises``.

Reference: S. Srinivas, K. Matoba, H. Lakkaraju, F. Fleuret, *Efficient Training of Low-Curvature Neural Networks*,
NeurIPS 2022, arXiv:2206.07144.
"""

__version__ = "0.1.0"
