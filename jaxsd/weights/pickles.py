"""Reads the header of PyTorch's zip files (`.bin`, `.ckpt`, `.pt`), without torch and safely.

Such a file is a zip archive: `*/data.pkl`, a pickle of the names, shapes and strides, and
`*/data/0`, `*/data/1`, ..., the plain bytes of each storage. A pickle is a program, so this one is
run by an interpreter that knows no function but those that describe a tensor; a file that asks for
anything else is refused, by the name of what it asks for, which is not even imported. Files of
before 1.6 hold the same pickle in another wrapping: `jaxsd.weights.legacy`.
"""

import collections
import io
import math
import os
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxsd.errors import JaxsdError
from jaxsd.weights.entries import ITEMSIZES, Entry
from jaxsd.weights.files import AnyPath

# torch's classes of storage, as safetensors spells their dtypes.
STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
# What torch.save writes (protocols 2 to 4), but for what makes objects of any other class.
OPCODES = frozenset(
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT "
    "SHORT_BINSTRING BINSTRING BINUNICODE SHORT_BINUNICODE SHORT_BINBYTES BINBYTES "
    "EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE EMPTY_LIST APPEND APPENDS "
    "EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS FROZENSET "
    "BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET "
    "GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID".split()
)
MAX_PICKLE = 100_000_000  # bytes; the largest checkpoint's is a thousandth of this


class Storage(NamedTuple):
    """Bytes in the archive, seen as numbers of one dtype."""

    dtype: str
    key: str
    numel: int


class Tensor(NamedTuple):
    """A view of a storage; offset and strides count numbers, not bytes."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_pickle_header(stream: Any, file: AnyPath) -> dict[str, Entry]:
    """Every tensor of a checkpoint, by name; those under "state_dict" if there is such a key.

    Nothing but the archive's directory and its pickle is read. JaxsdError if the file is damaged
    or asks for anything but tensors and plain containers.
    Values that are no tensors (the number of steps trained, say) are left out.
    """
    try:
        with zipfile.ZipFile(stream) as archive:
            members = {member.filename: member for member in archive.infolist()}
            pickles = [name for name in members if name.split("/", 1)[-1] == "data.pkl"]
            if len(pickles) != 1:
                raise JaxsdError(f"{file} is a zip archive, but not one that PyTorch wrote")
            prefix = pickles[0][: -len("data.pkl")]
            order = members.get(f"{prefix}byteorder")
            if order is not None and _stored(archive, order, 16) != b"little":
                raise JaxsdError(f"{file} is not in little-endian byte order; save it anew")
            program = _stored(archive, members[pickles[0]], MAX_PICKLE)
        tensors = tensors_in(unpickle(program, file)[0])
        size = stream.seek(0, os.SEEK_END)
        places = {
            key: _place(stream, members, f"{prefix}data/{key}", size)
            for key in {tensor.storage.key for tensor in tensors.values()}
        }
        return {name: entry_of(file, name, tensor, places) for name, tensor in tensors.items()}
    except (JaxsdError, OSError):
        raise
    except Exception as error:  # zipfile and pickle raise a dozen kinds on damaged bytes
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise JaxsdError(f"{file} is a damaged PyTorch file: {reason}") from None


# --- The archive -----------------------------------------------------------------------------


def _stored(archive: zipfile.ZipFile, member: zipfile.ZipInfo, most: int) -> bytes:
    """The bytes of a member that is not compressed: so they cannot outgrow the file."""
    if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
        raise ValueError(f"{member.filename} is compressed")
    if member.file_size > most:
        raise ValueError(f"{member.filename} takes {member.file_size} bytes")
    return archive.read(member)


def _place(stream: Any, members: dict, name: str, size: int) -> tuple[int, int]:
    """(offset in the file, bytes) of a member's data."""
    if name not in members:
        raise ValueError(f"it lacks {name}")
    member = members[name]
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    stream.seek(member.header_offset)
    header = stream.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise ValueError(f"{name} is not where the directory says")
    start = member.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
    if start + member.file_size > size:
        raise ValueError(f"{name} reaches beyond the end of the file")
    return start, member.file_size


def entry_of(file: AnyPath, name: str, tensor: Tensor, places: dict[str, tuple[int, int]]) -> Entry:
    """A tensor as a part of the file; ValueError if it does not lie inside its storage.

    places: (offset in the file, bytes) of each storage.
    """
    storage, itemsize = tensor.storage, ITEMSIZES[tensor.storage.dtype]
    start, held = places[storage.key]
    numbers = (tensor.offset, storage.numel, *tensor.shape, *tensor.strides)
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
        raise ValueError(f"{name} has shape {tensor.shape} and strides {tensor.strides}")
    count = math.prod(tensor.shape)
    steps = list(zip(tensor.shape, tensor.strides, strict=True))
    last = tensor.offset + sum((n - 1) * stride for n, stride in steps) if count else 0
    if storage.numel * itemsize > held or last >= max(storage.numel, 1):
        raise ValueError(f"{name} reaches outside its storage")
    if count > storage.numel:  # a number repeated by a stride of 0: nothing says how often
        raise ValueError(f"{name}, {list(tensor.shape)}, has more entries than its storage")
    strides = tuple(stride * itemsize for stride in tensor.strides)
    return Entry(file, storage.dtype, tensor.shape, start + tensor.offset * itemsize, strides)


