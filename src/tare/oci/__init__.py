"""`tare oci`: an OCI runtime command line on Tare's own engine, for podman, containerd and everyone who calls runc. Nothing is imported here."""
