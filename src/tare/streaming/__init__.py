"""Exec, attach and port-forward over HTTP: SPDY and WebSocket sessions, and what they are joined to."""
