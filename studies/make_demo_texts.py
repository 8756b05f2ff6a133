"""Write the language reference that every Python carries as JSON lines, one topic a line.

    python studies/make_demo_texts.py demo-texts

The study studies/smollm2-demo.yaml reads the file as a dataset with two columns.
"""

import json
import sys
from pathlib import Path
from pydoc_data.topics import topics


def main(folder: Path) -> None:
    """Write ``language-reference.jsonl`` into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"topic": topic, "text": text}, ensure_ascii=False)
        for topic, text in sorted(topics.items())
    ]
    target = folder / "language-reference.jsonl"
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{target}: {len(lines)} topics")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
