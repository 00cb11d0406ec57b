"""Checkpoints of other libraries, made into models of this one with equal outputs."""
