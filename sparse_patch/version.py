"""The version, where the build and the report find it."""

__version__ = "0.1.0"
