"""Metrics of edits and of classifiers, and their intervals: pure functions of tensors.

Images are (N, C, H, W) floats in [0, 1], masks (N, 1, H, W) booleans, probabilities (N,) or (N, L), labels (0 or 1)
and groups (N,). A metric of images has one value per image. Wrong shapes or ranges, NaN and empty regions are errors.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from skimage.metrics import structural_similarity
from torch import Tensor
from torch.nn.functional import cosine_similarity

from prism_lib.files import check_images

ROUNDING = 1 / 1020  # mean error of rounding gray to 8 bits: the least that an autoencoder's error counts as


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


def ssim(images: Tensor, others: Tensor) -> Tensor:
    """Structural similarity with a Gaussian window of sigma 1.5 (Wang et al. 2004), (N,); 1 if equal."""
    _check_images(images=images, others=others)
    if min(images.shape[-2:]) < 11:
        raise ValueError(f"SSIM's window needs 11 x 11 pixels, got {tuple(images.shape[-2:])}")
    pairs = zip(images.double().cpu().numpy(), others.double().cpu().numpy(), strict=True)
    how = {"data_range": 1.0, "channel_axis": 0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    values = [structural_similarity(a, b, **how) for a, b in pairs]
    return torch.tensor(values, dtype=torch.float32, device=images.device)


def relative_l1(images: Tensor, original: Tensor, reconstruction: Tensor) -> Tensor:
    """L1 to the original in units of the autoencoder's own error, (N,); 1 is as close as the model can decode.

    Of images after null edits this is *composition*, of images edited and edited back *reversibility* (Monteiro et al.,
    "Measuring axiomatic soundness of counterfactual image models", ICLR 2023); ``reconstruction`` is the autoencoder's.
    """
    return l1(images, original) / l1(reconstruction, original).clamp(min=ROUNDING)


def true_error_ratio(edited: Tensor, truth: Tensor, original: Tensor, mask: Tensor) -> Tensor:
    """L1_mask(edited, truth) / L1_mask(original, truth), (N,): 0 is the truth, 1 is no edit at all, above 1 is harm."""
    unedited = masked_l1(original, truth, mask)
    if equal := (unedited == 0).nonzero().flatten().tolist():
        raise ValueError(f"the original already equals the true counterfactual inside the mask: images {equal}")
    return masked_l1(edited, truth, mask) / unedited


def outside_l1_ratio(edited: Tensor, reconstruction: Tensor, original: Tensor, mask: Tensor) -> Tensor:
    """L1 of the decoded edit where nothing had to change, in units of the autoencoder's own error there, (N,).

    Of a lossless autoencoder the unit is the mean error of rounding to 8 bits.
    """
    cost, own = (masked_l1(images, original, mask, outside=True) for images in (edited, reconstruction))
    return cost / own.clamp(min=ROUNDING)


def changed_fraction_outside(edited: Tensor, original: Tensor, mask: Tensor) -> Tensor:
    """Share of the pixels outside ``mask`` that differ from the input in any channel, bit for bit, (N,); 0 of none."""
    _check_images(edited=edited, original=original)
    _check_mask(mask)
    changed = (edited != original).any(1, keepdim=True) & ~mask
    return changed.flatten(1).sum(1) / (~mask).flatten(1).sum(1).clamp(min=1)


def mask_recall(mask: Tensor, true_mask: Tensor) -> Tensor:
    """Share of the pixels that had to change that the mask covers, (N,): |M & T| / |T|."""
    _check_mask(mask)
    region = _region(true_mask, mask)
    return (mask & region).flatten(1).sum(1) / region.flatten(1).sum(1)


def mask_area_ratio(mask: Tensor, true_mask: Tensor) -> Tensor:
    """Area of the mask over the area that had to change, (N,): |M| / |T|."""
    _check_mask(mask)
    return mask.flatten(1).sum(1) / _region(true_mask, mask).flatten(1).sum(1)


def counterfactual_prediction_gain(before: Tensor, after: Tensor, target: int) -> Tensor:
    """PRISM's CPG, signed, (N,): how far the judge's probability moves towards the target (0 or 1); at most 1."""
    _check_probabilities(1, before=before, after=after)
    if target not in (0, 1):
        raise ValueError(f"target must be 0 or 1, got {target!r}")
    return after - before if target == 1 else before - after


def side_effect_rate(before: Tensor, after: Tensor) -> Tensor:
    """Share of the labels (N, L), none of which may follow from the edited one, that the edit flipped, (N,)."""
    _check_probabilities(2, before=before, after=after)
    return ((before >= 0.5) != (after >= 0.5)).float().mean(1)


def directional_similarity(before: Tensor, after: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """cos(I_after - I_before, T_target - T_source) of unit vectors, (N,) (Gal et al., 2022); 0 if one stands still."""
    embeddings = (before, after, source, target)
    if bad := (~torch.cat(embeddings, 1).isfinite()).any(1).nonzero().flatten().tolist():
        raise ValueError(f"embeddings of images {bad} are not finite")
    before, after, source, target = (embedding / embedding.norm(dim=-1, keepdim=True) for embedding in embeddings)
    return cosine_similarity(after - before, target - source, dim=-1)


def kid(features: Tensor, others: Tensor) -> float:
    """Kernel inception distance of (N, D) and (M, D), unbiased (Bińkowski et al., ICLR 2018); about 0 for equals."""
    x, y = _check_features(features, others)
    within = [((gram := _cubic(z, z)).sum() - gram.trace()) / (len(z) * (len(z) - 1)) for z in (x, y)]
    return float(sum(within) - 2 * _cubic(x, y).mean())


def fid(features: Tensor, others: Tensor) -> float:
    """Fréchet inception distance of (N, D) and (M, D) (Heusel et al., NeurIPS 2017); the fewer images, the larger."""
    x, y = _check_features(features, others)
    a, b = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))  # covariances are a'a and b'b
    root = torch.linalg.matrix_norm(a @ b.T, "nuc")  # the trace of (a'a b'b)^(1/2)
    return float((x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * root)


def group_accuracy(
    probabilities: Tensor, labels: Tensor, groups: Tensor, expected: Sequence[int] = ()
) -> dict[int, float]:
    """Accuracy in each group; one of the ``expected`` groups without an image is an error."""
    _check_groups(probabilities, labels, groups)
    if empty := sorted(set(expected) - set(groups.unique().tolist())):
        raise ValueError(f"no image in groups {empty}")
    right = ((probabilities >= 0.5) == (labels == 1)).double()
    return {int(group): float(right[groups == group].mean()) for group in groups.unique()}


def equalised_odds_difference(probabilities: Tensor, labels: Tensor, attribute: Tensor) -> float:
    """max over y of |P(reads 1 | y, a = 1) - P(reads 1 | y, a = 0)| (Hardt et al., NeurIPS 2016); 0 is fair."""
    right = group_accuracy(probabilities, labels, 2 * labels + attribute, range(4))  # differs as what is read does
    return max(abs(right[2 * label + 1] - right[2 * label]) for label in (0, 1))


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Expected calibration error over ten equal bins (Guo et al., ICML 2017), by torchmetrics; 0 is best."""
    from torchmetrics.functional.classification import binary_calibration_error  # two seconds: only here

    _check_groups(probabilities, labels)
    return float(binary_calibration_error(probabilities.float().contiguous(), labels.long(), n_bins=10, norm="l1"))


