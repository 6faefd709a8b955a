"""Check that tag, package, citation and changelog name one version: `python ci/release.py v0.1.0`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Where a version stands, and how.
PLACES = {
    "xtrain/__init__.py": r'^__version__ = "([^"]+)"$',
    "CITATION.cff": r"^version: (\S+)$",
    "CHANGELOG.md": r"^## (\d\S*) \(\d{4}-\d\d-\d\d\)$",  # released: it has a date
}


def main(tag: str) -> int:
    """Print what disagrees with `tag`; return the exit status."""
    wrong = {path: found for path, found in versions(ROOT).items() if f"v{found}" != tag}
    for path, found in wrong.items():
        print(f"Expected version {tag.removeprefix('v')} in {path}. Received: {found}.")
    return int(bool(wrong))


def versions(root: Path) -> dict[str, str]:
    """Return the (first) version that each place names, "none" where there is none."""
    found = {path: re.search(pattern, (root / path).read_text(), re.MULTILINE) for path, pattern in PLACES.items()}
    return {path: match[1] if match else "none" for path, match in found.items()}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("Expected the tag. Fix:  python ci/release.py v0.1.0")
    sys.exit(main(sys.argv[1]))
