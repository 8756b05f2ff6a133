"""Ask a store every query of some pages again, and write down what it answers.

    python docs/make_answers.py demo-store README.md docs/cookbook.md

Of each page, the ``text`` block that follows a ``sql`` block is replaced. What pages say of the
answers in words stays as it is: read it again.
"""

import re
import sys
from pathlib import Path

from storage import open_store

_ANSWERED = re.compile(r"(^```sql\n(.*?)^```\n\n^```text\n)(.*?)(^```$)", re.MULTILINE | re.DOTALL)
_WIDTH, _MAX_ROWS = 96, 40


def main(root: str, pages: list[str]) -> None:
    """Answer the queries of each page in place."""
    store = open_store(root)
    for page in map(Path, pages):
        text = page.read_text(encoding="utf-8")

        def answered(match: re.Match[str]) -> str:
            before, query, _, after = match.groups()
            table = store.render(query, max_width=_WIDTH, max_rows=_MAX_ROWS)
            return f"{before}{table}\n{after}"

        page.write_text(_ANSWERED.sub(answered, text), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
