"""``xtrain check``: a laptop tells what the expensive machine will do.

`rehearse` runs the checks, each group of them in a child process; a check is a `Check`; `Report` is what they come to.
"""

from xtrain.rehearsal.check import PROCESSES, Check, Needs, Request
from xtrain.rehearsal.findings import SCHEMA, Blocked, Figure, Finding, Report, Skipped
from xtrain.rehearsal.rehearse import RehearsalError, Settings, rehearse

__all__ = [
    "PROCESSES",
    "SCHEMA",
    "Blocked",
    "Check",
    "Figure",
    "Finding",
    "Needs",
    "RehearsalError",
    "Report",
    "Request",
    "Settings",
    "Skipped",
    "rehearse",
]
