"""What clients send as weights: read as torch and SGLang write it; nothing of a hostile payload is ever executed."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import pickletools
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import multiprocessing

from phloem.core.errors import BadRequest
from phloem.rl._records import records
from phloem.rl.payload import named_tensors

LIMIT = 1 << 20
SENT = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": torch.ones(5, dtype=torch.bfloat16),
    "c": torch.arange(7, dtype=torch.float16)[2:],
    "d": torch.arange(6, dtype=torch.float32).view(2, 3).T,
    "e": torch.nn.Parameter(torch.zeros(2, 2)),
    "f": torch.empty(0, 4),
}


@pytest.fixture
def shared() -> Iterator[None]:
    before = multiprocessing.get_sharing_strategy()
    multiprocessing.set_sharing_strategy("file_system")
    yield
    multiprocessing.set_sharing_strategy(before)


def dumped(thing: Any) -> bytes:
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump(thing)
    return buffer.getvalue()


def same(found: list[tuple[str, torch.Tensor]], want: dict[str, torch.Tensor]) -> None:
    assert sorted(name for name, _ in found) == sorted(want)
    for name, tensor in found:
        assert tensor.dtype == want[name].dtype and torch.equal(tensor, want[name].detach()), name


@pytest.mark.slow
@pytest.mark.usefixtures("shared")
def test_shared_tensors_are_read_as_torch_hands_them_over() -> None:
    kept = {name: tensor.clone() if name != "e" else tensor for name, tensor in SENT.items()}
    same(named_tensors([dumped(list(kept.items()))], None, LIMIT), kept)
    same(named_tensors([dumped(kept)], "direct", LIMIT), kept)


def test_safetensors_come_in_any_number() -> None:
    blobs = [save({"a": SENT["a"]}), save({"b": SENT["b"], "c": SENT["c"].clone()})]
    same(named_tensors(blobs, "safetensors", LIMIT), {name: SENT[name] for name in "abc"})
    with pytest.raises(BadRequest, match="not safetensors"):
        named_tensors([b"nothing"], "safetensors", LIMIT)
    with pytest.raises(BadRequest, match="larger than the 10 bytes"):
        named_tensors(blobs, "safetensors", 10)


def class_of(module: str, name: str, fields: dict[str, Any]) -> Iterator[Any]:
    """A dataclass where SGLang has one, so that it is pickled by that name."""
    made = dataclass(type(name, (), {"__annotations__": fields, "__module__": module}))
    parts = module.split(".")
    names = [".".join(parts[: at + 1]) for at in range(len(parts))]
    for one in names:
        sys.modules[one] = types.ModuleType(one)
    setattr(sys.modules[module], name, made)
    yield made
    for one in names:
        del sys.modules[one]


@pytest.fixture(params=["sglang.srt.weight_sync.tensor_bucket", "sglang.srt.model_executor.model_runner"])
def metadata(request: pytest.FixtureRequest) -> Iterator[Any]:
    fields = {"name": str, "shape": Any, "dtype": Any, "start_idx": int, "end_idx": int, "numel": int}
    yield from class_of(request.param, "FlattenedTensorMetadata", fields)


@pytest.mark.usefixtures("shared")
def test_a_flattened_bucket_gives_its_tensors_wherever_they_begin(metadata: Any) -> None:
    tensors = {"x": torch.ones(3, dtype=torch.bfloat16), "y": torch.tensor([[1.5, 2.5]]), "z": torch.ones(2).half()}
    rows = [tensor.view(-1).view(torch.uint8) for tensor in tensors.values()]
    places, end = [], 0
    for (name, tensor), row in zip(tensors.items(), rows, strict=True):
        places.append(metadata(name, tensor.shape, tensor.dtype, end, end + len(row), tensor.numel()))
        end += len(row)
    bucket = {"flattened_tensor": torch.cat(rows), "metadata": places}
    same(named_tensors([dumped(bucket)], "flattened_bucket", LIMIT), tensors)
    wide = {"flattened_tensor": torch.zeros(1, dtype=torch.uint8).expand(1 << 40)}  # one byte, shown very often
    with pytest.raises(BadRequest, match="one behind the other"):
        named_tensors([dumped({**wide, "metadata": []})], "flattened_bucket", LIMIT)
    with pytest.raises(BadRequest, match="in the same place"):  # so that a few bytes would take any memory
        named_tensors([dumped({**bucket, "metadata": [*places, places[0]]})], "flattened_bucket", LIMIT)
    places[1].end_idx = 400
    with pytest.raises(BadRequest, match="lies outside of it"):
        named_tensors([dumped(bucket)], "flattened_bucket", LIMIT)
    places[1].end_idx = places[1].start_idx + 4
    with pytest.raises(BadRequest, match="4 bytes do not hold"):
        named_tensors([dumped(bucket)], "flattened_bucket", LIMIT)
    empty = {"flattened_tensor": torch.empty(0, dtype=torch.uint8), "metadata": []}
    assert named_tensors([dumped(empty)], "flattened_bucket", LIMIT) == []
    with pytest.raises(BadRequest, match="no flattened bucket"):
        named_tensors([dumped([])], "flattened_bucket", LIMIT)


@pytest.mark.usefixtures("shared")
def test_tensors_that_were_serialised_for_each_rank_apart() -> None:
    module = "sglang.srt.model_executor.model_runner"
    for made in class_of(module, "LocalSerializedTensor", {"values": list}):
        tensor = torch.ones(3)
        same(named_tensors([dumped([("a", made([dumped(tensor)]))])], None, LIMIT), {"a": tensor})
        with pytest.raises(BadRequest, match="several ranks"):
            named_tensors([dumped([("a", made([b"", b""]))])], None, LIMIT)


def test_what_cannot_be_opened_here_is_refused_with_the_remedy() -> None:
    before = multiprocessing.get_sharing_strategy()
    multiprocessing.set_sharing_strategy("file_descriptor")
    try:
        with pytest.raises(BadRequest, match="set_sharing_strategy"):
            named_tensors([dumped([("a", torch.ones(2))])], None, LIMIT)
    finally:
        multiprocessing.set_sharing_strategy(before)


@pytest.mark.usefixtures("shared")
def test_handles_are_checked_before_they_are_opened() -> None:
    tensor = torch.arange(8, dtype=torch.float32)
    good = dumped([("a", tensor)])
    (name,) = [arg for code, arg, _ in pickletools.genops(good) if isinstance(arg, bytes) and arg[:6] == b"/torch"]
    for other in (b"/../etc/passwd", b"/torch_1_2_3/../x", b"/torch_0_0_0"):
        bad = good.replace(bytes([len(name)]) + name, bytes([len(other)]) + other)
        bad = bad[:2] + b"\x95" + (len(bad) - 11).to_bytes(8, "little") + bad[11:]
        with pytest.raises(BadRequest, match=r"not torch's|shared memory"):
            named_tensors([bad], None, LIMIT)
    with pytest.raises(BadRequest, match="more than the 31 bytes"):
        named_tensors([good], None, 31)
    size = good.rindex(b"K\x20")  # the storage's
    with pytest.raises(BadRequest, match="bytes, expected"):
        named_tensors([good[:size] + b"K\x10" + good[size + 2 :]], None, LIMIT)
    shape = good.rindex(b"K\x08")  # of the tensor
    with pytest.raises(BadRequest, match="outside of its memory"):
        named_tensors([good[:shape] + b"K\x09" + good[shape + 2 :]], None, LIMIT)


@pytest.mark.usefixtures("shared")
def test_what_a_tensor_or_a_bucket_lacks_is_named() -> None:
    good = dumped([("a", torch.arange(8, dtype=torch.float32))])
    stride = good.rindex(b"K\x01\x85")
    bad = good[:stride] + b"K\x01K\x01\x86" + good[stride + 3 :]
    bad = bad[:2] + b"\x95" + (len(bad) - 11).to_bytes(8, "little") + bad[11:]
    with pytest.raises(BadRequest, match=r"shape \[8\] has 2 strides"):
        named_tensors([bad], None, LIMIT)
    with pytest.raises(BadRequest, match="no list"):
        named_tensors([dumped({"flattened_tensor": torch.zeros(4, dtype=torch.uint8)})], None, LIMIT)


class Evil:
    def __init__(self, what: Any, *args: Any) -> None:
        self.what, self.args = what, args

    def __reduce__(self) -> Any:
        return self.what, self.args


HOSTILE = [
    Evil(os.system, "touch /tmp/phloem-was-here"),
    Evil(eval, "1"),
    Evil(getattr, "text", "upper"),
    Evil(__import__, "os"),
    Evil(torch.load, "/etc/passwd"),
    Evil(pickle.loads, b"."),
    Evil(io.open, "/tmp/phloem-was-here", "w"),
    Evil(torch._utils._rebuild_tensor_v2),
]


@pytest.mark.parametrize("evil", HOSTILE, ids=lambda evil: evil.what.__name__)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_hostile_payloads_name_what_is_refused_and_run_nothing(evil: Evil, protocol: int) -> None:
    for thing in (evil, [("a", evil)], {"flattened_tensor": evil, "metadata": []}):
        with pytest.raises(BadRequest, match=r"names|operation"):
            named_tensors([pickle.dumps(thing, protocol)], None, LIMIT)
    assert not os.path.exists("/tmp/phloem-was-here")


RAW = [
    b"cos\nsystem\n(S'true'\ntR.",  # protocol 0
    b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.",
    b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    b"\x80\x04\x8c\x05torch\x8c\x0d__import__\x93.",
    b"\x80\x04\x8c\x05torch\x8c\x0aload.thing\x93.",
    b"\x80\x02\x82\x01.",  # an extension
    b"\x80\x04Pid\n.",  # a persistent id
    b"(ios\nsystem\n.",
    b"\x80\x04]\x94r\xff\xff\xff\x7f.",  # a far place in the memo
    b"\x80\x04h\x07.",
    b"\x80\x04)R.",
    b"\x80\x04]q\x00h\x00a.",  # a list in itself
    b"\x80\x04]}b.",
    b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",
    b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
    b"",
    b".",
    b"\x80\x04N.",
    b"\x80\x04}\x8c\x10flattened_tensorNs.",
]


@pytest.mark.parametrize("data", RAW, ids=range(len(RAW)))
def test_odd_pickles_are_refused_or_hold_nothing(data: bytes) -> None:
    with contextlib.suppress(BadRequest):
        assert named_tensors([data], None, LIMIT) == []


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=60), cut=st.integers(0, 500), base=st.booleans())
def test_noise_is_refused_or_read_as_nothing(data: bytes, cut: int, base: bool) -> None:
    whole = pickle.dumps([("a", torch.float32), (torch.Size([2]), {"x": b"y"})], 4) if base else b"\x80\x04"
    with contextlib.suppress(BadRequest):
        records(whole[:cut] + data + whole[cut:])


def test_a_custom_loader_is_never_run() -> None:
    for name in ("os.system", "my.module.load", "dtensor"):
        with pytest.raises(BadRequest, match="is not one of"):
            named_tensors([b""], name, LIMIT)
