"""Metrics in a feature space: direction of an edit against its words, and distances between sets of images.

Features are (N, D) floats. For medical images they should come from a network of the domain, such as the judge's last
layer (`classifier.features`), and not from one trained on photographs; distances compare within one network only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity


def directional_similarity(
    image_before: Tensor, image_after: Tensor, text_before: Tensor, text_after: Tensor
) -> Tensor:
    """cos(I_after - I_before, T_after - T_before), (N,) (Gal et al., StyleGAN-NADA, 2022); 0 if either stands still.

    Embeddings (N, D) of one image-text model; they are normalised first, as CLIP compares directions on the sphere.
    """
    embeddings = (image_before, image_after, text_before, text_after)
    if len({embedding.shape for embedding in embeddings}) != 1:
        raise ValueError(f"embeddings differ in shape: {[tuple(embedding.shape) for embedding in embeddings]}")
    for embedding in embeddings:
        _check(embedding, 1)
    before, after, source, target = (embedding / embedding.norm(dim=-1, keepdim=True) for embedding in embeddings)
    return cosine_similarity(after - before, target - source, dim=-1)


def fid(features: Tensor, others: Tensor) -> float:
    """Frechet distance of two Gaussians fitted to the features (Heusel et al., NeurIPS 2017), by MONAI; 0 is equal.

    Biased for few images (fewer than features, and the covariance is singular): compare sets of one size, or use `kid`.
    """
    from monai.metrics.fid import get_fid_score  # seconds: only where it is asked

    _check(features, 2)
    _check(others, 2)
    return max(0.0, float(get_fid_score(features, others)))


def kid(features: Tensor, others: Tensor, *, subsets: int = 100, subset_size: int = 50, seed: int = 0) -> float:
    """Kernel inception distance: mean unbiased MMD^2 of (x.y / D + 1)^3 over subsets (Binkowski et al., ICLR 2018)."""
    from torchmetrics.image.kid import poly_mmd  # a second: only where it is asked

    for values in (features, others):
        _check(values, subset_size)
    generator, draws = torch.Generator().manual_seed(seed), []
    for _ in range(subsets):
        chosen = [
            values[torch.randperm(len(values), generator=generator)[:subset_size]] for values in (features, others)
        ]
        draws.append(poly_mmd(*chosen))
    return float(torch.stack(draws).mean())


def _check(features: Tensor, least: int) -> None:
    if features.ndim != 2 or len(features) < least:
        raise ValueError(f"need features (N, D) of at least {least} images, got shape {tuple(features.shape)}")
    if not bool(torch.isfinite(features).all()):
        bad = (~torch.isfinite(features)).any(1).nonzero().flatten().tolist()
        raise ValueError(f"features of images {bad} are not finite")
