"""ctclip: contrastive foundation models for chest CT.

``ctclip.load("model.safetensors")`` gives a model that scores and embeds a scan; everything else
is reached through the subpackages. Nothing heavy is imported until it is used.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctclip.evaluation.scanner import load

try:
    __version__ = version("ctclip")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from ctclip.evaluation.scanner import load

        return load
    raise AttributeError(f"module 'ctclip' has no attribute {name!r}")
