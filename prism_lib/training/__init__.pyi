"""The public names of `prism_lib.training`, by the module that defines them."""

from .autoencoder import DECODER as DECODER
from .autoencoder import PretrainConfig as PretrainConfig
from .autoencoder import VaeConfig as VaeConfig
from .autoencoder import reconstruction_psnr as reconstruction_psnr
from .autoencoder import start_from as start_from
from .batches import Order as Order
from .batches import diffusion_loss as diffusion_loss
from .batches import draw_batch as draw_batch
from .cache import build_cache as build_cache
from .clip import ClipConfig as ClipConfig
from .config import FinetuneConfig as FinetuneConfig
from .config import load_config as load_config
from .config import save_config as save_config
from .finetuning import check_run as check_run
from .finetuning import finetune as finetune
from .finetuning import launch as launch
from .log import curve as curve
from .log import curves_by_timestep as curves_by_timestep
from .log import read_log as read_log
from .log import summary as summary
from .log import text_samples as text_samples
