"""CRI v1 on the wire: `api.proto` and what scripts/generate_proto.py makes of it. Only `tare.cri` and clients import this."""
