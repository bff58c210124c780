"""The mathematics of diffusion: pure functions on JAX arrays, no networks, files or devices."""
