"""Generated from tare.proto by scripts/generate_proto.py."""