# --- The pickle ------------------------------------------------------------------------------


def _rebuild_tensor(storage, offset, shape, strides, *_: Any) -> Tensor:
    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage")
    return Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(tensor: Tensor, *_: Any) -> Tensor:
    return tensor


def _plain(kind: type) -> Callable[..., Any]:
    return lambda items=(): kind(items)


# What a training checkpoint holds besides tensors: plain containers, and names of dtypes.
GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): lambda *_: {},  # its factory is not asked
    ("torch", "Size"): _plain(tuple),
    **{
        (module, kind.__name__): _plain(kind)
        for module in ("builtins", "__builtin__")
        for kind in (dict, list, set, frozenset)
    },
    **{("torch", name): name for name in ("float32", "float16", "bfloat16", "float64", "int64")},
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,  # before 0.4
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
}


# The unpickler in Python, because the one in C allocates as much memo as a file asks for.
_Python: Any = pickle._Unpickler  # pyright: ignore[reportAttributeAccessIssue]


class _Unpickler(_Python):
    dispatch = {
        ord(opcode.code): _Python.dispatch[ord(opcode.code)]
        for opcode in pickletools.opcodes
        if opcode.name in OPCODES
    }

    def __init__(self, program: bytes):
        super().__init__(io.BytesIO(program))
        self._left = len(program)
        self.storages: dict[str, Storage] = {}

    def load_reduce(self) -> None:
        """A container made of another is a copy, for which a file must pay in bytes of its own."""
        arguments = self.stack[-1]
        self._left -= sum(len(item) for item in arguments if hasattr(item, "__len__"))
        if self._left < 0:
            raise ValueError("its pickle makes more than it holds")
        super().load_reduce()

    dispatch[pickle.REDUCE[0]] = load_reduce

    def load_build(self) -> None:
        """Attributes of a container, such as a state dict's _metadata, are dropped."""
        self.stack.pop()
        if type(self.stack[-1]) is not collections.OrderedDict:
            raise ValueError("its pickle sets attributes")

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in GLOBALS:
            raise _Refused(f"{module}.{name}")
        return GLOBALS[module, name]

    def persistent_load(self, saved_id: Any) -> Storage:
        kind, dtype, key, _, numel, *view = saved_id  # the old format says None for the last
        if kind != "storage" or dtype not in ITEMSIZES or not isinstance(key, str) or any(view):
            raise ValueError(f"an unknown kind of storage, {saved_id[:3]}")
        return self.storages.setdefault(key, Storage(dtype, key, numel))


class _Refused(Exception):
    """A global that is not on the list."""


def unpickle(program: bytes, file: AnyPath) -> tuple[Any, dict[str, Storage]]:
    """What the pickle describes, of Tensors and plain containers, and every storage it names.

    JaxsdError if it asks for anything else, ValueError if it is damaged.
    """
    asked = [
        tuple(str(argument).split(" ", 1))
        for opcode, argument, _ in pickletools.genops(program)
        if opcode.name in ("GLOBAL", "INST")
    ]
    try:
        if alien := sorted({".".join(name) for name in asked if name not in GLOBALS}):
            raise _Refused(", ".join(alien))  # all of them, before any step is taken
        unpickler = _Unpickler(program)
        return unpickler.load(), unpickler.storages
    except _Refused as error:
        raise JaxsdError(
            f"{file} asks for {error}, which is no tensor: refused, because a pickle can run any "
            "code. Where you trust the file, save its state dict alone, as safetensors"
        ) from None
    except KeyError:  # from `dispatch`
        raise ValueError("its pickle holds an instruction that tensors do not need") from None


def tensors_in(value: Any) -> dict[str, Tensor]:
    """A state dict, or the one inside a training checkpoint."""
    if isinstance(value, dict) and isinstance(value.get("state_dict"), dict):
        value = value["state_dict"]
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not a state dict")
    if isinstance(value.get("string_to_param"), dict):  # A1111's embedding of a new word
        (vectors,) = value["string_to_param"].values()
        value = {value.get("name") or "*": vectors}
    tensors = {name: item for name, item in value.items() if isinstance(item, Tensor)}
    if not all(isinstance(name, str) for name in tensors):
        raise ValueError("a tensor without a name")
    return tensors
