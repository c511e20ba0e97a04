"""Stages - memory of a device given back, so that another model or engine finds it free."""

from __future__ import annotations

import gc
import sys


def free_device_memory() -> None:
    """Collect what nobody refers to any more, and return the allocator's unused GPU memory to the driver.

    torch keeps freed memory for itself; an engine that starts in another process sees it as taken. Drop your references
    to the model before the call.
    """
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
