"""Layers for `kernelize`."""
