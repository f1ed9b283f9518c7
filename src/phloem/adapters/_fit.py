"""From an adapter's file to what its sites keep of it: fused layers part by part, scales multiplied in, DoRA's norms
and biases as a factor and a shift of each output. Everything is checked before anything is made.

With W x + b the layer's own output, an adapted one is f (W x + s B A x) + b': f is 1, or with DoRA m / |W + s B A| by
rows, and b' is b, or what the adapter has in its place. Legend as in `_sites`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from phloem.adapters._fits import Fit
from phloem.adapters._peft import check_finite, refuse, some
from phloem.adapters._sites import zeros
from phloem.quant._source import out_of_range

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

    from phloem.adapters._peft import AdapterFile, Module
    from phloem.adapters._sites import Place, Sites

    Base = Callable[[str], Tensor]  # a tensor of the base by the name that its checkpoint gives it


def fit(file: AdapterFile, sites: Sites, base: Base) -> dict[int, Fit]:
    """Site -> what it keeps.

    Args:
        base: reads the base's weights, for DoRA and trained biases alone.

    Raises:
        BadRequest: naming the modules that have no place, or whose shapes are another base's.
    """
    wanted = _checked(file, sites)
    with torch.inference_mode():
        found = _packed(file, sites, wanted)
        for name, module in file.modules.items():
            if module.magnitude is not None or module.bias is not None or module.up_bias is not None:
                own = sites.resolve(name)
                assert own is not None  # as was checked
                _outputs(own, module, wanted[name], sites, found, base)
                _check_kept(file, name, wanted[name], found)
    return found


@dataclass(slots=True)
class _Stack:
    """What sites of one shape keep, one behind the other: layers are alike, and one op packs a module of them all."""

    down: Tensor  # [S, P, r, N]
    up: Tensor  # [S, r, M]


def _packed(file: AdapterFile, sites: Sites, wanted: dict[str, list[Place]]) -> dict[int, Fit]:
    """Site -> the low-rank additions. Raises BadRequest: they are too large as they are kept."""
    stacks, where = _stacks(sites, _ranks(file, wanted))
    alike: dict[tuple[Any, ...], list[tuple[int, str, Place]]] = {}  # what differs in names and numbers alone
    for name, module in file.modules.items():
        down, up = module.down, module.up
        if down is None or up is None:
            continue
        for place in wanted[name]:
            stack, at = where[place.site]
            shapes = down.shape, down.dtype, up.shape, up.dtype
            kind = stack, place.part, place.start, place.size, place.rows, *shapes, module.scale
            alike.setdefault(kind, []).append((at, name, place))
    for (stack, *_), group in alike.items():
        group.sort(key=lambda one: one[0])
        for run in _runs(group):
            _fill(stacks[stack], run, [file.modules[name] for _, name, _ in run])
    if any(out_of_range(values) for stack in stacks for values in (stack.down, stack.up)):
        for name, places in wanted.items():
            _check_kept(file, name, places, {site: _of(stacks, at) for site, at in where.items()})
    return {site: _of(stacks, at) for site, at in where.items()}


def _stacks(sites: Sites, ranks: dict[int, int]) -> tuple[list[_Stack], dict[int, tuple[int, int]]]:
    """(Stacks of zeros, site -> its stack, and where in it)."""
    shapes: dict[tuple[int, ...], list[int]] = {}
    for number, rank in sorted(ranks.items()):
        site = sites.sites[number]
        shapes.setdefault((len(site.sizes), rank, site.inputs, site.outputs), []).append(number)
    stacks: list[_Stack] = []
    where: dict[int, tuple[int, int]] = {}
    for (parts, rank, inputs, outputs), numbers in shapes.items():
        where |= {number: (len(stacks), at) for at, number in enumerate(numbers)}
        down = zeros((len(numbers), parts, rank, inputs), sites.dtype)
        stacks.append(_Stack(down, zeros((len(numbers), rank, outputs), sites.dtype)))
    return stacks, where


def _of(stacks: list[_Stack], at: tuple[int, int]) -> Fit:
    stack, row = stacks[at[0]], at[1]
    return Fit(stack.up.shape[1], stack.down[row], stack.up[row])


def _runs(group: list[tuple[int, str, Place]]) -> Iterator[list[tuple[int, str, Place]]]:
    """Those that follow each other in a stack."""
    begin = 0
    for at in range(1, len(group) + 1):
        if at == len(group) or group[at][0] != group[at - 1][0] + 1:
            yield group[begin:at]
            begin = at


def _fill(stack: _Stack, run: list[tuple[int, str, Place]], modules: list[Module]) -> None:
    """One module of sites that follow each other."""
    (first, _, place), scale = run[0], modules[0].scale
    rows = slice(first, first + len(run))
    downs = [module.down for module in modules if module.down is not None]
    ups = [_rows(module.up, place) for module in modules if module.up is not None]
    rank = len(downs[0])
    stack.down[rows, place.part, :rank] = torch.stack(downs)
    whole = torch.stack(ups)
    if scale != 1.0:  # numbers of the type that is kept are rounded once, as those of float32 are
        whole = (whole if whole.dtype == stack.up.dtype else whole.float()) * scale
    stack.up[rows, :rank, place.start : place.start + place.size] = whole.transpose(1, 2)


def _check_kept(file: AdapterFile, name: str, places: list[Place], found: Mapping[int, Fit]) -> None:
    for place in places:
        one = found.get(place.site)
        if one is not None:
            columns = slice(place.start, place.start + place.size)
            outputs = (None if values is None else values[columns] for values in (one.factor, one.shift))
            check_finite(file.path, name, one.down[place.part], one.up[:, columns], *outputs)


def _checked(file: AdapterFile, sites: Sites) -> dict[str, list[Place]]:
    """Module -> its places."""
    nowhere: list[str] = []
    found: dict[str, list[Place]] = {}
    for name, module in file.modules.items():
        own = sites.resolve(name)
        if own is None or module.embedding or module.whole is not None or module.tokens is not None:
            nowhere.append(f"{name} (whole)" if module.whole is not None else name)
        else:
            found[name] = sites.places[own]
    if nowhere:
        raise refuse(
            file.path,
            f"{len(nowhere)} modules are not adapted here: {some(nowhere)}; this model has no embedding, head, norm, "
            "linear layer or expert of that name",
        )
    if file.rank > sites.rank:
        raise refuse(file.path, f"its rank is {file.rank}, at most {sites.rank} is served (max_lora_rank)")
    wrong = [text for name, places in found.items() for text in _misfits(name, file.modules[name], places, sites)]
    if wrong:
        other = f" (it names {file.base!r} as its base)" if file.base else ""
        raise refuse(file.path, f"it is of another base{other}: {some(wrong)}")
    return found


def _misfits(name: str, module: Module, places: list[Place], sites: Sites) -> list[str]:
    outputs, inputs = sum(place.size for place in places), sites.sites[places[0].site].inputs
    wrong: list[str] = []
    if module.down is not None and module.down.shape[1] != inputs:
        wrong.append(f"{name} takes {module.down.shape[1]} inputs, the layer here {inputs}")
    for what in (module.up, module.up_bias, module.magnitude, module.bias):
        if what is not None and what.shape[0] != outputs:
            wrong.append(f"{name} gives {what.shape[0]} outputs, the layer here {outputs}")
            break
    return wrong


def _ranks(file: AdapterFile, wanted: dict[str, list[Place]]) -> dict[int, int]:
    """Site -> the largest rank of what goes there."""
    found: dict[int, int] = {}
    for name, places in wanted.items():
        down = file.modules[name].down
        if down is not None:
            found |= {place.site: max(found.get(place.site, 0), len(down)) for place in places}
    return found


def _rows(values: Tensor, place: Place) -> Tensor:
    """Of a module's outputs those that a part has."""
    if place.rows is None:
        return values
    return values[place.rows.start :: place.rows.step][: place.size]


