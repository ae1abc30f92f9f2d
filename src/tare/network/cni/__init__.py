"""Pod networks by CNI plugins: configuration lists, plugin chains, what they answered, and deletions that are tried until they work.

config      what a file says, and what a plugin is told (pure)     template   a file made for the node's pod CIDR
result      what a plugin answers (pure)                           cache      answers kept as libcni keeps them
arguments   what a pod wants, in CNI's words (pure)                driver     the network that pods get
plugins     programs that are run                                  chain      ADD, DEL, CHECK, STATUS and GC of a list
"""
