"""What a counterfactual is worth: identity, error against the truth, effectiveness, side effects, masks.

What needs a feature space (directional similarity, FID, KID) is in `evaluation.realism`, what a classifier is worth to
groups of patients in `evaluation.robustness`.

Pure functions, tensors in, tensors out. Images are (N, C, H, W) floats in [0, 1], masks (N, 1, H, W)
booleans, a judge's probabilities (N,) or (N, L) in [0, 1]. A metric of images returns one value per image,
(N,), so that the caller can average and `bootstrap_ci` can put an interval around any of them. Nothing is
clipped or repaired here: a wrong shape or range, a NaN or an empty region is an error that names it,
because a silent fix would be a wrong number.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from skimage.metrics import structural_similarity
from torch import Tensor

# --- identity -------------------------------------------------------------------------------------


def l1(images: Tensor, others: Tensor) -> Tensor:
    """Mean |a - b|, (N,): subject identity preservation in the PRISM paper (lower is better)."""
    _check_images(images=images, others=others)
    return (images - others).abs().flatten(1).mean(1)


def masked_l1(images: Tensor, others: Tensor, mask: Tensor, *, outside: bool = False) -> Tensor:
    """Mean |a - b| over the pixels inside ``mask``, or those outside of it, (N,)."""
    _check_images(images=images, others=others)
    region = _region(mask, images, outside)
    difference = (images - others).abs().mean(1, keepdim=True)  # (N, 1, H, W)
    return (difference * region).flatten(1).sum(1) / region.flatten(1).sum(1)


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, (N,): -10 log10 mean (a - b)^2; infinite for identical images."""
    _check_images(images=images, others=others)
    return -10 * torch.log10((images - others).square().flatten(1).mean(1))


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity with a Gaussian window of sigma 1.5 (Wang et al. 2004), (N,); 1 if equal."""
    _check_images(images=images, others=others)
    if min(images.shape[-2:]) < 11:
        raise ValueError(f"SSIM's window needs 11 x 11 pixels, got {tuple(images.shape[-2:])}")
    pairs = zip(images.double().cpu().numpy(), others.double().cpu().numpy(), strict=True)
    values = [
        structural_similarity(
            a,
            b,
            data_range=1.0,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in pairs
    ]
    return torch.tensor(values, dtype=torch.float32, device=images.device)


def ms_ssim(images: Tensor, others: Tensor) -> Tensor:
    """SSIM over five scales (Wang et al. 2003), (N,), by torchmetrics; 1 if equal, at least 161 pixels a side."""
    _check_images(images=images, others=others)
    if min(images.shape[-2:]) < 161:
        raise ValueError(f"five scales of an 11 x 11 window need 161 x 161 pixels, got {tuple(images.shape[-2:])}")
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure  # a second: only here

    return multiscale_structural_similarity_index_measure(images, others, data_range=1.0, reduction="none")


def relative_l1(images: Tensor, original: Tensor, reconstruction: Tensor) -> Tensor:
    """L1 to the original in units of the autoencoder's own error, (N,); 1 is as close as the model can decode.

    Of images after null edits this is *composition*, of images edited and edited back *reversibility* (Monteiro et al.,
    "Measuring axiomatic soundness of counterfactual image models", ICLR 2023); ``reconstruction`` is the autoencoder's.
    """
    return _ratio(l1(images, original), l1(reconstruction, original), "the autoencoder has no error")


# --- against the true counterfactual --------------------------------------------------------------


def true_error_ratio(edited: Tensor, truth: Tensor, original: Tensor, mask: Tensor) -> Tensor:
    """Error to the true counterfactual where pixels had to change, over the original's error there, (N,).

    L1_mask(edited, truth) / L1_mask(original, truth): 0 is the truth, 1 is no edit at all, above 1 is harm.
    """
    return _ratio(
        masked_l1(edited, truth, mask),
        masked_l1(original, truth, mask),
        "the original already equals the true counterfactual inside the mask",
    )


def outside_l1_ratio(edited: Tensor, reconstruction: Tensor, original: Tensor, mask: Tensor) -> Tensor:
    """What an edit costs where nothing had to change, in units of the autoencoder's own error there, (N,).

    L1 outside the mask of (edited, original) over that of (reconstruction, original); ``edited`` is the
    decoded image before the pixel composite, ``reconstruction`` the decoded latents of the original.
    """
    return _ratio(
        masked_l1(edited, original, mask, outside=True),
        masked_l1(reconstruction, original, mask, outside=True),
        "the reconstruction has no error outside the mask",
    )


def minimality(edited: Tensor, truth: Tensor, original: Tensor) -> Tensor:
    """How much an edit changes over how much had to change, (N,): L1(edited, original) / L1(truth, original).

    1 is as much as the truth, more is too much; it does not ask *where* (`localisation` does).
    """
    return _ratio(l1(edited, original), l1(truth, original), "the true counterfactual equals the original")


def localisation(edited: Tensor, original: Tensor, true_mask: Tensor) -> Tensor:
    """Share of all change that lies where pixels had to change, (N,): sum_T |e - o| / sum |e - o|."""
    _check_images(edited=edited, original=original)
    region = _region(true_mask, edited, outside=False)
    change = (edited - original).abs().mean(1, keepdim=True)
    return _ratio((change * region).flatten(1).sum(1), change.flatten(1).sum(1), "the edit changed nothing")


def changed_fraction(edited: Tensor, original: Tensor, region: Tensor) -> Tensor:
    """Share of the region's pixels that differ at all, in any channel, (N,): equality is bit for bit."""
    _check_images(edited=edited, original=original)
    region = _region(region, edited, outside=False)
    changed = (edited != original).any(1, keepdim=True) & region
    return changed.flatten(1).sum(1) / region.flatten(1).sum(1)


