"""LCNN Lab: low-curvature neural networks, taught and reproduced.

<<<<<<< HEAD
Rooms, from the ground up: ``lab`` (device, folders, seeds); ``nn`` and ``data``; ``curvature``, ``attacks``,
``saliency``; ``training``; ``experiments``; and for the notebooks ``studies``, ``figures``, ``explorers``, ``exercises``.
=======
Rooms (import them as ``from lcnn_utils import curvature``; each loads when first used): ``nn`` (the paper's layers,
networks), ``data``, ``curvature``, ``attacks``, ``saliency``, ``training``, ``experiments``, ``studies``, ``figures``,
``explorers`` and ``exercises``.
>>>>>>> room2-curv

Reference: S. Srinivas, K. Matoba, H. Lakkaraju, F. Fleuret, *Efficient Training of Low-Curvature Neural Networks*,
NeurIPS 2022, arXiv:2206.07144.
"""

__version__ = "0.1.0"
