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
    """Hands out the volumes of a step's micro-batches: the first once, all others twice.

    Args:
        pieces: The micro-batches as read, in page-locked memory if ``device`` is a GPU. Each is let
            go of after its last use.
        finish: Makes of a micro-batch on the device what the model takes.
        device: Where the towers are.
        stream: The GPU's stream for copies, one for the whole run: memory is kept for reuse by
            stream.
    """

    def __init__(
        self,
        pieces: Sequence[Batch],
        finish: Callable[[Batch], Batch],
        device: torch.device,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self._pieces = dict(enumerate(pieces))
        self._number = len(pieces)
        self._finish = finish
        self._device = device
        self._stream = stream
        self._ahead: tuple[int, Tensor] | None = None
        self._once_more = set(range(1, len(pieces)))

    def take(self, index: int) -> Tensor:
        """``(m, C, D, H, W)`` in [-1, 1] on the device; starts copying the micro-batch after it.

        Raises:
            KeyError: If it has been taken as often as it is there for.
        """
        volume = self._arrived(index)
        piece = self._pieces[index]
        if index in self._once_more:
            self._once_more.discard(index)
        else:
            del self._pieces[index]
        following = (index + 1) % self._number
        self._ahead = (following, self._copy(following)) if following in self._pieces else None
        return self._finish(piece.with_volume(volume)).volume

    def clear(self) -> None:
        """Let go of what a skipped step leaves."""
        self._pieces.clear()
        self._ahead = None

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
