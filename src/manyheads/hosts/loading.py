"""Models by folder, hub name, or none: the byte-level model that comes with the package.

Nothing is downloaded unless a hub name asks for it, no code from a checkpoint is run, and weights are safetensors only.
"""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUNDLED = Path(__file__).parent.parent / "bundled" / "byte_llama"


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode with its way from text to tokens and back. tokenizer: None if it reads bytes or images."""

    model: Any
    tokenizer: Any | None
    name: str

    @property
    def config(self) -> Any:
        """The config of the part that has the attention layers."""
        return self.model.config.get_text_config(decoder=True)

    def encode(self, text: str) -> list[int]:
        """Token ids, without the tokenizer's special tokens."""
        if self.tokenizer is None:
            return list(text.encode())
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: list[int]) -> str:
        if self.tokenizer is None:
            return bytes(i for i in ids if i < 256).decode(errors="replace")
        return str(self.tokenizer.decode(ids))

    def tokens(self, ids: list[int]) -> list[str]:
        """One readable string per token; a byte that is no character of its own is shown as \\xNN."""
        if self.tokenizer is not None:
            return [str(self.tokenizer.decode([i])) for i in ids]
        return [chr(i) if i in (9, 10, 13) or 32 <= i < 127 else f"\\x{i:02x}" for i in ids]


def load_model(name: str | Path | None = None, *, auto: str = "AutoModelForCausalLM", **options: Any) -> Loaded:
    """name: a folder with config.json, a hub name such as 'org/model', or None for the packaged byte-level Llama.

    auto: the transformers class that loads it. options go to its from_pretrained (float32 unless dtype is given).
    ValueError where the folder or the checkpoint cannot be used; OSError where a hub name cannot be reached.
    """
    import transformers

    where = _place(name)
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()  # a second's bar for files that are already here
    options = {"dtype": "float32", "use_safetensors": True, **options, "trust_remote_code": False}
    try:
        model = _class(auto).from_pretrained(where, **options)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{where} cannot be loaded by {auto}: {error}") from error
    except OSError:
        raise
    except Exception as error:  # safetensors' own error is no subclass of anything we may catch
        raise ValueError(f"{where} is damaged or not a checkpoint that {auto} reads: {error}") from error
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
    return Loaded(model.eval(), _tokenizer(where, model), "byte_llama" if name is None else str(name))


def reads_text(model: Any) -> bool:
    """Whether token ids go in. A vocabulary does not tell: BEiT has one of picture codes."""
    return "input_ids" in inspect.signature(model.forward).parameters


def _class(name: str) -> Any:
    """A model class of transformers, or one of ours."""
    import transformers

    import manyheads.models as ours

    found = getattr(ours, name, None) or getattr(transformers, name, None)
    if found is None:
        raise ValueError(f"{name} is no model class that transformers {transformers.__version__} or manyheads knows")
    return found


def _place(name: str | Path | None) -> str:
    if name is None:
        return str(BUNDLED)
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} has no config.json: give the folder that save_pretrained wrote")
        return str(path)
    if path.exists():
        raise ValueError(f"{path} is a file: give the folder that holds config.json and the safetensors")
    text = str(name)
    if text.startswith((".", "/", "~")) or text.count("/") > 1 or os.sep * 2 in text:
        raise ValueError(f"{text} does not exist; give a folder, a hub name such as org/model, or nothing")
    return text


def _tokenizer(where: str, model: Any) -> Any | None:
    from transformers import AutoTokenizer

    words = getattr(model.config.get_text_config(decoder=True), "vocab_size", None)
    if words is None or not reads_text(model) or (words == 256 and not _has_tokenizer(where)):
        return None
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{where} has no tokenizer that can be read: {error}") from error


def _has_tokenizer(where: str) -> bool:
    folder = Path(where)
    return not folder.is_dir() or any(folder.glob("*token*")) or any(folder.glob("vocab*"))
