"""Names and settings of the inversions, for what plans them without loading a model (`editing.inversion`)."""

from __future__ import annotations

from dataclasses import dataclass

INVERSIONS = ("direct", "null_text", "negative_prompt", "edit_friendly", "ddim", "bdia")

# Of all, the least error to the truth on validation phantoms, and the most even one (04_ablations, CHANGELOG). `invert`
# itself stays with "direct", which draws no noise and whose trajectory many edits share.
RECOMMENDED = "edit_friendly"


@dataclass(frozen=True)
class InversionConfig:
    """Settings of single methods.

    Null-text: guidance scale that the source is to follow, at most `inner_steps` of Adam per step, its first learning
    rate and the loss that ends the first step early. Edit-friendly: `skip`, the share of the noisiest steps that an
    edit leaves out, and `seed` of the noise.
    """

    guidance_scale: float = 7.5
    inner_steps: int = 10
    learning_rate: float = 1e-2
    threshold: float = 1e-5
    skip: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("guidance_scale", "learning_rate", "threshold"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; expected a finite number, 0 or more")
        if self.inner_steps < 1:
            raise ValueError(f"inner_steps is {self.inner_steps}; expected at least 1")
        if not 0 <= self.skip < 1:
            raise ValueError(f"skip is {self.skip}; expected a share in [0, 1)")
