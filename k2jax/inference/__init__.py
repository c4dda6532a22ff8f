"""Inference: sampling."""