def changed_fraction_outside(edited: Tensor, original: Tensor, mask: Tensor) -> Tensor:
    """Share of the pixels outside ``mask`` that differ from the input, (N,); 0 after a pixel composite."""
    _check_mask(mask)
    return changed_fraction(edited, original, ~mask)


def mask_recall(mask: Tensor, true_mask: Tensor) -> Tensor:
    """Share of the pixels that had to change that the mask covers, (N,): |M & T| / |T|."""
    area = _true_area(mask, true_mask)
    return (mask & true_mask).flatten(1).sum(1) / area


def mask_area_ratio(mask: Tensor, true_mask: Tensor) -> Tensor:
    """Area of the mask over the area that had to change, (N,): |M| / |T|."""
    area = _true_area(mask, true_mask)
    return mask.flatten(1).sum(1) / area


def mask_iou(mask: Tensor, true_mask: Tensor) -> Tensor:
    """Intersection over union of the mask and the pixels that had to change, (N,): |M & T| / |M | T|."""
    _true_area(mask, true_mask)
    return (mask & true_mask).flatten(1).sum(1) / (mask | true_mask).flatten(1).sum(1)


# --- by the judge ---------------------------------------------------------------------------------


def flip_rate(before: Tensor, after: Tensor, target: int, threshold: float = 0.5) -> float:
    """Share of edits that flip the judge to the target: P(after reads target | before does not).

    ``before`` and ``after`` are probabilities (N,) of the edited label, ``target`` the value asked for, 0
    or 1. Images that already read as the target cannot flip and do not count (cf. `effectiveness`, Monteiro
    et al. 2023).
    """
    check_probabilities(1, before=before, after=after)
    reads_target = _reads(before, threshold) == bool(_check_target(target))
    if reads_target.all():
        raise ValueError(f"no image can flip: the judge reads {target} on all {len(before)} before the edit")
    flipped = _reads(after, threshold) == bool(target)
    return float(flipped[~reads_target].double().mean())


def counterfactual_prediction_gain(before: Tensor, after: Tensor, target: int) -> Tensor:
    """PRISM's CPG, signed, (N,): how far the judge's probability moves towards the target; at most 1.

    p_after - p_before for target 1, p_before - p_after for target 0. It equals the |difference| of two
    predictions for an edit in the intended direction, and counts against the method in the other, where
    |difference| would not.
    """
    check_probabilities(1, before=before, after=after)
    gain = after - before
    return gain if _check_target(target) == 1 else -gain


