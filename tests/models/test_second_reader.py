"""A vision-language model as a reader: a tiny LLaVA in the exact layout of a real one."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from prism_lib.editing.settings import EditConfig
from prism_lib.evaluation.evaluate import choose_cases, evaluate_edits, judge_auc, reread, summarise
from prism_lib.language.edits import Edit
from prism_lib.language.labels import vocabulary
from prism_lib.models import image_text as second_reader
from prism_lib.studies.editors import PromptToPrompt
from tests.tiny import tiny_images, tiny_pipeline

WORDS = "<unk> <pad> <image> Yes yes No no USER ASSISTANT Does this chest x ray show support devices pleural effusion"
TEMPLATE = (
    "{% for m in messages %}USER {% for c in m.content %}{% if c.type == 'image' %}<image> {% else %}{{ c.text }} "
    "{% endif %}{% endfor %}{% endfor %}ASSISTANT"
)
LABELS = ("Support Devices", "Pleural Effusion")


def tokenizer(words=WORDS):
    inner = Tokenizer(WordLevel({word: n for n, word in enumerate(words.split())}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", additional_special_tokens=["<image>"]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = tokenizer()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=16, patch_size=8, **small),
        text_config=LlamaConfig(vocab_size=len(words), **small),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.3)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(
        images, words, patch_size=8, vision_feature_select_strategy="default", chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    )  # fmt: skip
    output = tmp_path_factory.mktemp("llava")
    model.save_pretrained(output)
    processor.save_pretrained(output)
    return output


@pytest.fixture(scope="module")
def judge(folder):
    return second_reader.load_reader(str(folder), (*LABELS, "No Finding"), vocabulary("phantom"))


def test_the_question_is_in_the_words_of_the_captions(folder, judge):
    assert "<image> Does this chest x-ray show support devices? Answer yes or no. " in judge.network.prompts[0]
    skin = second_reader.load_reader(str(folder), ("Ruler",), vocabulary("skin"))
    assert "<image> Does this dermoscopic image show " in skin.network.prompts[0]


def test_the_answer_is_the_models_own_next_word(judge):
    images = tiny_images(3)
    model, processor = judge.network.model, judge.network.processor
    picture = Image.fromarray((images[1, 0] * 255).round().byte().numpy()).convert("RGB")
    inputs = processor(images=[picture], text=[judge.network.prompts[0]], return_tensors="pt")
    output = model.generate(
        **inputs, max_new_tokens=1, do_sample=False, output_scores=True, return_dict_in_generate=True
    )
    likely = output.scores[0].softmax(-1)[0]
    yes, no = (
        sum(float(likely[processor.tokenizer.convert_tokens_to_ids(w)]) for w in ws)
        for ws in (("Yes", "yes"), ("No", "no"))
    )
    read = judge.read(images)
    assert judge.labels == LABELS and read.shape == (3, 2)
    assert float(read[1, 0]) == pytest.approx(yes / (yes + no), abs=1e-5)
    assert float((read[0] - read[1]).abs().max()) > 1e-3, "the image is looked at"
    assert torch.allclose(replace(judge, batch_size=1).read(images), read, atol=1e-5)


def test_a_reader_measures_what_a_judge_measures(judge, phantom_folder):
    change = Edit(remove=("Support Devices",))
    cases = choose_cases(phantom_folder, change, 2)
    editor = PromptToPrompt(num_inference_steps=2, settings=EditConfig())
    (measured,) = evaluate_edits(tiny_pipeline(), phantom_folder, {change: cases}, editor)
    read = reread(measured, judge)
    before, after = judge.read(measured.factual)[:, 0], judge.read(measured.edited)[:, 0]
    assert read.table["cpg"].tolist() == pytest.approx((before - after).tolist())
    assert "mask_share" not in read.table and "flip_denominator" in summarise(read)
    assert list(judge_auc(judge, phantom_folder).index) == list(judge.labels)


def test_what_cannot_be_asked_is_said(folder, judge):
    assert second_reader.load_reader("", LABELS, vocabulary("phantom")) is None
    with pytest.raises(ValueError, match="no words for Melanoma"):
        second_reader.load_reader(str(folder), ("Melanoma",), vocabulary("phantom"))
    with pytest.raises(FileNotFoundError, match="is no image-text model"):
        second_reader.load_reader("/nowhere/llava", LABELS, vocabulary("phantom"))
    silent = LlavaProcessor(judge.network.processor.image_processor, tokenizer(), patch_size=8)
    with pytest.raises(ValueError, match="chat template"):
        second_reader.QuestionReader(judge.network.model, silent, ["?"])
    blind = LlavaProcessor(
        judge.network.processor.image_processor, tokenizer("<unk> <pad> <image>"), chat_template=TEMPLATE
    )
    with pytest.raises(ValueError, match="the same token"):
        second_reader.QuestionReader(judge.network.model, blind, ["?"])