def auc(readings: Tensor) -> float:
    """Area under the ROC curve of probabilities and labels, 0 or 1, (N, 2); NaN where one class occurs."""
    positive, negative = (readings[readings[:, 1] == value, 0].sort().values for value in (1, 0))
    below = torch.searchsorted(negative, positive) + torch.searchsorted(negative, positive, right=True)
    return float(below.double().mean() / (2 * len(negative)))


LEVEL, RESAMPLES = 0.95, 2000
Statistic = Callable[[Tensor], float | Tensor]


class Interval(NamedTuple):
    """An estimate with its confidence bounds."""

    estimate: float
    low: float
    high: float

    def named(self, name: str) -> dict[str, float]:
        """As a record keeps it: ``{name, name_low, name_high}``."""
        return {name: self.estimate, f"{name}_low": self.low, f"{name}_high": self.high}


def bootstrap_ci(
    values: Tensor, patients: Sequence[Hashable] | None = None, statistic: Statistic = torch.mean, *, seed: int = 0
) -> Interval:
    """95 % percentile bootstrap over patients (Efron 1979) of a statistic of ``values`` (N,) or (N, K), N images.

    Rows of one patient are drawn together; without ``patients`` every row is its own. (N, K, R) holds R runs, such as
    models of other seeds, resampled independently of patients (pigeonhole bootstrap, Owen 2007). NaN draws drop out.
    """
    if values.ndim not in (1, 2, 3) or not torch.isfinite(values).all():
        raise ValueError(f"values must be finite, (N,), (N, K) or (N, K, R); got shape {tuple(values.shape)}")
    owners = list(range(len(values)) if patients is None else patients)
    if len(owners) != len(values):
        raise ValueError(f"{len(values)} values but {len(owners)} patients")
    groups = [*pd.Series(owners).groupby(owners, sort=False, dropna=False).indices.values()]
    if len(groups) < 2:
        raise ValueError(f"an interval needs at least 2 patients, got {len(groups)}")
    values = values.double().cpu()
    generator = np.random.default_rng(seed)
    draws = generator.integers(len(groups), size=(RESAMPLES, len(groups)))
    drawn = (values[torch.from_numpy(np.concatenate([groups[g] for g in draw]))] for draw in draws)
    if values.ndim == 3:
        runs = torch.from_numpy(generator.integers(values.shape[2], size=(RESAMPLES, values.shape[2])))
        drawn = (rows[:, :, run] for rows, run in zip(drawn, runs, strict=True))
    estimates = [float(statistic(rows)) for rows in drawn]
    low, high = np.nanquantile(estimates, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(statistic(values)), float(low), float(high))


