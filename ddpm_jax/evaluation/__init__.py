"""Evaluation: what samples are worth."""
