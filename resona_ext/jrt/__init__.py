"""Just read twice: models that see the whole context before they write (arXiv 2407.05483)."""

from .cache import LayerStates
from .evaluate import Comparison, Example, compare, compare_tokens
from .functional import PrefixState, prefix_linear_attention, prefix_linear_attention_step
from .layer import PrefixLinearAttention
from .loss import JRTLoss, MaskedPrefix, jrt_loss, mask_prefix
from .model import JRTConfig, JRTModel
from .prompt import jrt_prompt, truncate

__all__ = [
    "Comparison",
    "Example",
    "JRTConfig",
    "JRTLoss",
    "JRTModel",
    "LayerStates",
    "MaskedPrefix",
    "PrefixLinearAttention",
    "PrefixState",
    "compare",
    "compare_tokens",
    "jrt_loss",
    "jrt_prompt",
    "mask_prefix",
    "prefix_linear_attention",
    "prefix_linear_attention_step",
    "truncate",
]
