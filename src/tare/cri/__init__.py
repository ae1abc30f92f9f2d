"""The CRI face: what a kubelet speaks, turned into calls on the runtime and the image store. Decides nothing about containers itself."""
