"""Loading, building and calling of networks.

Input: a name, a folder or a hub id. Output: a pipeline, a classifier or an image-text model. No other room loads them.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "classifier": ["Classifier", "ClassifierConfig", "named_network", "train_classifier"],
        "image_text": ["load_image_text_model", "load_reader"],
        "pipeline": [
            "PipelineConfig", "build_pipeline", "compile_blocks", "decode_latents", "encode_images", "encode_prompts",
            "fingerprint", "image_factor", "load_pipeline", "predict_noise", "sample_images", "too_long",
        ],
    },
)  # fmt: skip
