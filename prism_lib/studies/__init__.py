"""The experiments of the paper.

Input: editors (methods behind one call), prepared folders and budgets. Output: comparisons, ablations and trained
classifiers. An interrupted study resumes where it stopped.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "comparison": ["ComparisonConfig", "compare_methods", "vary"],
        "editors": ["Edict", "Imagic", "LEdits", "PromptToPrompt", "SDEdit", "TwoMasks"],
        "explanations": ["attention_maps", "mask_regions", "region_statistics", "save_transition"],
        "ganterfactual": ["GanConfig", "Ganterfactual", "train_gan"],
        "shortcut": ["ShortcutConfig"],
        "tuning": ["TuningConfig", "find_settings"],
    },
)
