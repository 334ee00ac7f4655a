"""docs/walkthrough.md: its blocks run one after another in one session, and print the output that the page shows.

`WRITE=1 pytest tests/test_walkthrough.py` writes the real output into the page.
"""

import contextlib
import io
import os
import re

from conftest import ROOT

PAGE = ROOT / "docs" / "walkthrough.md"


def test_the_blocks_print_the_output_of_the_page():
    namespace, text = {}, PAGE.read_text()
    for block, said in re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", text, re.S):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(block, namespace)
        shown = f"```python\n{block}```\n\n```text\n{printed.getvalue()}```\n"
        if os.environ.get("WRITE"):
            text = text.replace(f"```python\n{block}```\n" + (f"\n```text\n{said}```\n" if said else ""), shown)
        else:
            assert printed.getvalue() == said, block
    if os.environ.get("WRITE"):
        PAGE.write_text(text)
