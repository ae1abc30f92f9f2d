"""Control groups: which layout this machine has, what a container's limits are as file writes, and the groups themselves."""
