"""What docs/parallel.md says of mechanisms is what their cards say."""

import re
from pathlib import Path

from manyheads.card import PARALLEL, Pattern
from manyheads.registry import list_attentions, mechanism_class

PAGE = (Path(__file__).parent.parent.parent / "docs" / "parallel.md").read_text(encoding="utf-8")
CARDS = [mechanism_class(name).card for name in list_attentions()]


def test_every_scheme_names_its_mechanisms() -> None:
    for scheme in PARALLEL:
        row = re.search(rf"^\| `{scheme}` \|[^|]*\|([^|]*)\|$", PAGE, re.MULTILINE)
        named = set() if row is None else {part.split()[0] for part in row[1].split(",")}
        assert named == {card.name for card in CARDS if card.parallel == scheme}


def test_refused_though_their_state_does_not_grow() -> None:
    told = re.search(r"of fixed\s+size these are refused all the same: (.*?)\. Those whose", PAGE, re.DOTALL)
    assert told is not None
    named = {part.split(",")[0].strip() for part in told[1].split(";")}
    fixed = [card for card in CARDS if Pattern.CAUSAL_SELF in card.patterns and card.decodes and card.state == "1"]
    assert named == {card.name for card in fixed if card.parallel is None}
