"""Layers and networks: centered softplus, spectral norms, γ-Lipschitz BatchNorm, ResNets, conversion."""

from .batchnorm import LipschitzBatchNorm2d, refresh_statistics
from .convert import replace_layers, softened, to_low_curvature
from .resnet import BLOCKS, AveragedBlock, OrdinaryBlock, mlp, relu_reading, resnet, vgg11
from .softplus import CenteredSoftplus, beta_of, centered_softplus
from .spectral_norm import SpectralNorm, conv_norm, norms_once_a_step, refresh_norms, spectral_normalize
