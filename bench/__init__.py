"""Side-by-side measurements of Tare and the runtimes that apt installs, through one CRI client in one run."""
