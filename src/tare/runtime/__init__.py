"""Pods and containers: what they are, which states they go through, and the operations that move them."""
