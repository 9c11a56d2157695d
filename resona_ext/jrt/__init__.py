"""Just read twice: models that see the whole context before they write (arXiv 2407.05483)."""

from .cache import LayerStates
from .functional import PrefixState, prefix_linear_attention, prefix_linear_attention_step
from .layer import PrefixLinearAttention
from .loss import JRTLoss, MaskedPrefix, jrt_loss, mask_prefix
from .model import JRTConfig, JRTModel

__all__ = [
    "JRTConfig",
    "JRTLoss",
    "JRTModel",
    "LayerStates",
    "MaskedPrefix",
    "PrefixLinearAttention",
    "PrefixState",
    "jrt_loss",
    "mask_prefix",
    "prefix_linear_attention",
    "prefix_linear_attention_step",
]
