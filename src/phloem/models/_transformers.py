"""A model whose code is transformers' own, over our pages: for families that have no file here.

Its attention is ours (`AttentionInterface`), with the window, scale and heads that each layer hands over with its call;
everything between is theirs. Matrices and the embedding are kept by the op table, as those of our own layers.

What a class must keep to is looked at when it is built, and it is refused with the reason otherwise: that tokens see
each other in attention alone, by the positions they are given; that masks are causal, perhaps with a window; that the
head reads nothing but hidden states. Legend: T packed tokens, H heads, K kv heads, D head size, L wanted rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from phloem.core.errors import ModelLoadError
from phloem.layers.context import memory_of
from phloem.models._packed_linear import Packed
from phloem.models._probe import PASS, PROBE, RUN, Layers, check_alone, register
from phloem.models._push import Push
from phloem.models._sources import stored_kinds
from phloem.models._stored import WHOLE, check_surplus, some, unused_scales

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

    from phloem.checkpoint.describe import Checkpoint
    from phloem.core.memory import MemorySpec
    from phloem.layers.context import AttentionSpec, BuildContext, ForwardBatch

    Progress = Callable[[str, float], None]

_NEAR = 2e-3  # of the largest: how far a head may be from itself, in 32 bits


class Foreign:
    """A `Model` that runs transformers' code. `name` says of what, in messages."""

    def __init__(self, theirs: Any, ctx: BuildContext, name: str) -> None:
        self.ctx, self.name = ctx, name
        self.layers = Layers()
        for module in theirs.modules():
            setattr(module, PASS, self.layers)
        with torch.no_grad():
            self._probe(theirs)

    def _probe(self, theirs: Any) -> None:
        """Run it, keep its matrices as the op table likes them, and run it again: what it asks of attention, and
        whether it keeps to what is said above."""
        try:
            self.layers.probe(theirs, self._device)
            kept = Packed(theirs, self.ctx)
            logits, hidden, template = self.layers.probe(theirs, self._device)
            if kept.put_back():  # matrices that their code looks at itself
                logits, hidden, template = self.layers.probe(theirs, self._device)
            theirs.set_attn_implementation(RUN)
            check_alone(theirs, self.layers, self._device)
            self.attention_specs: list[AttentionSpec] = self.layers.specs
            self.memory: list[MemorySpec] = memory_of(self.attention_specs)
        except ModelLoadError as error:
            raise ModelLoadError(f"{self.name} cannot be served through transformers: {error.message}") from None
        except Exception as error:  # whatever their code raises when it is called otherwise than it expects
            why = f"{type(error).__name__}: {error}"
            raise ModelLoadError(f"{self.name} cannot be served through transformers: {why:.400}") from error
        self.vocab_size, self.hidden_size = int(logits.shape[-1]), int(hidden.shape[-1])
        self.packed = kept
        self._body = getattr(theirs, theirs.base_model_prefix)
        self._tensors = dict(theirs.named_parameters())
        self._head, self._given = theirs, Given(self._body, template)
        delattr(theirs, theirs.base_model_prefix)
        setattr(theirs, theirs.base_model_prefix, self._given)
        again = self.head(hidden)
        if (again - logits).abs().max() > self._tolerance * logits.abs().max().clamp_min(1e-6):
            raise ModelLoadError(f"{self.name} cannot be served through transformers: its head reads more than states")

    @property
    def _device(self) -> torch.device:
        return self.ctx.device

    @property
    def _tolerance(self) -> float:
        return _NEAR if self.ctx.dtype == torch.float32 else 16 * _NEAR

    @torch.inference_mode()
    def forward(self, step: ForwardBatch) -> Tensor:
        """Hidden states [L, hidden_size] of the rows `step.logit_index` (None: all), final norm applied."""
        ids, positions = step.input_ids[None], step.positions[None]
        self.layers.begin(lambda spec, heads: step.memory.attend(spec, heads))
        found = self._body(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[0]
        self.layers.end()
        return found if step.logit_index is None else self.ctx.ops.select_rows(found, step.logit_index)

    @torch.inference_mode()
    def head(self, hidden_LD: Tensor) -> Tensor:
        """float32 logits [L, vocab_size], with whatever the class does to them."""
        self._given.hidden = hidden_LD
        ids = torch.zeros((1, len(hidden_LD)), dtype=torch.int64, device=hidden_LD.device)
        return self._head(input_ids=ids, use_cache=False).logits[0].float()

    def greedy(self, hidden_LD: Tensor) -> Tensor:
        """The most likely token of each row, integer [L]."""
        return self.ctx.ops.argmax(self.head(hidden_LD))

    def best(
        self, hidden_LD: Tensor, k: int, scale_LJ: Tensor | None, norms: int
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """None: what a class does to its logits is its own."""
        del hidden_LD, k, scale_LJ, norms
        return None

    @property
    def weight_bytes(self) -> int:
        return self.packed.index.nbytes + sum(tensor.nbytes for tensor in self._tensors.values())

    def weight_names(self) -> list[str]:
        """The names of transformers' `state_dict`, each tied tensor once."""
        return [*self.packed.index.names(), *(name for name in self._tensors if name not in self.packed.index.slots)]

    def get_weight(self, name: str, rows: int | None = None) -> Tensor:
        """A tensor as `state_dict` has it, or its first rows (a copy). Raises ModelLoadError for an unknown name."""
        if name in self._tensors and name not in self.packed.index.slots:
            whole = self._tensors[name].detach()
            return (whole if rows is None else whole[:rows]).clone()
        return self.packed.index.get(name, rows)

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> bool:
        """Replace tensors by `state_dict` name, between steps. Nothing is recorded here, so nothing goes stale.

        Raises:
            ModelLoadError: for an unknown name or a wrong shape; tensors before it have been taken.
        """
        push = Push(self.packed.index)
        for name, tensor in tensors:
            held = self._tensors.get(name)
            if held is not None:
                if held.shape != tensor.shape:
                    raise ModelLoadError(f"{name} is {list(tensor.shape)}, expected {list(held.shape)}")
                with torch.no_grad():
                    held.detach().copy_(tensor)
            if held is None or name in self.packed.index.slots:
                push.add([(name, tensor)])
        push.prepare()
        push.install()
        return False

    def checkpoint_name(self, name: str) -> str | None:
        return name


class Given:
    """In the place of the body: gives the head the hidden states that it is to read. Whatever else the head looks for
    is the body's."""

    def __init__(self, body: nn.Module, template: type[Any]) -> None:
        self._body, self._template = body, template
        self.hidden: Tensor | None = None

    def __call__(self, *args: Any, **options: Any) -> Any:
        del args, options
        assert self.hidden is not None
        return self._template(last_hidden_state=self.hidden[None])

    def __getattr__(self, name: str) -> Any:
        # Some heads call the decoder inside the body.
        return self if name == "decoder" else getattr(self._body, name)


def load_foreign(
    checkpoint: Checkpoint, ctx: BuildContext, progress: Progress | None, *, trust: bool = False
) -> Foreign:
    """Build a checkpoint's class and read its weights, as transformers does.

    Raises:
        ModelLoadError: transformers is not installed, has no such class, or the class cannot be served, with the
            reason; tensors are missing or have another shape.
    """
    try:
        import transformers
    except ImportError as error:
        raise ModelLoadError(f"{checkpoint.path}: model_impl transformers needs that package: {error}") from None
    register()
    place = {"trust_remote_code": trust}
    try:
        config: Any = transformers.AutoConfig.from_pretrained(checkpoint.path, **place)
        theirs = _made(transformers, checkpoint, config, ctx, place)
    except ModelLoadError:
        raise
    except Exception as error:  # whatever their code raises of a file that it does not like
        lines = str(error).strip().splitlines() or [""]
        raise ModelLoadError(f"{checkpoint.path}: transformers: {type(error).__name__}: {lines[0]:.300}") from error
    if progress is not None:
        progress("weights", 1.0)
    return Foreign(theirs.to(ctx.device).eval().requires_grad_(False), ctx, type(theirs).__name__)


def _made(transformers: Any, checkpoint: Checkpoint, config: Any, ctx: BuildContext, place: dict[str, Any]) -> Any:
    kinds = transformers.AutoModelForCausalLM
    known = type(config) in kinds._model_mapping
    if known and not kinds._model_mapping[type(config)].is_backend_compatible():
        name = kinds._model_mapping[type(config)].__name__
        why = "the class does not take attention from elsewhere (AttentionInterface)"
        raise ModelLoadError(f"{checkpoint.path}: {name} cannot be served through transformers: {why}")
    options = {"dtype": ctx.dtype, "attn_implementation": PROBE, **place}
    if checkpoint.format == "dummy":
        return kinds.from_config(config, **options)
    found = kinds.from_pretrained(
        checkpoint.path, config=config, use_safetensors=True, output_loading_info=True, local_files_only=True,
        ignore_mismatched_sizes=True, **options,
    )  # fmt: skip
    theirs, told = cast("tuple[Any, dict[str, Any]]", found)
    missing = sorted(map(str, told.get("missing_keys") or ()))
    if missing:
        raise ModelLoadError(f"{checkpoint.path}: {len(missing)} tensors are missing: {some(missing)}")
    unused = sorted(map(str, told.get("unexpected_keys") or ()))
    _check_stored(checkpoint, unused)
    if mismatched := told.get("mismatched_keys"):
        wrong = sorted(f"{name} is {list(found)}, expected {list(expected)}" for name, found, expected in mismatched)
        raise ModelLoadError(f"{checkpoint.path}: {len(wrong)} tensors have another shape: {some(wrong)}")
    check_surplus(checkpoint, unused)
    return theirs


def _check_stored(checkpoint: Checkpoint, unused: list[str]) -> None:
    """As of our own families: numbers that are not weights by themselves are refused, whoever would read them."""
    if scales := unused_scales(unused):
        raise ModelLoadError(
            f"{checkpoint.path}: {len(scales)} tensors belong to weights in a format that is not supported: "
            f"{some(scales)}"
        )
    low = [
        f"{name} is {kind}"
        for path in checkpoint.files
        for name, kind in stored_kinds(path).items()
        if kind not in WHOLE and name.endswith(".weight") and name not in unused
    ]
    if low:
        raise ModelLoadError(
            f"{checkpoint.path}: {len(low)} tensors are in a type that stands for no weights by itself, and nothing in "
            f"the checkpoint's configuration says how to read them: {some(low)}"
        )
