"""The fsdp backend that reduces in every backward, held to the conformance suite on two real processes."""

from typing import ClassVar

import test_fsdp_two_processes


class TestFsdpBackwardTwoProcesses(test_fsdp_two_processes.TestFsdpTwoProcesses):
    options: ClassVar = {"reduce": "backward"}
    second_order = False  # refused, in words: each backward frees what it went through
