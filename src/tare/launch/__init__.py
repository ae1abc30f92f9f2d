"""A process image of its own: keeper, launcher, logger, and the children that become containers.

Nothing here imports the rest of Tare, a third-party package, or a module of the standard library that is heavy: these
processes live as long as the node does, and every container begins as a fork of one of them.
"""
