"""Small modules and data for trying something out and for reports of faults: see `xtrain.demos.boring_classes`."""

from xtrain.compat.imports import complete

complete(__name__)
