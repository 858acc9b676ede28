"""Pagoda's engine and everything that hosts it. Importing it loads nothing heavy: no torch, no transformers."""

__version__ = "0.1.0"
