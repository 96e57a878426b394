#!/usr/bin/env python
"""Computes the least times of NVFP4 training on Blackwell and writes them into docs/blackwell.md.

scripts/roofline.py
"""

from pathlib import Path

from nvfp4_titan.bench.roofline import markdown

DOCUMENT = Path(__file__).parents[1] / "docs" / "blackwell.md"
BEGIN, END = "<!-- roofline: computed by scripts/roofline.py -->\n", "<!-- end of roofline -->\n"


def main() -> None:
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}{markdown()}{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
