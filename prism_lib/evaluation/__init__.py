"""Measurement of edits.

Input: prepared folders, edits and a judge. Output: tables of numbers with intervals. The judge is a classifier that
only reads edits; it does not guide or select them.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submodules=["metrics", "novelty"],
    submod_attrs={
        "evaluate": [
            "Editor", "Evaluation", "batch_difference", "choose_cases", "composition", "evaluate_edits",
            "evaluate_results", "interval", "judge_auc", "load_judge", "notes", "own_classifier", "realism", "reread",
            "reversibility", "summarise", "summarise_rows", "train_judge", "trusted",
        ],
        "selection": [
            "Criteria", "GuideScorer", "IdentityScorer", "Selection", "SimilarityScorer", "load_guide", "select",
        ],
    },
)  # fmt: skip
