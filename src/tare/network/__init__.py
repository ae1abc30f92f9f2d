"""How a pod is attached to a network: the embedded bridge, its addresses, its nftables table, and the files that name things."""
