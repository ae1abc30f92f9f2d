"""How the daemon is watched: its log, its metrics, its traces. Nothing here decides anything, and what is not asked for is not imported."""
