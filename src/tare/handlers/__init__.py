"""Runtime handlers: who turns an OCI runtime specification into a process. `builtin` is Tare's own launcher."""
