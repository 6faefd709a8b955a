"""The fsdp backend that reduces in every backward, held to the conformance suite on one process."""

from typing import ClassVar

import test_fsdp


class TestFsdpBackward(test_fsdp.TestFsdp):
    options: ClassVar = {"reduce": "backward"}
    second_order = False  # refused, in words: each backward frees what it went through
