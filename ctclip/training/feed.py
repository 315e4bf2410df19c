"""A step's volumes on their way to the device: one micro-batch there, the next one coming.

The volumes of a global batch stay in the host's memory as they were read, so that the batch is
limited by the recipe and not by the card. GradCache asks for the micro-batches in a circle; while
the towers work on one, the next is copied on a stream of its own.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ctclip.data.dataset import Batch


class StepVolumes:
    """Hands out the volumes of a step's micro-batches, each as often as GradCache asks for it.

    Args:
        pieces: The micro-batches as read, in page-locked memory if ``device`` is a GPU.
        finish: Makes of a micro-batch on the device what the model takes.
        device: Where the towers are.
    """

    def __init__(
        self, pieces: Sequence[Batch], finish: Callable[[Batch], Batch], device: torch.device
    ) -> None:
        self._pieces = pieces
        self._finish = finish
        self._device = device
        self._left = 2 * len(pieces) - 1  # GradCache embeds all but one of them twice
        self._ahead: tuple[int, Tensor] | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def take(self, index: int) -> Tensor:
        """``(m, C, D, H, W)`` in [-1, 1] on the device; starts copying the micro-batch after it."""
        volume = self._arrived(index)
        self._left -= 1
        self._ahead = None
        if self._left > 0:
            following = (index + 1) % len(self._pieces)
            self._ahead = following, self._copy(following)
        return self._finish(self._pieces[index].with_volume(volume)).volume

    def _arrived(self, index: int) -> Tensor:
        if self._ahead is None or self._ahead[0] != index:
            self._ahead = index, self._copy(index)
        volume = self._ahead[1]
        if self._stream is not None:
            here = torch.cuda.current_stream(self._device)
            here.wait_stream(self._stream)
            volume.record_stream(here)  # its memory isn't free before this stream is done with it
        return volume

    def _copy(self, index: int) -> Tensor:
        if self._stream is None:
            return self._pieces[index].volume
        with torch.cuda.stream(self._stream):
            return self._pieces[index].volume.to(self._device, non_blocking=True)
