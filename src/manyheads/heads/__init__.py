"""Head profiles: what every attention head of a causal language model does, measured and written down."""

from manyheads.heads.formats import DuoPattern, read_duo, read_retrieval, write_duo, write_retrieval
from manyheads.heads.gates import GateSettings, learn_gates
from manyheads.heads.influence import Span, influence
from manyheads.heads.profile import Profile
from manyheads.heads.retrieval import retrieval
from manyheads.heads.scores import on_repeats, on_text
from manyheads.hosts.fingerprint import Fingerprint, fingerprint
from manyheads.hosts.probes import Inputs

__all__ = [
    "DuoPattern",
    "Fingerprint",
    "GateSettings",
    "Inputs",
    "Profile",
    "Span",
    "fingerprint",
    "influence",
    "learn_gates",
    "on_repeats",
    "on_text",
    "read_duo",
    "read_retrieval",
    "retrieval",
    "write_duo",
    "write_retrieval",
]
