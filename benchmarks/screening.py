"""Which films show devices: NIH does not label them, and pairs of films need backgrounds without them.

A classifier learns rendered devices against films as they are, on one half of the patients, and reads the other half.
Films that it takes for films with devices leave the training set of the next round. It neither guides nor judges edits.
From a terminal: ``python -m benchmarks.screening DATA_ROOT SCREENED.csv``.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from prism_lib.data.chest import DEVICES
from prism_lib.data.folder import load_table, read_images
from prism_lib.data.preparation import PrepareConfig, prepare
from prism_lib.data.tables import seeded_order
from prism_lib.files import atomic
from prism_lib.models.classifier import ClassifierConfig, predict, train_classifier

logger = logging.getLogger(__name__)

SHOWS = 0.5  # from this probability on a film counts as one with devices, below it as clean


def screen(folder: Path, config: ClassifierConfig, rounds: int = 2, seed: int = 0) -> pd.DataFrame:
    """A row per film of a prepared folder of "films": file_name of the source, probability, "Support Devices".

    The last is 1, or 0 for films taken upright (PA), or missing: most films taken at the bedside (AP) show devices that
    are too thin for the classifier. Halves are by patient.
    """
    if rounds < 1:
        raise ValueError(f"screening needs at least one round, got {rounds}")
    table = load_table(folder)
    if not {"copy", "rendered", "view"} <= set(table.columns):
        raise ValueError(f"{folder} does not hold films with rendered devices: prepare the data set 'films'")
    table = table[table["copy"] == 0].reset_index(drop=True)
    images = (read_images(folder, table) * 255).round().byte()
    order = seeded_order(table["patient_id"], seed)
    half = table["patient_id"].astype(str).map({patient: place % 2 for place, patient in enumerate(order)})
    probability = pd.Series(0.0, index=table.index)
    for number in range(rounds):
        kept = table["rendered"] | (probability < SHOWS)
        found = probability.copy()
        for part in (0, 1):
            learn, read = (half != part) & kept, (half == part) & ~table["rendered"]
            labels = torch.tensor(table.loc[learn, "rendered"].to_numpy(dtype=float))[:, None]
            model = train_classifier(images[learn.to_numpy()], labels, config)
            probabilities = predict(model, images[read.to_numpy()])[:, 0].tolist()
            found = found.mask(read, pd.Series(probabilities, table.index[read]))
        probability = found
        logger.info(
            "round %d: %.1f %% of the films show devices", number + 1, 100 * (found[~table["rendered"]] >= SHOWS).mean()
        )
    films = table[~table["rendered"]].assign(probability=probability.round(4))
    shows = films["probability"] >= SHOWS
    films[DEVICES] = shows.astype(float).where(shows | (films["view"] == "PA"))
    named = films[["source_file", "probability", DEVICES]].reset_index(drop=True)
    return named.set_axis(["file_name", "probability", DEVICES], axis=1)


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m benchmarks.screening DATA_ROOT SCREENED.csv``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_root", type=Path, help="folder in NIH's format")
    parser.add_argument("output", type=Path, help="table to write")
    parser.add_argument("--size", type=int, default=192, help="pixels of the images that the classifier reads")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=4)
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO)
    config = ClassifierConfig(labels=(DEVICES,), epochs=given.epochs)
    if given.output.is_dir():
        parser.error(f"{given.output} is a folder; name the table to write")
    with atomic(given.output) as partial, tempfile.TemporaryDirectory() as folder:
        partial.touch()  # a place that cannot be written is found before the work
        films = PrepareConfig("films", Path(folder) / "films", given.data_root, size=given.size, num_images=10**6)
        screen(prepare(films), config, given.rounds).to_csv(partial, index=False)


if __name__ == "__main__":
    main()
