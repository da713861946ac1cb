"""Arrays come through a pickle as they went in; nothing else comes through, and nothing runs."""

import _codecs
import collections
import functools
import os
import pickle
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mmfusion.data.pickles import as_numbers, file_identity, load_npz, load_pickle
from mmfusion.errors import InputError

PROTOCOLS = range(6)
ARRAYS = [
    np.arange(6.0).reshape(2, 3),
    np.asfortranarray(np.arange(6, dtype=">i2").reshape(2, 3)),
    np.array(5),
    np.zeros((0, 3), np.float32),
    np.array([True, False]),
    np.array([1.5], np.float16),
    np.array(["ab", "cdé"]),
    np.array(["", ""]),
    np.array([b"a\xff"]),
]


def _write(tmp_path, content: bytes):
    path = tmp_path / "file.pkl"
    path.write_bytes(content)
    return path


def _refusal(tmp_path, content: bytes) -> str:
    path = _write(tmp_path, content)
    with pytest.raises(InputError) as caught:
        load_pickle(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}-{array.shape}")
def test_arrays_come_through(tmp_path, array, protocol):
    read = load_pickle(_write(tmp_path, pickle.dumps(array, protocol)))
    assert type(read) is np.ndarray
    assert (read.dtype, read.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_containers_and_scalars_come_through(tmp_path, protocol):
    value = {"a": [1, (2.5, None)], "b": {1, 2}, "c": b"", "d": b"\xff", "e": np.float32(1.5), "f": np.str_("x")}
    value["g"] = frozenset([True])
    assert load_pickle(_write(tmp_path, pickle.dumps(value, protocol))) == value


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_of_objects_come_through(tmp_path, protocol):
    array = np.array([["a", [1, [2]]], [np.ones(2), {"k": np.zeros(1)}]], object)
    read = load_pickle(_write(tmp_path, pickle.dumps(array, protocol)))
    assert (read.dtype, read.shape, read[0, 0], read[0, 1]) == (object, (2, 2), "a", [1, [2]])
    assert type(read[1, 0]) is type(read[1, 1]["k"]) is np.ndarray


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_ordered_dictionaries_become_dictionaries(tmp_path, protocol):
    read = load_pickle(_write(tmp_path, pickle.dumps(collections.OrderedDict(b=1, a=2), protocol)))
    assert type(read) is dict
    assert list(read.items()) == [("b", 1), ("a", 2)]


def test_shared_arrays_stay_shared(tmp_path):
    array = np.ones(3)
    read = load_pickle(_write(tmp_path, pickle.dumps([array, array])))
    assert read[0] is read[1]


def test_a_python_2_pickle_is_read(tmp_path):
    # as numpy 1 under Python 2 wrote np.array([1., 2.], "<f4"): raw bytes as a str
    content = (
        b"cnumpy.core.multiarray\n_reconstruct\np0\n(cnumpy\nndarray\np1\n(I0\ntp2\nS'b'\np3\ntp4\nRp5\n"
        b"(I1\n(I2\ntp6\ncnumpy\ndtype\np7\n(S'f4'\np8\nI0\nI1\ntp9\nRp10\n(I3\nS'<'\np11\nNNNI-1\nI-1\nI0\ntp12\nb"
        b"I00\nS'\\x00\\x00\\x80?\\x00\\x00\\x00@'\np13\ntp14\nb."
    )
    np.testing.assert_array_equal(load_pickle(_write(tmp_path, content)), np.array([1, 2], np.float32))


class _Call:
    """Pickles as a call of `function` with `args`."""

    def __init__(self, function, *args, state=None):
        self.parts = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.parts


def _hostile(marker) -> dict[str, object]:
    code = f"open({str(marker)!r}, 'w').close()"
    call = f"touch {marker}"
    return {
        "os.system": _Call(os.system, call),
        "eval": _Call(eval, code),
        "exec": _Call(exec, code),
        "subprocess": _Call(subprocess.Popen, ["touch", str(marker)]),
        "open": _Call(open, str(marker), "w"),
        "getattr": _Call(getattr, _Call(__import__, "os"), "system"),
        "import": _Call(__import__, "os"),
        "partial": _Call(functools.partial, os.system, call),
        "nested in a dictionary": {"train": {"text": [np.ones(2), _Call(os.system, call)]}},
        "within an array of objects": np.array([_Call(os.system, call), 1], object),
        "as an array's state": _Call(np.ndarray, (1,), state=_Call(os.system, call)),
        "numpy.load": _Call(np.load, str(marker), None, True),
        "numpy.memmap": _Call(np.memmap, str(marker), "u1", "w+", 0, (1,)),
        "numpy.fromfile": _Call(np.fromfile, str(marker)),
        "runpy": _Call(__import__("runpy").run_path, str(marker)),
        "codec": _Call(_codecs.encode, "text", "zlib_codec"),
        "a class": _Call,
        "a function": os.system,
        "set of a generator": _Call(map, os.system, [call]),
    }


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", list(_hostile("x")))
def test_hostile_pickles_are_refused_and_nothing_runs(tmp_path, name, protocol):
    marker = tmp_path / "ran"
    _refusal(tmp_path, pickle.dumps(_hostile(marker)[name], protocol))
    assert not marker.exists()


@pytest.mark.parametrize("name", ["os.system", "eval", "exec", "nested in a dictionary", "within an array of objects"])
def test_the_hostile_pickles_would_run_elsewhere(tmp_path, name):
    pickle.loads(pickle.dumps(_hostile(tmp_path / "ran")[name]))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "opcodes",
    [
        b"(S'touch MARKER'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch MARKER'\no.",  # OBJ
        b"cos\nsystem\nS'touch MARKER'\n\x85R.",  # GLOBAL, REDUCE
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch MARKER\x85R.",  # STACK_GLOBAL
        b"\x80\x02csubprocess\nPopen\nS'touch MARKER'\n\x85\x81.",  # NEWOBJ
        b"\x80\x04\x8c\x05numpy\x8c\x0bf2py.os.sys\x93.",  # a dotted name
        b"\x80\x04\x8c\x16numpy.core.multiarray\x8c\x0c_reconstruct.__globals__\x93.",
        b"\x80\x02\x82\x01.",  # EXT1
        b"S'id'\nQ.",  # BINPERSID
        b"Pid\n.",  # PERSID
    ],
)
def test_hostile_opcodes_are_refused_and_nothing_runs(tmp_path, opcodes, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _refusal(tmp_path, opcodes)
    assert not (tmp_path / "MARKER").exists()


MAKERS = [b"cnumpy\ndtype\n", b"cnumpy\nndarray\n", b"cnumpy.core.multiarray\n_reconstruct\n", b"c_codecs\nencode\n"]


@pytest.mark.parametrize("maker", MAKERS)
def test_no_admitted_name_can_be_altered_or_subclassed(tmp_path, maker):
    _refusal(tmp_path, b"\x80\x02" + maker + b"}S'__call__'\nI1\nsb0N.")  # BUILD with a dictionary
    _refusal(tmp_path, b"\x80\x02" + maker + b"N}S'_make'\nI1\ns\x86b0N.")  # BUILD with slots
    _refusal(tmp_path, b"\x80\x02" + maker + b")\x810N.")  # NEWOBJ
    _refusal(tmp_path, b"\x80\x02" + maker + b".")  # a function is no data
    np.testing.assert_array_equal(load_pickle(_write(tmp_path, pickle.dumps(np.ones(2), 2))), np.ones(2))


@pytest.mark.parametrize("state", [b"(I3\nS'<'\nN(S'x'\ntN", b"(I3\nS'<'\nNN}", b"(I3\nS'<'\n(I1\nI2\ntNN"])
def test_a_type_with_names_fields_or_a_subarray_is_refused(tmp_path, state):
    content = _dtype_state(b"f4", state + b"I8\nI1\nI0\nt") + b"."
    assert _refusal(tmp_path, content).startswith("holds a structured array")


def _dtype_state(code: bytes, state: bytes) -> bytes:
    return b"\x80\x02cnumpy\ndtype\n(S'" + code + b"'\nI0\nI1\ntR" + state + b"b"


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(2, [("a", "f4"), ("b", "O")]),
        np.zeros(2, "V8"),
        np.zeros(2, "M8[s]"),
    ],
    ids=["structured", "void", "dates"],
)
def test_types_with_a_richer_state_are_refused(tmp_path, array):
    for protocol in (2, 5):
        assert _refusal(tmp_path, pickle.dumps(array, protocol)).startswith("holds a")


