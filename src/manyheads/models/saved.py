"""What stands beside config.json in a saved folder: how the model is opened where nobody imports manyheads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

OPENER = "open_manyheads"
CODE = '''"""Opens this model where manyheads is installed: transformers runs it where trust_remote_code=True."""

from manyheads.models import {names}
'''

# transformers' class, by ours that it opens.
AUTO_CLASSES = {
    "ManyheadsConfig": "AutoConfig",
    "ManyheadsBody": "AutoModel",
    "ManyheadsForCausalLM": "AutoModelForCausalLM",
    "ManyheadsForSeq2SeqLM": "AutoModelForSeq2SeqLM",
    "ManyheadsForSequenceClassification": "AutoModelForSequenceClassification",
    "ManyheadsForTokenClassification": "AutoModelForTokenClassification",
    "ManyheadsForImageClassification": "AutoModelForImageClassification",
    "ManyheadsForSemanticSegmentation": "AutoModelForSemanticSegmentation",
    "ManyheadsForObjectDetection": "AutoModelForObjectDetection",
}
WITHOUT_AUTO = ("ManyheadsForNodeClassification",)
AUTO_MAP = {auto: f"{OPENER}.{ours}" for ours, auto in AUTO_CLASSES.items()}

CARD = """---
library_name: transformers
tags:
- manyheads
---
A model of [manyheads](https://pypi.org/project/manyheads/). It opens with transformers once manyheads is imported:

```python
import manyheads
from {where} import {auto}

model = {auto}.from_pretrained("this folder")
```

Programs that import no manyheads open it where it is installed and they are told `trust_remote_code=True`, such as
`lm_eval --model hf --model_args pretrained=FOLDER,trust_remote_code=True`: the code that they run is `{opener}.py`,
which imports manyheads.
"""


def write_beside(folder: Path, architectures: Sequence[str] | None) -> None:
    """The code that transformers runs, and a README.md where there is none."""
    (folder / f"{OPENER}.py").write_text(CODE.format(names=", ".join(AUTO_CLASSES)), encoding="utf-8")
    readme = folder / "README.md"
    if not readme.exists():
        saved = (architectures or [""])[0]
        own = saved in WITHOUT_AUTO
        where, auto = ("manyheads.models", saved) if own else ("transformers", AUTO_CLASSES.get(saved, "AutoModel"))
        readme.write_text(CARD.format(where=where, auto=auto, opener=OPENER), encoding="utf-8")
