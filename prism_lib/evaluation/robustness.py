"""What a classifier is worth to groups of patients: worst-group accuracy, equalised odds, calibration, agreement.

Tensors in, numbers out. Probabilities, labels (0 or 1) and groups (whole numbers) are (N,), a row per image. A group
without images, a NaN or a single class is an error that names it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from prism_lib.evaluation.metrics import check_probabilities


def group_accuracy(
    probabilities: Tensor, labels: Tensor, groups: Tensor, expected: Sequence[int] = (), threshold: float = 0.5
) -> dict[int, float]:
    """Accuracy in each group; one of the ``expected`` groups without an image is an error."""
    _check(probabilities, labels, groups)
    if empty := sorted(set(expected) - set(groups.unique().tolist())):
        raise ValueError(f"no image in groups {empty}")
    right = ((probabilities >= threshold) == (labels == 1)).double()
    return {int(group): float(right[groups == group].mean()) for group in groups.unique()}


def worst_group_accuracy(
    probabilities: Tensor, labels: Tensor, groups: Tensor, expected: Sequence[int] = (), threshold: float = 0.5
) -> float:
    """The lowest of the groups' accuracies (Sagawa et al., ICLR 2020)."""
    return min(group_accuracy(probabilities, labels, groups, expected, threshold).values())


def equalised_odds_difference(
    probabilities: Tensor, labels: Tensor, attribute: Tensor, threshold: float = 0.5
) -> float:
    """max over y of |P(reads 1 | y, a = 1) - P(reads 1 | y, a = 0)| (Hardt et al., NeurIPS 2016); 0 is fair.

    ``attribute`` (N,) is 0 or 1. All four combinations of label and attribute must occur.
    """
    _check(probabilities, labels, attribute)
    gaps = []
    for value in (0, 1):
        rates = []
        for side in (0, 1):
            chosen = (labels == value) & (attribute == side)
            if not chosen.any():
                raise ValueError(f"no image has label {value} and attribute {side}")
            rates.append((probabilities[chosen] >= threshold).double().mean())
        gaps.append(abs(float(rates[1] - rates[0])))
    return max(gaps)


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 10) -> float:
    """Expected calibration error over equal bins (Guo et al., ICML 2017), by torchmetrics; 0 is best."""
    _check(probabilities, labels)
    return float(binary_calibration_error(probabilities.float().contiguous(), labels.long(), n_bins=bins, norm="l1"))


def agreement(probabilities: Tensor, others: Tensor, threshold: float = 0.5) -> float:
    """Share of readings, over images and labels (N, L), on which two judges agree; 1 is always."""
    check_probabilities(2, probabilities=probabilities, others=others)
    return float(((probabilities >= threshold) == (others >= threshold)).double().mean())


def _check(probabilities: Tensor, labels: Tensor, groups: Tensor | None = None) -> None:
    check_probabilities(1, probabilities=probabilities)
    for name, values in (("labels", labels), ("groups", groups)):
        if values is not None and values.shape != probabilities.shape:
            raise ValueError(f"{name} of shape {tuple(values.shape)} for {len(probabilities)} probabilities")
    if not bool(((labels == 0) | (labels == 1)).all()):
        raise ValueError(f"labels must be 0 or 1, got {sorted(set(torch.unique(labels).tolist()) - {0, 1})}")
