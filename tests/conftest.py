"""Eight CPU devices, a compilation cache of their own, no silent broadcasting between ranks, hypothesis without chance."""

import atexit
import os
import shutil
import tempfile

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="ddpm_jax_cache_")

import hypothesis
import jax

atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("project", derandomize=True, deadline=None, max_examples=30)
hypothesis.settings.load_profile("project")
