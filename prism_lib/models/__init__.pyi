"""The public names of `prism_lib.models`, by the module that defines them."""

from .classifier import Classifier as Classifier
from .classifier import ClassifierConfig as ClassifierConfig
from .classifier import named_network as named_network
from .classifier import train_classifier as train_classifier
from .image_text import load_image_text_model as load_image_text_model
from .image_text import load_reader as load_reader
from .pipeline import PipelineConfig as PipelineConfig
from .pipeline import build_pipeline as build_pipeline
from .pipeline import compile_blocks as compile_blocks
from .pipeline import decode_latents as decode_latents
from .pipeline import encode_images as encode_images
from .pipeline import encode_prompts as encode_prompts
from .pipeline import fingerprint as fingerprint
from .pipeline import image_factor as image_factor
from .pipeline import load_pipeline as load_pipeline
from .pipeline import predict_noise as predict_noise
from .pipeline import sample_images as sample_images
from .pipeline import too_long as too_long
