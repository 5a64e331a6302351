"""Nothing that a pickle names is imported or called; whatever is not data is refused with the whole list."""

import argparse
import collections
import contextlib
import io
import os
import pickle
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swissarmy.core.errors import CheckpointError
from swissarmy.interop.sat_legacy.torch_file import TorchFile
from swissarmy.interop.sat_legacy.unpickle import MAX_PICKLE_BYTES, unpickle
from tests.interop.sat_legacy.legacy import extras

ZIP_AND_STREAM = pytest.mark.parametrize("zip_file", [True, False], ids=["zip", "stream"])


class Evil:
    """Runs a command when it is unpickled, in the classic way."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


class Later:
    """Asks for a second name, after the first was refused."""

    def __reduce__(self) -> Any:
        return eval, ("1",)


def save(path: Path, content: Any, *, zip_file: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zip_file)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        TorchFile(path)
    return str(caught.value)


def read(data: bytes) -> Any:
    return unpickle(io.BytesIO(data), "the pickle")


@ZIP_AND_STREAM
def test_a_command_is_not_run_and_everything_asked_for_is_listed(tmp_path: Path, zip_file: bool) -> None:
    canary = tmp_path / "canary"
    content = {"module": {"w": torch.ones(2)}, "a": Evil(canary), "b": Later(), "c": [Evil(canary)]}
    message = refusal(save(tmp_path / "evil.pt", content, zip_file=zip_file))
    assert "posix.system, __builtin__.eval." in message
    assert "nothing in it was run" in message
    assert not canary.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_command_is_not_run_whatever_the_protocol(tmp_path: Path, protocol: int) -> None:
    with pytest.raises(CheckpointError, match=r"asks for posix\.system"):
        read(pickle.dumps(Evil(tmp_path / "canary"), protocol))
    assert not (tmp_path / "canary").exists()


def test_a_class_is_not_made_by_any_instruction(tmp_path: Path) -> None:
    for data in (
        b"(iposix\nsystem\n.",  # INST
        b"(cposix\nsystem\no.",  # OBJ
        b"cposix\nsystem\n)\x81.",  # NEWOBJ
        b"cposix\nsystem\n)}\x92.",  # NEWOBJ_EX
        b"cbuiltins\neval\n(X\x01\x00\x00\x001tR.",  # REDUCE
        b"csubprocess\nPopen\n)R}b.",  # BUILD
    ):
        with pytest.raises(CheckpointError, match="was refused"):
            read(data)


def test_an_attribute_of_an_allowed_module_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"asks for torch\.load"):
        read(b"ctorch\nload\n(X\x01\x00\x00\x00xtR.")
    with pytest.raises(CheckpointError, match=r"asks for torch\._utils\.os\.system"):
        read(pickle.PROTO + b"\x04\x8c\x0ctorch._utils\x8c\x09os.system\x93.")


@ZIP_AND_STREAM
def test_random_states_and_what_deepspeed_adds_are_read_over(tmp_path: Path, zip_file: bool) -> None:
    content = {"module": collections.OrderedDict(w=torch.arange(6.0).view(2, 3)), **extras(700, 1)}
    file = TorchFile(save(tmp_path / "file.pt", content, zip_file=zip_file))
    assert torch.equal(file.read("w"), content["module"]["w"])
    assert file.content["iteration"] == 700
    assert file.content["random_rng_state"] == random.Random(0).getstate()
    assert file.content.keys() == content.keys() - {"module"}


def test_the_old_names_of_numpy_and_of_cuda_storages_are_known() -> None:
    state = np.random.RandomState(0).get_state()
    data = pickle.dumps(state, 2)
    assert b"cnumpy._core.multiarray\n" in data
    old = data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    assert read(old)[0] == "MT19937"
    dtype = read(b"ctorch.cuda\nHalfStorage\n.")
    assert dtype is torch.float16


def test_arguments_become_something_that_does_nothing() -> None:
    value = read(pickle.dumps({"args": argparse.Namespace(lr=0.1), "n": 1}, 2))
    assert value["n"] == 1
    assert not hasattr(value["args"], "lr")


# Damage


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02",
        b"}",
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b".",  # BYTEARRAY8 of an exabyte
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b".",  # BINBYTES8
        b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b".",  # FRAME
        b"\x80\x02\x8b" + struct.pack("<i", (1 << 31) - 1) + b".",  # LONG4
        b"\x80\x02(" * 3,
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x02)Q.",  # BINPERSID of no storage
    ],
)
def test_a_damaged_or_boastful_pickle_is_an_error_and_takes_no_memory(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        read(data)


def test_a_memo_far_out_takes_no_memory() -> None:
    """The unpickler in C allocates 64 GiB for this one."""
    assert read(b"\x80\x02]r\xff\xff\xff\xff.") == []


def test_a_deeply_nested_key_is_refused_before_it_is_hashed() -> None:
    nested = b"\x80\x02})" + b"\x85" * 200_000 + b"Ns."
    with pytest.raises(CheckpointError, match="a key is a tuple"):
        read(nested)


def test_an_instruction_is_not_given_more_than_a_pickle_may_have() -> None:
    stream = io.BytesIO(b"\x80\x02B" + struct.pack("<I", MAX_PICKLE_BYTES + 1) + b"xx.")
    with pytest.raises(CheckpointError, match=f"asks for {MAX_PICKLE_BYTES + 1} bytes"):
        unpickle(stream, "the pickle")


@settings(max_examples=60)
@given(st.data())
def test_any_flipped_byte_gives_data_or_an_error_of_ours(data: st.DataObject) -> None:
    good = pickle.dumps({"module": {"a": [1, 2.5, "x"]}, "rng": np.random.RandomState(0).get_state()[0]}, 2)
    at, value = data.draw(st.integers(0, len(good) - 1)), data.draw(st.integers(0, 255))
    damaged = good[:at] + bytes([value]) + good[at + 1 :]
    with contextlib.suppress(CheckpointError):
        read(damaged)
