"""Memory that a process keeps between steps."""

import ctypes
import platform
from dataclasses import dataclass

from swissarmy.core.config import Config

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's names for what `mallopt` sets (malloc.h)."""
_NEVER = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class MemoryOptions(Config):
    """What a run does with the memory that it has used."""

    keep_memory: bool = True
    """On a CPU with glibc, keep freed memory for the next step: giving it back and faulting it in again costs a tenth
    to a fifth of a step. It holds for the whole process, from the start of the run on."""


def keep_freed_memory() -> bool:
    """Forbid the allocator to give memory back to the system, for this process from now on.

    Returns:
        Whether there is such a thing to forbid: on glibc, and nowhere else.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(_MMAP_THRESHOLD, _NEVER), mallopt(_TRIM_THRESHOLD, _NEVER)])
