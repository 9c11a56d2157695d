"""What layers remember between calls: one dictionary each, in the protocol of fla's caches."""

from __future__ import annotations

from typing import Any


class LayerStates:
    """States by layer index; `past_key_values` of the layers here. fla's own `Cache` serves as well.

    `update(layer_idx=i, recurrent_state=..., offset=T)` stores what is given and counts T tokens;
    `len`, `[i]` and `get_seq_length(i)` read. States are those of one batch and change in place.
    """

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []
        self.lengths: list[int] = []

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, layer_idx: int) -> dict[str, Any]:
        return self.states[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.lengths[layer_idx] if layer_idx < len(self.lengths) else 0

    def update(self, layer_idx: int = 0, offset: int = 1, **states: Any) -> dict[str, Any]:
        while len(self.states) <= layer_idx:
            self.states.append({})
            self.lengths.append(0)
        self.states[layer_idx].update(states)
        self.lengths[layer_idx] += offset
        return self.states[layer_idx]


def remembered(past_key_values, layer_idx: int | None, name: str):
    """The named state of a layer, or None where nothing has been stored yet."""
    if past_key_values is None or layer_idx is None or len(past_key_values) <= layer_idx:
        return None
    state = past_key_values[layer_idx]
    return None if state is None else state.get(name)
