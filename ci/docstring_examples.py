"""For the site: a docstring's section ``Example:`` is code, as ``Examples:`` is, not text with accidental links."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension


class ReadExamples(Extension):
    """Renames the section before it is parsed."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
