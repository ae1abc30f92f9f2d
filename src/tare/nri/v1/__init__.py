"""NRI on the wire: `nri.proto`, `ttrpc.proto` and what scripts/generate_proto.py makes of them. Only `tare.nri` imports this."""
