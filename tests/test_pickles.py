"""A pickle can run any code: ours must run none, and believe nothing."""

import collections
import io
import os
import pickle
import struct
import tracemalloc
import zipfile

import pytest

from jaxsd import weights
from jaxsd.errors import JaxsdError


def checkpoint(path, program: bytes, data: bytes = bytes(16), **members: bytes):
    """A file such as torch.save writes, around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/data/0", data)
        for name, value in members.items():
            archive.writestr(f"archive/{name}", value)
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    digits = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(digits)]) + digits


def tensor(numel=4, offset=0, shape=(2, 2), strides=(2, 1), key="0", kind="storage") -> bytes:
    """The program of {"a": tensor}, in float32."""
    storage = b"(" + text(kind) + b"ctorch\nFloatStorage\n" + text(key) + text("cpu")
    storage += number(numel) + b"tQ"
    view = number(offset) + b"(" + b"".join(map(number, shape)) + b"t"
    view += b"(" + b"".join(map(number, strides)) + b"t\x89N"
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + view + b"tR"
    return b"\x80\x02}" + text("a") + rebuilt + b"s."


def refused(file) -> str:
    with pytest.raises(JaxsdError) as error:
        weights.load(file, {"a": (2, 2)})
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_hand_made_file_is_read(tmp_path):
    data = struct.pack("<4f", 1, 2, 3, 4)
    params = weights.load(checkpoint(tmp_path / "a.bin", tensor(), data), {"a": (2, 2)})
    assert params["a"].tolist() == [[1, 2], [3, 4]]


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: {"state_dict": {"a": [evil]}}])
def test_nothing_is_executed(tmp_path, protocol, wrap):
    canary = tmp_path / "canary"
    program = pickle.dumps(wrap(Evil(os.mkdir, str(canary))), protocol)
    message = refused(checkpoint(tmp_path / "a.ckpt", program))
    assert not canary.exists()
    if protocol:  # protocol 0 is text, which torch never writes
        assert f"{os.mkdir.__module__}.mkdir" in message


@pytest.mark.parametrize(
    "name",
    ["builtins eval", "os system", "torch._utils _rebuild_tensor_v2.__globals__", "jaxsd load"],
)
def test_globals_are_refused_by_name(tmp_path, name):
    module, function = name.split(" ")
    program = b"\x80\x02c" + f"{module}\n{function}\n".encode() + text("1") + b"\x85R."
    assert f"{module}.{function}" in refused(checkpoint(tmp_path / "a.bin", program))


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}" + text("__doc__") + text("x") + b"sb.",
        b"\x80\x02ccollections\nOrderedDict\nN}" + text("get") + text("x") + b"s\x86b.",
        b"\x80\x02ccollections\nOrderedDict\n)\x81.",  # NEWOBJ
        b"\x80\x02i" + b"collections\nOrderedDict\n.",
        b"\x80\x02\x82\x01.",  # the extension registry
        b"\x80\x04\x96" + struct.pack("<Q", 1 << 40) + b"a.",  # a bytearray of a terabyte
        b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"}.",
        b"\x80\x02X" + struct.pack("<I", 1 << 31) + b"a.",
        b"\x80\x02}r" + struct.pack("<I", (1 << 32) - 1) + b".",  # a memo of 4 billion places
        b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
        b"\x80\x02K\x01.",
        b"\x80\x02]a.",
        b"\x80\x02h\x07.",
        b"\x80\x02",
        b"",
        b"not a pickle",
    ],
)
def test_programs_of_other_kinds(tmp_path, program):
    file = checkpoint(tmp_path / "a.bin", program)
    tracemalloc.start()
    refused(file)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


def test_plain_containers_are_read(tmp_path):
    """As a training checkpoint holds them beside the tensors."""
    extras = {"seen": {1, 2}, "frozen": frozenset("a"), "rates": (1e-4, None), "deep": [{"a": [1]}]}
    extras["counts"] = collections.defaultdict(list, {"a": [1]})
    for protocol in (2, 3, 4):
        value = pickle.dumps(extras, protocol)[2:-1]  # without its first and last instruction
        program = b"\x80\x02}" + text("extras") + value + b"s" + tensor()[3:]
        data = struct.pack("<4f", 1, 2, 3, 4)
        file = checkpoint(tmp_path / "a.bin", program, data)
        assert weights.load(file, {"a": (2, 2)})["a"].tolist() == [[1, 2], [3, 4]]


def test_copies_of_copies_are_refused(tmp_path):
    """A few bytes each, and the memory of a list of a thousand."""
    thousand = b"](" + b"K\x01" * 1000 + b"eq\x00"
    copies = b"".join(b"cbuiltins\nlist\nh\x00\x85R" for _ in range(1000))
    file = checkpoint(tmp_path / "a.bin", b"\x80\x02" + thousand + copies + b".")
    assert "makes more than it holds" in refused(file)


@pytest.mark.parametrize(
    "lie",
    [
        {"numel": 5},
        {"numel": 1 << 62},
        {"numel": -4},
        {"offset": 1},
        {"offset": -1},
        {"shape": (2, 3), "strides": (3, 1)},
        {"shape": (2,)},
        {"shape": (-2, -2)},
        {"strides": (2, 2)},
        {"strides": (0, 0), "shape": (1 << 20, 1 << 20)},
        {"strides": (-1, 1)},
        {"shape": (1 << 63, 2)},
        {"key": "1"},
        {"key": "../../etc/passwd"},
        {"kind": "module"},
    ],
)
def test_lies_about_a_tensor(tmp_path, lie):
    refused(checkpoint(tmp_path / "a.bin", tensor(**lie)))


def test_archives_that_are_none_of_pytorch(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.bin", "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "not one that PyTorch wrote" in refused(tmp_path / "a.bin")
    checkpoint(tmp_path / "b.bin", tensor(), byteorder=b"big")
    assert "little-endian" in refused(tmp_path / "b.bin")
    (tmp_path / "c.bin").write_bytes(b"PK\x03\x04" + bytes(100))
    refused(tmp_path / "c.bin")
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + bytes(1 << 24))
    (tmp_path / "d.bin").write_bytes(bomb.getvalue())
    assert "compressed" in refused(tmp_path / "d.bin")
