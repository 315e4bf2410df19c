"""Weights out of other projects' files, read without running code from them."""

import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

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
