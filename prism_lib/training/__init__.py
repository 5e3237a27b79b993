"""Fine-tuning of the U-Net, and a small Stable Diffusion from nothing.

A prepared folder and a configuration enter; checkpoints, from which a run resumes to the bit, and a pipeline folder
leave. The outputs of the frozen parts are computed once and cached.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "autoencoder": ["DECODER", "PretrainConfig", "VaeConfig", "reconstruction_psnr", "start_from"],
        "batches": ["DrawConfig", "Order", "diffusion_loss", "draw_batch"],
        "cache": ["build_cache"],
        "clip": ["ClipConfig"],
        "config": ["FinetuneConfig", "load_config", "save_config"],
        "finetuning": ["check_run", "finetune", "launch"],
        "log": ["curve", "curves_by_timestep", "read_log", "summary", "text_samples"],
    },
)
