"""Fine-tuning of the U-Net, and training of a small Stable Diffusion from scratch.

Input: a prepared folder and a configuration. Output: checkpoints and a pipeline folder. A run that resumes from a
checkpoint ends in bit-identical weights. The outputs of the frozen parts are computed once and cached.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "autoencoder": ["DECODER", "PretrainConfig", "VaeConfig", "reconstruction_psnr", "start_from"],
        "batches": ["Order", "diffusion_loss", "draw_batch"],
        "cache": ["build_cache"],
        "clip": ["ClipConfig"],
        "config": ["FinetuneConfig", "load_config", "save_config"],
        "finetuning": ["check_run", "finetune", "launch"],
        "log": ["curve", "curves_by_timestep", "read_log", "summary", "text_samples"],
    },
)
