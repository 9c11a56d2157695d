"""Resona inside models that exist: Hugging Face transformers, fla, mamba_ssm, or by layer names.

None of those libraries is imported here or needed; each is recognised when its model arrives.
"""

from .augmentation import Augmentation, augment
from .saving import load_resona, save_resona

__all__ = ["Augmentation", "augment", "load_resona", "save_resona"]
