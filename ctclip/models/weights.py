"""Weights out of files, read without running code from them and without holding them twice."""

import math
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

_UNREADABLE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    SafetensorError,
    EOFError,
    OSError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
)
"""What torch's reader of plain tensors raises on bytes that are something else: its own error for
few of them, and whatever its stack machine stumbles over for the rest."""


def read_weights(path: Path) -> Any:
    """The content of a ``.safetensors`` or of a file that ``torch.save`` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or holds more than tensors and plain values.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    with path.open("rb") as file:  # a file that may not be read says so itself
        try:
            if path.suffix == ".safetensors":
                return load_file(path)
            return torch.load(file, map_location="cpu", weights_only=True)
        except _UNREADABLE as error:
            foreign = re.search(r"GLOBAL (\S+)", str(error))
    if foreign:  # torch's own words advise to run it
        raise ValueError(
            f"{path} holds {foreign[1]}, a Python object that could run code when loaded, which "
            "ctclip never does; ask its maker for a file of tensors alone"
        )
    raise ValueError(
        f"{path} is not a readable file of weights: it is damaged or cut short, or holds Python "
        "objects that could run code when loaded, which ctclip never does; fetch it again and "
        "compare its size with the original's"
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, in memory of their own.

    The library's reader maps the file instead: whoever copies another one over it later would
    change, or kill, a model that is in use. The largest come first, each from a map of its own, so
    that never more than one tensor is held twice.

    Raises:
        SafetensorError: If the file is damaged.
        OSError: If it can't be read.
    """
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        sizes = {name: math.prod(file.get_slice(name).get_shape()) for name in names}
    tensors = {}
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        with safe_open(path, framework="pt") as file:
            tensors[name] = file.get_tensor(name).clone()
    return tensors


class EmptyParameters(TorchFunctionMode):
    """Inside, ``torch.empty``, which modules make their parameters of, takes no memory.

    For a model whose weights ``load_state_dict(assign=True)`` brings: spares their random start.
    Buffers stay real; what no file holds (positions, frequencies) is computed when they are made.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call ``func``, on the meta device if it is ``torch.empty``."""
        place = {"device": "meta"} if func is torch.empty else {}
        return func(*args, **{**(kwargs or {}), **place})