def side_effect_rate(before: Tensor, after: Tensor, threshold: float = 0.5) -> Tensor:
    """Share of the other labels that the edit flipped, (N,); probabilities (N, L) of the labels not edited.

    Leave out labels that follow from the edited one by definition, such as "No Finding".
    """
    check_probabilities(2, before=before, after=after)
    return (_reads(before, threshold) != _reads(after, threshold)).float().mean(1)


def effectiveness(after: Tensor, intended: Tensor, threshold: float = 0.5) -> Tensor:
    """Share of counterfactuals on which the judge reads the intended value, per label (L,) (Monteiro et al. 2023).

    ``after`` and ``intended`` are (N, L), the latter 1, 0 or NaN for unknown. All labels count, not the edited one
    alone: a label that was to stay and did not is a failure too.
    """
    check_probabilities(2, after=after)
    if intended.shape != after.shape:
        raise ValueError(f"intended labels {tuple(intended.shape)} for probabilities {tuple(after.shape)}")
    known = (intended == 0) | (intended == 1)
    if not bool(known.any(0).all()):
        raise ValueError(f"no image has a known value of labels {(~known.any(0)).nonzero().flatten().tolist()}")
    right = (_reads(after, threshold) == (intended == 1)) & known
    return right.sum(0) / known.sum(0)


def cout(images: Tensor, edited: Tensor, score: Callable[[Tensor], Tensor], steps: int = 10) -> Tensor:
    """Counterfactual transition score in [-1, 1], (N,) (Khorram & Li, CVPR 2022): how soon the judge follows.

    Changed pixels are handed over in ``steps`` equal shares, the most changed first; ``score`` gives the target's
    probability (N,). With AUPC the area under that curve, COUT = AUPC(target) - AUPC(other) = 2 AUPC - 1.
    """
    _check_images(images=images, edited=edited)
    change = (edited - images).abs().mean(1).flatten(1)  # (N, H W)
    rank = change.argsort(1, descending=True).argsort(1)
    changed = (change > 0).sum(1, keepdim=True)
    curve = []
    for step in range(steps + 1):
        taken = (rank < (changed * step / steps)).view(-1, 1, *images.shape[-2:])
        curve.append(score(torch.where(taken, edited, images)))
    scores = torch.stack(curve)  # (steps + 1, N)
    check_probabilities(2, score=scores)
    return 2 * torch.trapezoid(scores, dim=0) / steps - 1


# --- uncertainty ----------------------------------------------------------------------------------


class Interval(NamedTuple):
    """An estimate with its confidence bounds."""

    estimate: float
    low: float
    high: float

    def named(self, name: str) -> dict[str, float]:
        """As a record keeps it: ``{name, name_low, name_high}``."""
        return {name: self.estimate, f"{name}_low": self.low, f"{name}_high": self.high}


