"""New nodes of a graph ahead of one that is there, which are taken away again where nothing comes of them."""

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from braze.passes.separate import called


@dataclass
class Draft:
    """new: the nodes made so far, in order, all ahead of `before`."""

    before: fx.Node
    new: list[fx.Node] = field(default_factory=list)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new call."""
        with self.before.graph.inserting_before(self.before):
            node = called(target, *args, **kwargs)
        self.new.append(node)
        return node

    def erase(self) -> None:
        for node in reversed(self.new):
            if not node._erased:
                node.graph.erase_node(node)
