"""AOTInductor packages with braze's kernels inside: an exported program, the same passes, one file that needs no braze.

On CPU the C++ experts kernel is compiled into the package; torch is all that it takes to load and run it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

from braze.backend import fuse_graph
from braze.lowering import inductor
from braze.options import Options


def package(program: torch.export.ExportedProgram, file: str | Path, options: Mapping[str, Any] | None = None) -> str:
    """Compiles an exported program into the package `file` (.pt2), for torch._inductor.aoti_load_package; returns its path.

    options: as for the backend. ValueError for an unknown option, RequirementError where a required kind was not fused.
    """
    parsed = Options.parse(options)

    def transform(graph: fx.Graph) -> None:
        _drop_metadata_checks(graph)
        fuse_graph(graph, parsed, guards=False)

    return inductor.package_program(program, str(file), transform, "package" + parsed.key(), parsed.inductor)


def _drop_metadata_checks(graph: fx.Graph) -> None:
    """Removes export's checks of dtypes, which compiled code cannot fail; as users of intermediates they stop a fusion."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        graph.erase_node(node)
