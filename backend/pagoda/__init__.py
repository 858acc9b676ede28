"""Pagoda's engine and everything that hosts it. `import pagoda` itself imports nothing heavy: no torch, no transformers."""

__version__ = "0.1.0"