def test_a_types_metadata_is_left_behind(tmp_path):
    array = np.ones(2, np.dtype("f4", metadata={"a": 1}))
    read = load_pickle(_write(tmp_path, pickle.dumps(array, 2)))
    np.testing.assert_array_equal(read, array)
    assert read.dtype.metadata is None


def test_objects_cannot_be_made_of_raw_bytes(tmp_path):
    # an object array whose bytes would be taken for pointers
    dtype = _dtype_state(b"O8", b"(I3\nS'|'\nNNNI-1\nI-1\nI0\nt")
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
    body = dtype + b"0\x80\x02" + array + b"(I1\n(I1\nt" + dtype[2:] + b"I00\nS'AAAAAAAA'\ntb."
    assert _refusal(tmp_path, body).startswith("holds an array of objects without its objects")


@pytest.mark.parametrize(
    "shape", [b"(I3\nt", b"(I-1\nt", b"(F1.0\nt", b"(S'a'\nt"], ids=["too large", "negative", "float", "string"]
)
def test_shapes_that_do_not_fit_the_bytes_are_refused(tmp_path, shape):
    dtype = _dtype_state(b"f4", b"(I3\nS'<'\nNNNI-1\nI-1\nI0\nt")
    array = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
    _refusal(tmp_path, array + b"(I1\n" + shape + dtype[2:] + b"I00\nS'AAAAAAAA'\ntb.")


