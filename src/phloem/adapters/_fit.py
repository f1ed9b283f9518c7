"""From an adapter's file to what its sites keep of it: fused layers part by part, scales multiplied in, DoRA's norms
and biases as a factor and a shift of each output. Everything is checked before anything is made.

With W x + b the layer's own output, an adapted one is f (W x + s B A x) + b': f is 1, or with DoRA m / |W + s B A| by
rows, and b' is b, or what the adapter has in its place. Legend as in `_sites`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from phloem.adapters._fits import Fit
from phloem.adapters._peft import check_finite, refuse, some

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from phloem.adapters._peft import AdapterFile, Module
    from phloem.adapters._sites import Place, Site, Sites

    Base = Callable[[str], Tensor]  # a tensor of the base by the name that its checkpoint gives it


def fit(file: AdapterFile, sites: Sites, base: Base) -> dict[int, Fit]:
    """Site -> what it keeps.

    Args:
        base: reads the base's weights, for DoRA and trained biases alone.

    Raises:
        BadRequest: naming the modules that have no place, or whose shapes are another base's.
    """
    wanted = _checked(file, sites)
    ranks = _ranks(file, wanted)
    found: dict[int, Fit] = {}
    with torch.inference_mode():
        for name, module in file.modules.items():
            if module.down is None or module.up is None:
                continue
            for place in wanted[name]:
                site = sites.sites[place.site]
                if place.site not in found:
                    found[place.site] = _empty(sites.sites[place.site], ranks[place.site], sites.dtype)
                one, rank = found[place.site], module.down.shape[0]
                one.down[place.part, :rank] = module.down
                columns = slice(place.start, place.start + place.size)
                one.up[:rank, columns] = _rows(module.up.float() * module.scale, place).T
                assert site.outputs == one.up.shape[1]
        for name, module in file.modules.items():
            if module.magnitude is not None or module.bias is not None or module.up_bias is not None:
                own = sites.resolve(name)
                assert own is not None  # as was checked
                _outputs(own, module, wanted[name], sites, found, base)
    _check_kept(file, wanted, found)
    return found


def _check_kept(file: AdapterFile, wanted: dict[str, list[Place]], found: dict[int, Fit]) -> None:
    for name, places in wanted.items():
        for place in places:
            one, columns = found[place.site], slice(place.start, place.start + place.size)
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


def _empty(site: Site, rank: int, dtype: torch.dtype) -> Fit:
    down = torch.zeros((len(site.sizes), rank, site.inputs), dtype=dtype)
    return Fit(rank, down, torch.zeros((rank, site.outputs), dtype=dtype))


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
