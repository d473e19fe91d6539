"""docs/support.md has a row for each family, and the table's words follow from outcomes."""

from dataclasses import replace
from pathlib import Path

from tests.families import FAMILIES
from tests.support import Outcome
from tests.support_table import page

DOCS = Path(__file__).parents[1] / "docs" / "support.md"
WHOLE = Outcome("grouped_mm", "float32", "dynamic", graphs=1, layers=2, moe=2, error=1e-7, eager=1e-7)


def rows(text: str) -> dict[str, list[str]]:
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {cells[0]: cells for cells in lines[2:]}


def test_the_page_has_a_row_for_each_family() -> None:
    assert rows(DOCS.read_text()).keys() == FAMILIES.keys()
    assert len(FAMILIES) == 73


def test_cells_say_what_was_fused_and_what_was_not() -> None:
    part = replace(WHOLE, moe=1, reasons=("moe: rows are not weighted by the router",))
    wrong = replace(WHOLE, error=0.5)
    found = rows(page({"mixtral": [WHOLE], "olmoe": [part], "dots1": [wrong], "zaya": None}))
    assert found["mixtral"][1] == "2/2"
    assert found["olmoe"][1] == "1/2"
    assert "not weighted" in found["olmoe"][-1]
    assert found["dots1"][1] == "2/2, inexact"
    assert "not measured" in found["zaya"][-1]
    assert (WHOLE.whole, part.whole, wrong.whole) == (True, False, False)