def test_text_beyond_unicode_is_refused(tmp_path):
    content = pickle.dumps(np.array(["ab"]), 4).replace("ab".encode("utf-32-le"), b"\xff" * 8)
    assert "Unicode" in _refusal(tmp_path, content)


@pytest.mark.parametrize("content", [b"", b"no pickle", b"PK\x03\x04zip", b"{}", b"\x80\x04", b"."])
def test_what_is_no_pickle_is_refused(tmp_path, content):
    _refusal(tmp_path, content)


@settings(deadline=None, max_examples=60)
@given(cut=st.integers(0, 400))
def test_every_truncation_is_refused(tmp_path_factory, cut):
    content = pickle.dumps({"a": np.arange(40.0), "b": ["text", np.array(["x", 1], object)]})
    _refusal(tmp_path_factory.mktemp("cut"), content[: min(cut, len(content) - 1)])


@settings(deadline=None, max_examples=200)
@given(place=st.integers(0, 10_000), byte=st.integers(0, 255))
@example(place=5172, byte=46)  # ends where a dtype, numpy's own data, lies on top
def test_a_flipped_byte_ends_in_plain_data_or_in_one_line(tmp_path_factory, place, byte):
    content = bytearray(pickle.dumps({"a": np.arange(4.0), "b": ["text", np.array(["x", 1], object), {1}]}, 2))
    content[place % len(content)] = byte
    path = _write(tmp_path_factory.mktemp("flip"), bytes(content))
    try:
        read = load_pickle(path)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert type(read).__module__.partition(".")[0] in ("builtins", "numpy")


def test_deep_nesting_is_refused(tmp_path):
    _refusal(tmp_path, b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b".")


def test_a_list_that_holds_itself_is_refused(tmp_path):
    cycle: list = []
    cycle.append(cycle)
    assert "deep" in _refusal(tmp_path, pickle.dumps(cycle))


def test_shared_parts_are_visited_once(tmp_path):
    value: list = []
    for _ in range(45):  # 2^45 leaves if each were visited
        value = [value, value]
    assert load_pickle(_write(tmp_path, pickle.dumps(value)))[0] is not None


def test_no_module_is_imported(tmp_path):
    name = "wave" if "wave" not in sys.modules else "sndhdr"
    _refusal(tmp_path, f"c{name}\nopen\n.".encode())
    assert name not in sys.modules


@pytest.mark.parametrize("read", [load_pickle, load_npz, file_identity])
def test_files_that_cannot_be_read_are_named(tmp_path, read):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(InputError, match="cannot be read") as caught:
            read(path)
        assert str(path) in str(caught.value)


def test_npz_of_plain_arrays_is_read(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.arange(3), y=np.array(["a"]))
    read = load_npz(tmp_path / "a.npz")
    assert list(read) == ["x", "y"]
    np.testing.assert_array_equal(read["x"], np.arange(3))


def test_npz_with_objects_is_refused_and_nothing_runs(tmp_path):
    marker = tmp_path / "ran"
    np.savez(tmp_path / "a.npz", x=np.array([_Call(os.system, f"touch {marker}"), 1], object))
    with pytest.raises(InputError, match=r"plain arrays"):
        load_npz(tmp_path / "a.npz")
    assert not marker.exists()


def test_npz_that_is_damaged_or_another_file_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", x=np.arange(1000.0))
    whole = (tmp_path / "a.npz").read_bytes()
    np.save(tmp_path / "one.npy", np.arange(3))
    damaged = [whole[:200], whole[:100] + b"\0" * 50 + whole[150:], b"", b"text", (tmp_path / "one.npy").read_bytes()]
    for content in damaged:
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(InputError) as caught:
            load_npz(tmp_path / "a.npz")
        assert "\n" not in str(caught.value)


