"""Whether a step may be taken: decided on the device, for all processes alike."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from msn.method.distributed import all_reduce_sum, num_processes, process_index


class FiniteCheck:
    """Says no where a number of any process is not finite, and for good after several in a row.

    The host never waits for the answer: it is a tensor that the fused optimiser, the target and
    the buffers read on the device. So weights stay those of the last good step until the host has
    seen what happened.

    Args:
        max_skipped: steps in a row after which no further step is taken, >= 1.

    Attributes:
        skip: 1 where the step is not to be taken, else 0, float32 scalar.
        in_row: bad steps in a row up to now, float32 scalar.
        bad: 1 for each process whose numbers were not finite, float32 [processes].
    """

    def __init__(self, max_skipped: int) -> None:
        self.max_skipped = max_skipped
        self.skip = self.in_row = torch.zeros(())
        self.bad = torch.zeros(1)

    @torch.no_grad()
    def judge(self, numbers: Sequence[Tensor]) -> Tensor:
        """Look at this process's scalars (loss, gradient norms) and give `skip`; a collective."""
        device = numbers[0].device
        finite = torch.stack([number.detach().float() for number in numbers]).isfinite().all()
        bad = torch.zeros(num_processes(), device=device)
        bad[process_index()] = 1 - finite.float()
        self.bad = all_reduce_sum(bad)
        in_row = self.in_row.to(device)
        stopped = (in_row >= self.max_skipped).float()
        any_bad = self.bad.amax()
        self.in_row = torch.where(stopped > 0, in_row, (in_row + 1) * any_bad)
        self.skip = torch.maximum(any_bad, stopped)
        return self.skip


class BufferGuard:
    """Puts running statistics back where a step was skipped, which may have spoilt them.

    Args:
        module: whose buffers to keep; all of them are small.
    """

    def __init__(self, module: nn.Module) -> None:
        self._buffers = list(module.buffers())
        self._before = [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def restore_if(self, skip: Tensor) -> None:
        """Undo what happened since this was made, where `skip` is 1."""
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(torch.where(skip > 0, before, buffer))