def _outputs(own: str, module: Module, places: list[Place], sites: Sites, found: dict[int, Fit], base: Base) -> None:
    """Factor and shift of the outputs of one module."""
    bias = _bias(own, places, base)
    factor = torch.ones(sum(place.size for place in places))
    if module.magnitude is not None and module.down is not None and module.up is not None:
        weight = base(f"{own}.weight").float()
        if places[0].rows is not None and places[0].rows.transposed:
            weight = weight.T
        weight = weight + module.scale * (module.up.float() @ module.down.float())
        factor = module.magnitude.float() / weight.norm(dim=1)
    shift = (bias if module.bias is None else module.bias.float()) - factor * bias
    if module.up_bias is not None:
        shift = shift + factor * module.scale * module.up_bias.float()
    for place in places:
        site = sites.sites[place.site]
        if place.site not in found:  # a bias alone
            none = torch.zeros((len(site.sizes), 0, site.inputs), dtype=sites.dtype)
            found[place.site] = Fit(0, none, torch.zeros((0, site.outputs), dtype=sites.dtype))
        one, columns = found[place.site], slice(place.start, place.start + place.size)
        if one.factor is None or one.shift is None:
            one.factor, one.shift = torch.ones(site.outputs), torch.zeros(site.outputs)
        one.factor[columns], one.shift[columns] = _rows(factor, place), _rows(shift, place)


def _bias(own: str, places: list[Place], base: Base) -> Tensor:
    """The base's own bias, or zeros where it has none."""
    try:
        return base(f"{own}.bias").float()
    except KeyError:
        return torch.zeros(sum(place.size for place in places))
