"""Allocations and systems compared at equal trainable parameters (extra ``train``)."""
