"""Two judges of different architecture: `python -m benchmarks.judges` writes figures/phantom/judges.json.

The shipped DenseNet and a ResNet-18, trained here by the same code on phantoms that neither an edit nor the
tests use, read the same held-out phantoms: AUC per label of both, and how often they agree. The second judge's weights
are left in PRISM_RUNS/judges/.
"""

import argparse

import torch

from prism_lib import paths, records
from prism_lib.evaluation import metrics
from prism_lib.evaluation.evaluate import load_judge
from prism_lib.models import classifier
from prism_lib.phantom.patients import render, sample_patients

SIZE, TRAIN, TEST, STEPS = 256, 1200, 300, 300
# The judge's own training phantoms and the prepared folders have other seeds.
TRAIN_SEED, TEST_SEED = 30_001, 30_002


def draw(count: int, seed: int, labels: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rendered phantoms, uint8 (N, 1, H, W), and their labels (N, L)."""
    patients = sample_patients(count, seed)
    values = patients.labels()[list(labels)].to_numpy(dtype=float)
    return (render(patients, SIZE) * 255).round().byte(), torch.tensor(values.tolist())


def areas(values: torch.Tensor, labels: torch.Tensor, names: tuple[str, ...]) -> dict[str, float]:
    """AUC per label of probabilities and labels (N, L)."""
    pairs = torch.stack([values, labels.to(values)], 1)
    return {name: metrics.auc(pairs[..., column]) for column, name in enumerate(names)}


def main() -> None:
    """Train the second judge, let both read, and record."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    first = load_judge("phantom-judge")
    assert first is not None
    config = classifier.named_network("resnet18", classifier.ClassifierConfig(labels=first.labels, steps=STEPS))
    with records.Timer() as timer:
        second = classifier.train_classifier(*draw(TRAIN, TRAIN_SEED, first.labels), config)
        classifier.save_classifier(second, config, paths.runs() / "judges" / "resnet18")
        images, labels = draw(TEST, TEST_SEED, first.labels)
        read = {"densenet": first.read(images), "resnet": classifier.Classifier(second, first.labels).read(images)}
    records.record(
        "judges",
        dataset="phantom",
        notebook="benchmarks/judges.py",
        parameters={"second": config, "size": SIZE, "train": TRAIN, "test": TEST},
        seed=TRAIN_SEED,
        metrics={
            "agreement": 1 - metrics.side_effect_rate(read["densenet"], read["resnet"]).double().mean().item(),
            **{f"auc_{name}": areas(values, labels, first.labels) for name, values in read.items()},
        },
        model="phantom-judge",
        seconds=timer.seconds,
    )


if __name__ == "__main__":
    main()
