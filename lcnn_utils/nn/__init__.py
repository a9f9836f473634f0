"""Layers and networks: centered softplus, spectral norms, γ-Lipschitz BatchNorm, ResNets, conversion."""

from .batchnorm import LipschitzBatchNorm2d, refresh_statistics
from .convert import replace_layers, softened, to_low_curvature
from .resnet import BLOCKS, AveragedBlock, OrdinaryBlock, mlp, relu_reading, resnet, vgg11
from .softplus import CenteredSoftplus, beta_of, centered_softplus
from .spectral_norm import SpectralNorm, conv_norm, norms_once_a_step, refresh_norms, sigma_error, spectral_normalize

__all__ = [
    "BLOCKS", "AveragedBlock", "CenteredSoftplus", "LipschitzBatchNorm2d", "OrdinaryBlock", "SpectralNorm", "beta_of",
    "centered_softplus", "conv_norm", "mlp", "norms_once_a_step", "refresh_norms", "refresh_statistics", "relu_reading",
    "replace_layers", "resnet", "sigma_error", "softened", "spectral_normalize", "to_low_curvature",
    "vgg11",
]  # fmt: skip
