"""Eight virtual CPU devices for every test, and a compilation cache that the tests share."""

import os
import tempfile
from pathlib import Path

# Before the first import of JAX. Processes that the tests start inherit all of it.
CACHE = Path(tempfile.gettempdir()) / "gpt-test-cache"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE / "xla")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
os.environ["XDG_CACHE_HOME"] = str(CACHE)
