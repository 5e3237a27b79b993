"""A judge of one's own data, trained from nothing: writes the record `own_judge`.

    OMP_NUM_THREADS=2 python -m benchmarks.own_judge PREPARED_FOLDER [--labels A B] [--steps N] [--minimum 0.8]

What `JUDGE = "train"` does in 03, and nothing that an earlier run has kept: the classifier learns on the split `train`,
and its AUC on held-out patients has a 95 % interval over patients. `judged` is 1 for labels that pass the gate
`JUDGE_MIN_AUC` (``--minimum``); the benchmark fails if the gate keeps another label, or drops one of these. The seconds
of the record are those of training. A phantom folder's record goes to figures/phantom, that of films to figures/nih.
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from prism_lib import records
from prism_lib.data import load_info, load_table
from prism_lib.evaluation import judge_auc, load_judge, trusted


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="prepared folder, of phantoms or of real images")
    parser.add_argument("--labels", nargs="+", default=[], help="default: all that are known with both classes")
    parser.add_argument("--steps", type=int, default=0, help="of the optimizer; 0: four epochs")
    parser.add_argument("--size", type=int, default=256, help="pixels a side that the judge reads")
    parser.add_argument("--network", default="densenet-small", help="one of models.classifier.NETWORKS")
    parser.add_argument("--split", default="test", help="held-out split")
    parser.add_argument("--minimum", type=float, default=0.8, help="AUC from which on a label is judged")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the bootstrap")
    given = parser.parse_args(arguments)
    training = {"network": given.network, "size": given.size, "steps": given.steps, "seed": given.seed}
    training |= {"labels": given.labels} if given.labels else {}
    with tempfile.TemporaryDirectory() as runs:
        before = os.environ.get("PRISM_RUNS", "")
        os.environ["PRISM_RUNS"] = runs  # where no judge is kept
        try:
            with records.Timer() as timer:
                judge = load_judge("train", given.folder.resolve(), **training)
        finally:
            os.environ["PRISM_RUNS"] = before
    reading = judge_auc(judge, given.folder, given.split, given.minimum, given.seed)
    kept = trusted(judge, reading)
    passed = [label for label, row in reading.iterrows() if row["auc"] >= given.minimum]
    if passed != list(kept.labels if kept else ()):
        raise SystemExit(f"the gate at {given.minimum} kept {kept and kept.labels}, and {passed} have that AUC")
    records.record(
        "own_judge",
        dataset=load_info(given.folder)["source"],
        notebook="benchmarks/own_judge.py",
        parameters={"training": training, "split": given.split, "minimum": given.minimum},
        seed=given.seed,
        metrics={
            "training_images": len(load_table(given.folder, "train")),
            **{str(label): row.dropna().to_dict() for label, row in reading.iterrows()},
        },
        model="none",
        seconds=timer.seconds,
    )


if __name__ == "__main__":
    main()
