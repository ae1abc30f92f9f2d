"""Tare: a container runtime. Nothing is imported here, so that the launch process image stays small."""

__version__ = "0.1.0"
