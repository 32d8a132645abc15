"""Every registered mechanism under every pattern that its card declares: all properties, no skip list."""

import pytest

from manyheads import list_attentions, mechanism_class
from manyheads.testing import examine_mechanism

CASES = [(name, pattern) for name in list_attentions() for pattern in sorted(mechanism_class(name).card.patterns)]


@pytest.mark.parametrize(("name", "pattern"), CASES)
def test_conforms(name: str, pattern: str) -> None:
    findings = list(examine_mechanism(mechanism_class(name), patterns=[pattern]))
    assert len(findings) >= 15, f"only {len(findings)} properties were tried"
    failures = [f"{f.property} ({f.claim}): {f.message}" for f in findings if not f.holds]
    assert not failures, "\n".join(failures)