def test_identity_names_the_file_without_its_folder(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_identity(tmp_path / "a") == {
        "file": "a",
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    }


@pytest.mark.parametrize("value", [["a"], [[1, 2], [3]], np.array([{}], object), "text"])
def test_what_is_no_array_of_numbers_is_refused(value):
    with pytest.raises(InputError, match=r"^here: "):
        as_numbers(value, "here")


def _npz(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def _npy(shape: str, dtype: str = "<f8", content: bytes = b"") -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content


@pytest.mark.parametrize(
    ("member", "reason"),
    [
        (_npy("(1152921504606846976,)"), "says that it has shape"),
        (_npy("(100000, 100000, 100000, 100000)"), "says that it has shape"),
        (_npy("(1073741824,)", "<U0"), "says that it has shape"),
        (_npy("(3,)", content=b"12345678" * 2), "holds 16 bytes"),
        (_npy("(-1,)", content=b"12345678"), "has shape"),
        (_npy("(" * 3000), ""),
        (b"no array", ""),
        (b"", ""),
    ],
)
def test_npz_whose_header_claims_more_than_it_brings_costs_no_memory(tmp_path, member, reason):
    path = _npz(tmp_path / "a.npz", {"good.npy": _npy("(1,)", content=b"12345678"), "bad.npy": member})
    tracemalloc.start()
    with pytest.raises(InputError, match=rf"a\.npz: is not a readable .npz .*{reason}"):
        load_npz(path)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_npz_that_unpacks_to_a_thousandfold_is_refused(tmp_path, monkeypatch):
    content = _npy("(1000000,)", content=bytes(8_000_000))
    path = _npz(tmp_path / "a.npz", {"x.npy": content}, zipfile.ZIP_DEFLATED)
    assert load_npz(path)["x"].sum() == 0
    monkeypatch.setattr("mmfusion.data.pickles.UNPACKED_BYTES", 1_000_000)
    with pytest.raises(InputError, match=r"a file of 8.0 kB says that it unpacks to 8.0 MB"):
        load_npz(path)
    with pytest.raises(InputError, match="compressed in another way"):
        load_npz(_npz(tmp_path / "b.npz", {"x.npy": _npy("(1,)", content=bytes(8))}, zipfile.ZIP_BZIP2))


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_npz_of_every_kind_equals_numpys_reading(tmp_path, write):
    arrays = {
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "scalar": np.float32(3),
        "none": np.zeros((0, 5)),
        "text": np.array(["a", "bcd"]),
        "bytes": np.array([b"a"]),
        "big": np.arange(100_000),
    }
    write(tmp_path / "a.npz", **arrays)
    read = load_npz(tmp_path / "a.npz")
    assert list(read) == list(arrays)
    for key, array in arrays.items():
        np.testing.assert_array_equal(read[key], array)
        assert read[key].dtype == np.asarray(array).dtype


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02Nr" + (0x3FFFFFFF).to_bytes(4, "little") + b".",
        b"Np1073741823\n.",
        b"\x80\x02]q\x00" + b"r" + (1 << 28).to_bytes(4, "little") + b".",
    ],
)
def test_a_pickle_cannot_ask_for_room_that_it_does_not_fill(tmp_path, content):
    assert "of its memo" in _refusal(tmp_path, content)  # 10 bytes took 17 GB


@pytest.mark.parametrize("protocol", range(6))
def test_honest_memos_pass(tmp_path, protocol):
    value = [{"a": (number, str(number), b"x" * 300, "y" * 300, 2**80)} for number in range(400)]
    assert load_pickle(_write(tmp_path, pickle.dumps(value, protocol))) == value


@pytest.mark.parametrize("shape", [1 << 24, 1 << 60])
def test_arrays_of_nothing_cannot_grow(tmp_path, shape):
    """An array of texts without a letter brings no bytes, whatever its shape."""
    whole = pickle.dumps(np.zeros(3, "S1"), 2)
    content = whole.replace(b"K\x03\x85", b"\x8a\x08" + shape.to_bytes(8, "little") + b"\x85")
    assert content != whole
    _refusal(tmp_path, content)
    empty = content.replace(b"S1", b"S0").replace(b"K\x01K\x01K\x00t", b"K\x00K\x01K\x00t")
    assert empty.count(b"S0") == 1 and b"K\x00K\x01K\x00t" in empty
    assert "without content" in _refusal(tmp_path, empty)


@pytest.mark.parametrize("read", [load_pickle, load_npz, file_identity])
@pytest.mark.parametrize("kind", ["fifo", "endless", "dangling"])
def test_what_is_no_regular_file_is_not_opened(tmp_path, read, kind):
    path = tmp_path / "a.npz"
    os.mkfifo(path) if kind == "fifo" else path.symlink_to("/dev/zero" if kind == "endless" else "gone")
    with pytest.raises(InputError, match=r"a\.npz: cannot be read \((is a FIFO, a device|is a link to gone)"):
        read(path)
