"""Tare's own face, beside CRI's on the same socket: what the command line asks for that CRI has no call for."""
