"""Studies of a trained model's heads: the model is a setting, `--model` on the command line."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from manyheads.explain.studies.study import Study
from manyheads.hosts.fingerprint import fingerprint
from manyheads.hosts.loading import Loaded, load_model


@lru_cache(maxsize=1)
def opened_model(name: str) -> Loaded:
    """One at a time; "" is the packaged byte-level model."""
    return load_model(name or None)


class ModelStudy(Study):
    """A study with a field `model`: a folder, hub name, .gguf file or smollm2; "": the packaged byte-level model."""

    model: str

    @property
    def loaded(self) -> Loaded:
        return opened_model(self.model)

    def identity(self) -> dict[str, Any]:
        return {"weights": fingerprint(self.loaded.model, "").weights}
