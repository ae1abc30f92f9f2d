"""What CRIU is told and what it writes: its messages, as far as Tare uses them. Generated from criu.proto by scripts/generate_proto.py."""
