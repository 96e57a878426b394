"""What commands share."""

from nvfp4_titan.command import markdown_table


def test_a_cell_stays_one():
    lines = markdown_table(("", "found"), [("a", "x | y"), ("b", 3)])
    assert lines == ["|  | found |", "|---|---|", "| a | x \\| y |", "| b | 3 |"]
