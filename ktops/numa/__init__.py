"""NUMA: the nodes of this machine, processes bound to them, and pages of memory on them."""

from ktops.numa.binding import Binding, bind_if_asked, bind_rank
from ktops.numa.topology import Node, nodes

__all__ = ["Binding", "Node", "bind_if_asked", "bind_rank", "nodes"]
