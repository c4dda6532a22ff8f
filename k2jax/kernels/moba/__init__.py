"""Mixture of Block Attention, one file per target: `reference` says what it is, `xla` is fast enough to train
with.
"""
