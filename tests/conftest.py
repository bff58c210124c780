"""Eight CPU devices, one compilation cache for all workers, no silent broadcasting between ranks, hypothesis without chance."""

import atexit
import os
import shutil
import tempfile

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers have the variables of the process that starts them
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="ddpm_jax_cache_")
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**32)  # any limit makes JAX lock the cache, which many write at once
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

import hypothesis
import jax

jax.config.update("jax_compilation_cache_dir", os.environ["XDG_CACHE_HOME"] + "/ddpm_jax/compiled")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("project", derandomize=True, deadline=None, max_examples=30)
hypothesis.settings.load_profile("project")