def _check_images(**images: Tensor) -> None:
    for name, image in images.items():
        check_images(image, name=name)
    shapes = {name: tuple(image.shape) for name, image in images.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"images differ in shape: {shapes}")


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _check_features(*features: Tensor) -> list[Tensor]:
    """The same in double precision; ValueError unless they have one width and two rows each."""
    shapes = [tuple(each.shape) for each in features]
    if {len(shape) for shape in shapes} != {2} or len({shape[1] for shape in shapes}) > 1 or min(shapes)[0] < 2:
        raise ValueError(f"features must be (N, D) and (M, D) of two images or more, got {shapes}")
    return [each.double() for each in features]


def _check_mask(mask: Tensor) -> None:
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1:
        raise ValueError(f"a mask must be boolean (N, 1, H, W), got {mask.dtype} of shape {tuple(mask.shape)}")


def _region(mask: Tensor, images: Tensor, outside: bool = False) -> Tensor:
    """The pixels inside or outside a mask for images or masks; ValueError where there are none."""
    _check_mask(mask)
    if mask.shape[0] != images.shape[0] or mask.shape[-2:] != images.shape[-2:]:
        raise ValueError(f"mask of shape {tuple(mask.shape)} for images of shape {tuple(images.shape)}")
    region = ~mask if outside else mask
    if empty := (~region.flatten(1).any(1)).nonzero().flatten().tolist():
        raise ValueError(f"the region {'outside' if outside else 'inside'} the mask is empty for images {empty}")
    return region


def _check_probabilities(ndim: int, **probabilities: Tensor) -> None:
    shapes = {name: tuple(values.shape) for name, values in probabilities.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"probabilities differ in shape: {shapes}")
    for name, values in probabilities.items():
        if values.ndim != ndim or values.numel() == 0:
            raise ValueError(f"{name} must be {'(N,)' if ndim == 1 else '(N, L)'}, got shape {shapes[name]}")
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"{name} must be probabilities in [0, 1], without NaN")


def _check_groups(probabilities: Tensor, labels: Tensor, groups: Tensor | None = None) -> None:
    _check_probabilities(1, probabilities=probabilities)
    for name, values in (("labels", labels), ("groups", groups)):
        if values is not None and values.shape != probabilities.shape:
            raise ValueError(f"{name} of shape {tuple(values.shape)} for {len(probabilities)} probabilities")
    if not bool(((labels == 0) | (labels == 1)).all()):
        raise ValueError(f"labels must be 0 or 1, got {sorted(set(torch.unique(labels).tolist()) - {0, 1})}")
