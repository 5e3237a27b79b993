"""A second reader: yes-or-no questions to a vision-language model on this machine (App. F of the paper).

An image-text-to-text model that transformers loads (LLaVA, Idefics, Qwen-VL, MedGemma, ...) becomes a classifier, so
it gives the measures of a judge. Its answers may be wrong: look first at its `judge_auc` on the originals.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from prism_lib.devices import default_device
from prism_lib.language.labels import Vocabulary
from prism_lib.models.classifier import Classifier
from prism_lib.models.image_text import IMAGE_TEXT
from prism_lib.models.published import locate

YES, NO = ("Yes", "yes", " Yes", " yes", "YES"), ("No", "no", " No", " no", "NO")


class QuestionReader(nn.Module):
    """A vision-language model as a classifier: per label a question and log P(yes) - log P(no) of the first token."""

    def __init__(self, model: Any, processor: Any, questions: Sequence[str]) -> None:
        super().__init__()
        self.model, self.processor = model, processor
        self.prompts = []
        for question in questions:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            chat = [{"role": "user", "content": content}]
            self.prompts.append(str(processor.apply_chat_template(chat, add_generation_prompt=True)))
        of = processor.tokenizer
        yes, no = ({of(word, add_special_tokens=False).input_ids[0] for word in words} for words in (YES, NO))
        # A tokenizer that splits " Yes" and " No" after the space gives both the same first token.
        self.yes, self.no = sorted(yes - no), sorted(no - yes)
        if not self.yes or not self.no:
            raise ValueError("yes and no begin with the same token in this model's tokenizer")

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 1, H, W) in [0, 1] to log-odds of yes (N, questions), in float32."""
        gray = (images.mean(1).clamp(0, 1) * 255).round().byte().cpu()
        # Processors expect RGB. The pictures are of one size, so with one question no row is padded.
        given = [Image.fromarray(pixels.numpy()).convert("RGB") for pixels in gray]
        odds = []
        for prompt in self.prompts:
            inputs = self.processor(images=given, text=[prompt] * len(given), return_tensors="pt")
            logits = self.model(**inputs.to(self.model.device, self.model.dtype)).logits[:, -1].float()
            odds.append(logits[:, self.yes].logsumexp(1) - logits[:, self.no].logsumexp(1))
        return torch.stack(odds, dim=1).to(images.device)


def load_reader(name_or_path: str, labels: Sequence[str], vocabulary: Vocabulary) -> Classifier | None:
    """A folder (also below PRISM_RUNS or PRISM_WEIGHTS) or a hub id as a `Classifier` with one question a label."""
    if not name_or_path:
        return None
    read = tuple(label for label in labels if label in vocabulary.phrases)
    if not read:
        raise ValueError(f"vocabulary {vocabulary.name!r} has no words for {', '.join(labels)}")
    name = locate(name_or_path, *IMAGE_TEXT)
    model = AutoModelForImageTextToText.from_pretrained(name, use_safetensors=True, dtype="auto")
    model.requires_grad_(False).eval().to(default_device())
    questions = [f"Does this {vocabulary.subject} show {vocabulary.phrase(label)}? Answer yes or no." for label in read]
    return Classifier(QuestionReader(model, AutoProcessor.from_pretrained(name), questions).eval(), read)
