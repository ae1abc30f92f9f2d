"""The command line: a client of the CRI socket like any other, which knows nothing of the daemon's insides."""
