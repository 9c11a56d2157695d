"""Just read twice: models that see the whole context before they write (arXiv 2407.05483)."""

from .functional import PrefixState, prefix_linear_attention, prefix_linear_attention_step

__all__ = ["PrefixState", "prefix_linear_attention", "prefix_linear_attention_step"]
