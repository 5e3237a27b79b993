"""A lossless transform in the place of an autoencoder, so that a diffusion model redraws pixels and loses none."""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn


class HaarAutoencoder(AutoencoderKL):
    """Haar wavelets (Haar, 1910) of gray images: cells of f x f pixels become f * f channels, and back without loss.

    Of `AutoencoderKL` it has the interface alone. ``block_out_channels`` are the channels after each halving, from 1
    on. Scaled latents are the orthonormal transform of pixels in [-1, 1], times ``scaling_factor``.
    """

    @register_to_config
    def __init__(
        self,
        block_out_channels: tuple[int, ...] = (1, 4, 16),
        in_channels: int = 3,
        out_channels: int = 3,
        scaling_factor: float = 4.0,
        shift_factor: float | None = None,
        sample_size: int = 512,
        latent_channels: int = 16,
    ) -> None:
        ModelMixin.__init__(self)
        if tuple(block_out_channels) != tuple(4**k for k in range(len(block_out_channels))):
            raise ValueError(f"block_out_channels must be 1, 4, 16, ...; got {tuple(block_out_channels)}")
        basis, mean, difference = torch.ones(1, 1), torch.tensor([1.0, 1.0]), torch.tensor([1.0, -1.0])
        for _ in block_out_channels[1:]:  # means of the coarser basis, then differences of neighbours
            both = [torch.kron(basis, mean), torch.kron(torch.eye(len(basis)), difference)]
            basis = F.normalize(torch.cat(both), dim=1)
        kernels = torch.einsum("iy,jx->ijyx", basis, basis).flatten(0, 1)[:, None]
        self.kernels = nn.Parameter(kernels, requires_grad=False)  # (channels, 1, f, f)

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """The transform of (N, C, H, W), as a distribution without spread; colours are averaged."""
        mean = F.conv2d(x.mean(1, keepdim=True), self.kernels, stride=self.kernels.shape[-1])
        posterior = DiagonalGaussianDistribution(torch.cat([mean, torch.zeros_like(mean)], dim=1), deterministic=True)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """The inverse transform, gray in all ``out_channels``."""
        gray = F.conv_transpose2d(z, self.kernels, stride=self.kernels.shape[-1])
        image = gray.expand(-1, self.config.out_channels, -1, -1)
        return DecoderOutput(sample=image) if return_dict else (image,)
