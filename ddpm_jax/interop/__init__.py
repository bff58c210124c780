"""Weights of other programs in, and out to them; nothing that is read is executed."""
