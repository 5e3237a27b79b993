"""Models of images and texts: CLIP and SigLIP, which embed both in one space, and a second reader (the paper's App. F).

The reader is an image-text-to-text model that transformers loads (LLaVA, Idefics, Qwen-VL, MedGemma, ...) and that
answers yes or no. As a classifier it gives the measures of a judge. Look first at its `judge_auc` on the originals.
"""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.utils import cached_file

from prism_lib.devices import default_device
from prism_lib.language.labels import Vocabulary
from prism_lib.models.classifier import Classifier
from prism_lib.models.published import locate, without_bars

IMAGE_TEXT = ("config.json", "image-text model")  # what `locate` looks for


@dataclass(frozen=True)
class ImageTextModel:
    """A model, its tokenizer, and mean and deviation per channel that normalise images in [0, 1]."""

    model: Any
    tokenizer: Any
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @torch.no_grad()
    def embed_images(self, images: Tensor, batch_size: int = 32) -> Tensor:
        """Images (N, 1 or 3, H, W) in [0, 1] to embeddings (N, D) of length 1; they are resized, never cropped."""
        size = self.model.config.vision_config.image_size
        pixels = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True, align_corners=False)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        pixels = (pixels.clamp(0, 1).expand(-1, 3, -1, -1).cpu() - mean) / std
        features = [
            self.model.get_image_features(pixel_values=chunk.to(self.model.device, self.model.dtype)).pooler_output
            for chunk in pixels.split(batch_size)
        ]
        return F.normalize(torch.cat(features).float(), dim=-1).cpu()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts to embeddings (N, D) of length 1; one that is too long raises ValueError, as it would be cut."""
        longest = self.model.config.text_config.max_position_embeddings
        for text in texts:
            if (length := len(self.tokenizer(text).input_ids)) > longest:
                raise ValueError(f"text has {length} tokens, the image-text model reads {longest}: {text!r}")
        # SigLIP was trained on padded texts without a mask; CLIP reads its last token and ignores what follows.
        ids = self.tokenizer(list(texts), padding="max_length", max_length=longest, return_tensors="pt").input_ids
        features = self.model.get_text_features(input_ids=ids.to(self.model.device)).pooler_output
        return F.normalize(features.float(), dim=-1).cpu()


def load_image_text_model(name_or_path: str | Path) -> ImageTextModel:
    """Load a folder (also below PRISM_RUNS or PRISM_WEIGHTS) or a hub id onto `devices.default_device`, frozen."""
    name = locate(str(name_or_path), *IMAGE_TEXT)
    with without_bars() if Path(name).is_dir() else nullcontext():
        model = AutoModel.from_pretrained(name, use_safetensors=True).requires_grad_(False).eval()
    model.to(default_device())
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise ValueError(f"{name_or_path} is {type(model).__name__}, which does not embed both images and texts")
    own, beside = (folder / "tokenizer_config.json" for folder in (Path(name), Path(name).parent / "tokenizer"))
    tokenizer = AutoTokenizer.from_pretrained(beside.parent if beside.is_file() and not own.is_file() else name)
    preprocessing = cached_file(name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    stated = json.loads(Path(preprocessing).read_text(encoding="utf-8")) if preprocessing else {}
    normal = {"mean": "image_mean", "std": "image_std"}
    return ImageTextModel(model, tokenizer, **{key: tuple(stated[n]) for key, n in normal.items() if n in stated})


def weight_files(name: str) -> list[Path]:
    """The safetensors of a model that `load_image_text_model` has loaded, in a folder or in the hub's cache."""
    name = locate(name, *IMAGE_TEXT)
    if Path(name).is_dir():
        return sorted(Path(name).glob("*.safetensors"))
    return [Path(str(cached_file(name, "model.safetensors")))]


YES, NO = ("Yes", "yes", " Yes", " yes", "YES"), ("No", "no", " No", " no", "NO")


class QuestionReader(nn.Module):
    """A vision-language model as a classifier: per label a question and log P(yes) - log P(no) of the first token."""

    def __init__(self, model: Any, processor: Any, questions: Sequence[str]) -> None:
        super().__init__()
        self.model, self.processor = model, processor
        self.prompts = []
        for question in questions:
            chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
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
