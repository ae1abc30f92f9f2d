"""What lies on the image disk: blobs by digest, and the layers and writable parts that root filesystems are mounted from."""
