"""What no editor can know: `python -m benchmarks.identifiability` writes figures/phantom/identifiability.json.

For every edit of 03_counterfactuals, how far the true counterfactuals of patients with one and the same image differ
(`prism_lib.identifiability`): the error, and the mask's recall, of a fair draw of the answers that an image allows.
"""

import argparse

import pandas as pd

from prism_lib import identifiability, phantom, results
from prism_lib.evaluation import interval
from prism_lib.prompts import Edit, vocabulary

SIZE, SEED, POOL = 256, 2030, 400
COLUMNS = ("true_error_ratio", "blend_error_ratio", "mask_recall", "mask_area_ratio")
FINDINGS = ("support_devices", "pleural_effusion", "cardiomegaly")


def main() -> None:
    """Measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=16, help="patients for each edit")
    parser.add_argument("--twins", type=int, default=8, help="twins drawn for each patient")
    options = parser.parse_args()
    pool = phantom.sample_patients(POOL, SEED)
    found = {}
    with results.Timer() as timer:
        for verb, before in (("remove", 1), ("add", 0)):
            for finding in FINDINGS:
                edit = Edit.from_key(f"{verb}_{finding}", vocabulary("phantom"))
                suited = (pool.attributes[finding] == before).nonzero().flatten().tolist()[: options.patients]
                table = identifiability.ambiguity(pool[suited], SIZE, options.twins, SEED, **edit.attributes)
                found[edit.key] = summary(table)
    results.record(
        "identifiability",
        dataset="phantom",
        notebook="benchmarks/identifiability.py",
        parameters={"size": SIZE, "patients": options.patients, "twins": options.twins},
        seed=SEED,
        metrics=found,
        model="none",
        seconds=timer.seconds,
    )


def summary(table: pd.DataFrame) -> dict[str, float]:
    """Means over patients with intervals."""
    values = {"images": float(len(table))}
    for column in COLUMNS:
        values |= interval(column, table[column], table["patient_id"], SEED)
    return values


if __name__ == "__main__":
    main()
