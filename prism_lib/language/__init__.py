"""The names of findings and the wording of captions and edits.

Input: labels, phrases and sentences. Output: captions, prompt pairs and edits. No module here needs a model or an
image.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "captions": ["caption", "corpus", "unseen_words"],
        "edits": ["Edit", "PromptPair"],
        "labels": ["DEVICE_KINDS", "Vocabulary", "snake_case", "vocabulary"],
    },
)