def bootstrap_ci(
    values: Tensor,
    patients: Sequence[Hashable] | None = None,
    statistic: Callable[[Tensor], float | Tensor] = torch.mean,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap over patients (Efron 1979): images of one patient are drawn together.

    Args:
        values: (N,) or (N, K), a row per image; rows are resampled, columns stay together. (N, K, R) holds R runs of
            the same, such as models trained from other seeds: then they are resampled too, independently of patients
            (the pigeonhole bootstrap, Owen 2007), so that the interval also holds what a new training would change.
        patients: the patient of each row; without it every row is its own patient.
        statistic: of the resampled rows, their mean by default.
    """
    if values.ndim not in (1, 2, 3) or not torch.isfinite(values).all():
        raise ValueError(f"values must be finite, (N,), (N, K) or (N, K, R); got shape {tuple(values.shape)}")
    owners = list(range(len(values)) if patients is None else patients)
    if len(owners) != len(values):
        raise ValueError(f"{len(values)} values but {len(owners)} patients")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    rows: dict[Hashable, list[int]] = {}
    for index, owner in enumerate(owners):
        rows.setdefault(owner, []).append(index)
    groups = [np.array(indices) for indices in rows.values()]
    if len(groups) < 2:
        raise ValueError(f"an interval needs at least 2 patients, got {len(groups)}")
    values = values.double().cpu()
    generator = np.random.default_rng(seed)
    draws = generator.integers(len(groups), size=(resamples, len(groups)))
    drawn = (values[torch.from_numpy(np.concatenate([groups[g] for g in draw]))] for draw in draws)
    if values.ndim == 3:
        runs = torch.from_numpy(generator.integers(values.shape[2], size=(resamples, values.shape[2])))
        drawn = (rows[:, :, run] for rows, run in zip(drawn, runs, strict=True))
    estimates = [float(statistic(rows)) for rows in drawn]
    low, high = np.quantile(estimates, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(values)), float(low), float(high))


# --- what may come in -----------------------------------------------------------------------------


def _check_images(**images: Tensor) -> None:
    shapes = {name: tuple(image.shape) for name, image in images.items()}
    for name, image in images.items():
        if image.ndim != 4 or 0 in image.shape:
            raise ValueError(f"{name} must be images (N, C, H, W), got shape {shapes[name]}")
        if not image.is_floating_point():
            raise ValueError(f"{name} must be floats in [0, 1], got {image.dtype}")
        low, high = image.min().item(), image.max().item()
        if not (low >= 0 and high <= 1):  # also catches NaN, which min and max pass on
            raise ValueError(f"{name} must lie in [0, 1], got values from {low:.4g} to {high:.4g}")
    if len(set(shapes.values())) > 1:
        raise ValueError(f"images differ in shape: {shapes}")


def _check_mask(mask: Tensor) -> None:
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1:
        raise ValueError(f"a mask must be boolean (N, 1, H, W), got {mask.dtype} of shape {tuple(mask.shape)}")


def _region(mask: Tensor, images: Tensor, outside: bool) -> Tensor:
    _check_mask(mask)
    if mask.shape[0] != images.shape[0] or mask.shape[-2:] != images.shape[-2:]:
        raise ValueError(f"mask of shape {tuple(mask.shape)} for images of shape {tuple(images.shape)}")
    region = ~mask if outside else mask
    empty = (~region.flatten(1).any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"the region {'outside' if outside else 'inside'} the mask is empty for images {empty}")
    return region


def _true_area(mask: Tensor, true_mask: Tensor) -> Tensor:
    _check_mask(mask)
    _check_mask(true_mask)
    if mask.shape != true_mask.shape:
        raise ValueError(f"masks differ in shape: {tuple(mask.shape)} and {tuple(true_mask.shape)}")
    area = true_mask.flatten(1).sum(1)
    if (area == 0).any():
        raise ValueError(f"the true mask is empty for images {(area == 0).nonzero().flatten().tolist()}")
    return area


def _ratio(numerator: Tensor, denominator: Tensor, empty: str) -> Tensor:
    zero = (denominator == 0).nonzero().flatten().tolist()
    if zero:
        raise ValueError(f"{empty}: images {zero}")
    return numerator / denominator


def check_probabilities(ndim: int, **probabilities: Tensor) -> None:
    """Raise ValueError, by name, for what is not probabilities (N,) or (N, L) of one shape."""
    shapes = {name: tuple(values.shape) for name, values in probabilities.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"probabilities differ in shape: {shapes}")
    for name, values in probabilities.items():
        if values.ndim != ndim or values.numel() == 0:
            raise ValueError(f"{name} must be {'(N,)' if ndim == 1 else '(N, L)'}, got shape {shapes[name]}")
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"{name} must be probabilities in [0, 1], without NaN")


def _check_target(target: int) -> int:
    if target not in (0, 1):
        raise ValueError(f"target must be 0 or 1, got {target!r}")
    return target


def _reads(probabilities: Tensor, threshold: float) -> Tensor:
    return probabilities >= threshold
