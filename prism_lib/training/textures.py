"""Procedural textures: what an autoencoder should see besides phantoms, so that real films reconstruct too.

Natural images share a few statistics that are cheap to draw: occluding objects (dead leaves), power-law noise, thin
curves and small sharp type. Mixed at radiograph-like contrast they keep a small autoencoder from learning phantoms
by heart.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prism_lib.phantom.anatomy import bezier, stamp


def textures(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Random mixtures of the four textures, (count, 1, size, size) in [0, 1]."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, generator=generator)

    smooth = power_law(count, size, generator)
    leaves = dead_leaves(count, size, generator)
    share = uniform(0, 1)
    image = share * leaves + (1 - share) * (0.5 + uniform(0.08, 0.25) * smooth)
    image = image + uniform(0, 0.05) * power_law(count, size, generator, low=0.8, high=1.6)
    image = image + uniform(-0.1, 0.3) * curves(count, size, generator)
    image = image + uniform(0.0, 0.025) * torch.randn(count, size, size, generator=generator)
    type_ = glyphs(count, size, generator)
    image = torch.maximum(image, type_ * uniform(0.5, 1.0))
    return image.clamp(0, 1)[:, None]


def power_law(count: int, size: int, generator: torch.Generator, low: float = 2.4, high: float = 3.6) -> Tensor:
    """Gaussian noise with spectrum 1 / f^(alpha / 2), alpha uniform in [low, high]; zero mean, unit variance."""
    alpha = low + (high - low) * torch.rand(count, 1, 1, generator=generator)
    fy, fx = torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None, :]
    frequency = (fx.square() + fy.square()).sqrt().clamp(min=1 / size)
    white = torch.fft.rfft2(torch.randn(count, size, size, generator=generator))
    noise = torch.fft.irfft2(white * frequency ** (-alpha / 2), s=(size, size))
    return (noise - noise.mean((1, 2), keepdim=True)) / noise.std((1, 2), keepdim=True)


def dead_leaves(count: int, size: int, generator: torch.Generator, leaves: int = 48) -> Tensor:
    """Opaque ellipses and bars that occlude one another, sizes by a power law; (count, size, size) in [0, 1]."""
    axis = torch.linspace(-1, 1, size)
    x, y = axis[None, None, :], axis[None, :, None]
    image = torch.rand(count, 1, 1, generator=generator).expand(count, size, size).clone()
    for _ in range(leaves):
        u = torch.rand(count, 8, 1, 1, generator=generator)
        dx, dy = x - (2.4 * u[:, 0] - 1.2), y - (2.4 * u[:, 1] - 1.2)
        angle = math.pi * u[:, 2]
        along, across = angle.cos() * dx + angle.sin() * dy, angle.cos() * dy - angle.sin() * dx
        radius = 0.05 / (0.05 + u[:, 3]) ** 0.9 * 0.6
        flat = 0.15 + 0.85 * u[:, 4]
        ellipse = (along / radius).square() + (across / (radius * flat)).square()
        bar = torch.maximum((along / radius).abs(), (across / (radius * flat * 0.3)).abs())
        inside = torch.where(u[:, 5] < 0.7, ellipse, bar.square())
        cover = ((1 - inside) * size * radius * flat * 0.25).clamp(0, 1) * (0.35 + 0.65 * u[:, 7])
        image = image + cover * (u[:, 6] + 0.15 * along - image)
    return image.clamp(0, 1)


def curves(count: int, size: int, generator: torch.Generator, number: int = 5) -> Tensor:
    """Thin bent lines like wires and vessel walls, (count, size, size) in [0, 1]."""
    total = torch.zeros(count, size, size)
    for _ in range(number):
        control = torch.rand(count, 4, 2, generator=generator) * size * 1.2 - 0.1 * size
        radius = (0.4 + 1.8 * torch.rand(count, 1, generator=generator)) * size / 256
        points = bezier(control, 2 * size)
        total = torch.maximum(total, stamp(points, radius.expand(points.shape[:2]), size) / (2 * radius[..., None]))
    return total


def glyphs(count: int, size: int, generator: torch.Generator, number: int = 4) -> Tensor:
    """Rows of letter-like strokes, (count, size, size) in [0, 1]."""
    strokes, t = 5, torch.linspace(0, 1, 24)[:, None]
    points = []
    for _ in range(number):
        corner = torch.rand(count, 1, 1, 2, generator=generator) * size
        height = (5 + 14 * torch.rand(count, 1, 1, 1, generator=generator)) * size / 256
        # Strokes join points of a 3 x 3 grid, as letters do.
        ends = torch.randint(0, 3, (count, strokes, 2, 2), generator=generator) / 2.0
        line = ends[:, :, :1] * (1 - t) + ends[:, :, 1:] * t
        points.append((corner + line * height * torch.tensor([0.65, 1.0])).flatten(1, 2))
    pixels = torch.cat(points, dim=1)
    radius = (0.6 + 0.7 * torch.rand(count, 1, generator=generator)) * size / 256
    chord = stamp(pixels, radius.expand(pixels.shape[:2]), size)
    return (chord / (1.6 * radius[..., None])).clamp(0, 1)
