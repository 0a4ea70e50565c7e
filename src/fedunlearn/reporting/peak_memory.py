"""The most memory a run took: measured from where it began, not from where the process did."""

import resource
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True, kw_only=True)
class Peak:
    """In MiB. resident: of this process. device: of its CUDA tensors; None where CUDA was never used."""

    resident: float
    device: float | None


def reset_peak() -> None:
    """Sets the high-water marks back to what is held now.

    Linux does it for the process, torch for the device. Elsewhere, and where /proc may not be written, the process's mark stays: it can only grow.
    """
    with suppress(OSError):
        CLEAR.write_text("5", encoding="ascii")  # see proc(5): 5 sets VmHWM back, and ru_maxrss with it
    if _cuda_is_used():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> Peak:
    """Gives the most that was held since reset_peak; where the system cannot set its mark back, since the process began.

    Other processes are not in it: neither workers of launcher=ray nor that of launcher.isolate=true.
    """
    device = torch.cuda.max_memory_allocated() / 2**20 if _cuda_is_used() else None
    return Peak(resident=_resident_mib(), device=device)


def _cuda_is_used() -> bool:
    """Whether this process has begun to use CUDA: before that nothing is allocated, and asking for figures would begin it."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _resident_mib() -> float:
    with suppress(OSError):
        for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)
