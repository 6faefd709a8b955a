"""Small modules, each with one planted fault or none: every fault is found at its line, and nothing else.

A module of the gallery is a file with a class `Model`. Its faults are marked at their lines by ``# planted: ID``
(several with commas; ``at no line`` behind it where there is none to name). `BATCH` (a SPEC of ``--batch``) or a
function `loader` gives its data, unless the module has its own; `DEVICES`, `MEMORY`, `TARGETS` and `CHECKS` are
passed on. Without `CHECKS` the checks of the common group run, all others cost seconds. With `LOUD`
none of its findings is for information. Where a package is missing that a check needs, it must say so.

The module is loaded here, as a child would load it, and the children are forks: each costs no import of torch.
"""

import re
import sys
from pathlib import Path

import pytest
import torch._dynamo  # noqa: F401  # once, in place of in each fork

from xtrain.rehearsal import Settings, rehearse
from xtrain.rehearsal.registry import all_checks
from xtrain.rehearsal.subject import Source, load_object, load_subject

GALLERY = sorted((Path(__file__).parent / "gallery").glob("*.py"))
COMMON = tuple(check.name for check in all_checks()[0] if check.group == "plain")
LACKING = {check.name: check.needs.missing() for check in all_checks()[0] if check.needs.missing()}
MARK = re.compile(r"# planted: ([\w, -]+?)( at no line)?$")


def planted(path):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if found := MARK.search(line):
            yield from ((id, None if found[2] else number) for id in found[1].split(", "))


def test_there_are_clean_ones_and_each_id_of_the_cheap_checks_is_planted():
    marks = {path.stem: [id for id, _ in planted(path)] for path in GALLERY}
    assert sum(not ids for ids in marks.values()) >= 4
    cheap = [check for check in all_checks()[0] if check.group in ("plain", "determinism", "tpu")]
    wanted = {id for check in cheap for id in check.ids} - {"XT-DATA-07"}
    assert wanted <= {id for ids in marks.values() for id in ids}


@pytest.mark.parametrize("path", GALLERY, ids=lambda path: path.stem)
def test_what_is_planted_is_found_and_nothing_else(path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    model, expected = load_object(f"{path}:Model"), set(planted(path))
    module = sys.modules[model.__module__]
    data = f"{path}:loader" if hasattr(module, "loader") else ""
    source = Source(f"{path}:Model", data=data, batch=getattr(module, "BATCH", ""))
    settings = Settings(
        targets=getattr(module, "TARGETS", ()),
        devices=getattr(module, "DEVICES", None),
        memory=getattr(module, "MEMORY", None),
        checks=getattr(module, "CHECKS", COMMON),
    )
    report = rehearse(source, settings, load_subject(source))
    if lacking := LACKING.keys() & set(settings.checks):
        assert {skipped.check: skipped.reason for skipped in report.skipped} == {
            name: LACKING[name] for name in lacking
        }
        assert all("pip install" in LACKING[name] for name in lacking)
        return
    found = {(finding.id, finding.line) for finding in report.findings}
    loud = {(f.id, f.line) for f in report.findings if f.severity != "info"}
    assert expected <= found, str(report)
    assert loud <= expected, str(report)
    assert loud == expected or not getattr(module, "LOUD", False), str(report)
    assert {f.file for f in report.findings if f.line} <= {str(path)}
    assert report.failed == []
