"""What transformers' layers ask of attention, seen by running them; and whether they keep to what can be served.

While a model is probed, attention gives each token its own value, so that no token sees another one: what depends on
other tokens even so does not go through attention. Legend: H heads, K kv heads, T tokens, D head size.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from phloem.core.errors import ModelLoadError
from phloem.layers.context import AttentionSpec, Heads

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    Attend = Callable[[AttentionSpec, Heads], Tensor]
    MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

T = TypeVar("T")
RUN, PROBE = "phloem", "phloem_probe"  # what their configurations call our attention
PASS = "phloem_layers"  # the attribute of their modules
_FAR = 1 << 20  # a position behind every window
_IDS, _PLACES = [3, 1, 4, 2, 5, 4], [0, 1, 2, 0, 1, 2]  # two texts that end alike
_OTHERS = [6, 5, 2, 1, 7, 2]
# What their layers hand on that asks nothing of attention.
_HARMLESS = {"position_ids", "cache_position", "position_embeddings", "input_ids"}
_masks: ContextVar[list[MaskFunction]] = ContextVar("masks")


class Layers:
    """The attention layers of one model, in the order in which a pass calls them."""

    def __init__(self) -> None:
        self.specs: list[AttentionSpec] = []
        self.said: list[int] = []  # the windows that their calls name
        self.handed: list[Tensor] = []  # q, k and v of every call of a probe
        self._attend: Attend | None = None
        self._call = 0

    def begin(self, attend: Attend) -> None:
        """Of a pass whose attention is this."""
        self._attend, self._call = attend, 0

    def end(self) -> None:
        """Raises RuntimeError: it has not called all layers."""
        self._attend = None
        if self._call != len(self.specs):
            raise RuntimeError(f"{self._call} of {len(self.specs)} attention layers were called")

    def attend(self, heads: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, options: dict[str, Any]) -> Tensor:
        """q [1, H, T, D], k [1, K, T, D], v [1, K, T, Dv] -> [1, T, H, Dv]."""
        if self._attend is None:
            return self._seen(heads, mask, options)
        spec = self.specs[self._call]
        self._call += 1
        if int(options.get("sliding_window") or 0) != self.said[spec.pool]:
            raise RuntimeError(f"attention layer {spec.pool} has changed its window")
        q_THD, k_TKD, v_TKD = (x[0].transpose(0, 1).contiguous() for x in heads)
        return self._attend(spec, Heads(q_THD, k_TKD, v_TKD, options.get("s_aux")))[None].to(heads[0].dtype)

    def probe(self, theirs: Any, device: torch.device) -> tuple[Tensor, Tensor, type[Any]]:
        """Logits and hidden states of a short text, and what their bodies give. Fills `specs`.

        Raises:
            ModelLoadError: attention is asked for what we do not have.
        """
        if theirs.base_model_prefix not in dict(theirs.named_children()):
            raise ModelLoadError("the class does not say what is its body")
        ids, places = (torch.tensor([values], device=device) for values in (_IDS[:3], _PLACES[:3]))
        logits = _watched(self, lambda: theirs(input_ids=ids, position_ids=places, use_cache=False).logits[0].float())
        found, hidden = _body(self, theirs, ids, places)
        if not self.specs:
            raise ModelLoadError("it does not attend through AttentionInterface")
        return logits, hidden, type(found)

    def _seen(self, heads: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, options: dict[str, Any]) -> Tensor:
        q, k, v = heads
        where = f"attention layer {len(self.specs)}"
        if q.shape[2] != k.shape[2] or q.shape[0] != 1:
            raise ModelLoadError(f"{where} has {k.shape[2]} keys for {q.shape[2]} tokens")
        odd = [name for name, value in options.items() if isinstance(value, torch.Tensor) and name not in _HARMLESS]
        if set(odd) - {"s_aux"}:
            raise ModelLoadError(f"{where} asks for {', '.join(odd)}")
        said = int(options.get("sliding_window") or 0)
        scale = options.get("scaling")
        sinks = options.get("s_aux") is not None
        spec = AttentionSpec(
            pool=len(self.specs),
            heads=q.shape[1],
            kv_heads=k.shape[1],
            head_size=q.shape[3],
            scale=q.shape[3] ** -0.5 if scale is None else float(scale),
            window=_window(mask, said, where),
            softcap=float(options.get("softcap") or 0.0),
            sinks=sinks,
            value_size=v.shape[3],
        )
        self.specs.append(spec)
        self.said.append(said)
        self.handed += [q, k, v]
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1).transpose(1, 2).contiguous()


def _watched(layers: Layers, run: Callable[[], T]) -> T:
    """One pass, whose calls of attention are noted."""
    layers.specs, layers.said, layers.handed = [], [], []
    token = _masks.set([])
    try:
        return run()
    finally:
        _masks.reset(token)


def _body(layers: Layers, theirs: Any, ids: Tensor, places: Tensor) -> tuple[Any, Tensor]:
    """One pass without the head: what it gives, and its hidden states [T, N]."""
    body = getattr(theirs, theirs.base_model_prefix)
    found = _watched(layers, lambda: body(input_ids=ids, position_ids=places, use_cache=False))
    return found, found.last_hidden_state[0]


def _window(mask: Tensor | None, said: int, where: str) -> int:
    """The window of the mask that a layer was given, which must be causal and that of its call, if that says one."""
    if mask is None:
        return said
    known = _masks.get()
    number = int(mask.flatten()[0]) if mask.numel() == 1 else -1
    if not 0 <= number < len(known):
        raise ModelLoadError(f"{where} has a mask of its own")
    first, moved = _first_seen(known[number], _FAR, where), _first_seen(known[number], _FAR + 1, where)
    found = _FAR - first + 1 if first else 0
    if moved - first != (found > 0):
        raise ModelLoadError(f"{where} attends neither to all earlier tokens nor in a window")
    if said and found != said:
        raise ModelLoadError(f"{where} asks for a window of {said} and has a mask of {found or 'all tokens'}")
    return found


def _first_seen(sees: MaskFunction, query: int, where: str) -> int:
    """The first position that a token sees; all from there to itself are taken to be seen."""
    zero = torch.tensor(0)

    def seen(key: int) -> bool:
        return bool(sees(zero, zero, torch.tensor(query), torch.tensor(key)))

    if seen(query + 1) or not seen(query):
        raise ModelLoadError(f"{where} sees later tokens, or not itself")
    low, high = 0, query
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if seen(middle) else (middle + 1, high)
    return low


def check_alone(theirs: Any, layers: Layers, device: torch.device) -> None:
    """Whether a token is what it is by itself and its position, but for attention, where texts are packed.

    Raises:
        ModelLoadError: it is not: a recurrent state, a convolution, positions that are counted and not read.
    """
    kept, differ = (layers.specs, layers.said), 0
    for texts in (_IDS, _OTHERS):
        ids, places = (torch.tensor([values], device=device) for values in (texts, _PLACES))
        _, hidden = _body(layers, theirs, ids, places)
        pairs = [(x[:, :, 2], x[:, :, 5]) for x in layers.handed] + [(hidden[2], hidden[5])]
        # A router may choose otherwise for a rounding; not in both texts.
        differ += any(not _near(a, b) for a, b in pairs)
    layers.specs, layers.said = kept
    if differ == 2:
        raise ModelLoadError("tokens depend on others outside attention, or positions are counted and not read")


def _near(a: Tensor, b: Tensor) -> bool:
    limit = 1e-4 if a.dtype == torch.float32 else 3e-2
    return float((a - b).abs().max()) <= limit * max(float(a.abs().max()), 1e-6)


def register() -> None:
    """Make our attention known to transformers, under two names: one is asked for no masks."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(RUN, _attention)
    AttentionInterface.register(PROBE, _attention)
    AttentionMaskInterface.register(PROBE, _mask)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **options: Any
) -> tuple[Tensor, None]:
    layers: Layers = getattr(module, PASS)
    return layers.attend((query, key, value), attention_mask, options), None


def _mask(mask_function: MaskFunction, dtype: torch.dtype = torch.float32, device: Any = None, **_: Any) -> Tensor:
    """A number that stands for the function, so that the layer that is given it says which one it has."""
    known = _masks.get(None)
    if known is None:
        known = []
    known.append(mask_function)
    return torch.full((1, 1, 1, 1), len(known) - 1, dtype=torch.float32, device=device)
