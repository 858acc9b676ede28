"""Loads and measurements behind `pagoda bench`."""
