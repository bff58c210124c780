"""Training: the state, the optimiser, the pure step, and the loop around it."""
