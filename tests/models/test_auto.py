"""What was saved opens with transformers' Auto classes, in the programs of others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import causal_lm, randomised, seq2seq, tiny, tokens
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from manyheads.hosts.loading import BUNDLED, load_model
from manyheads.models import (
    ManyheadsConfig,
    ManyheadsForCausalLM,
    ManyheadsForImageClassification,
    ManyheadsForSequenceClassification,
    ManyheadsSeq2SeqModel,
)
from manyheads.models.byte_tokenizer import byte_tokenizer

OPEN = "found = {auto}.from_pretrained(r'{folder}'{more}); assert type(found).__name__ == '{name}', type(found)"


# Each program in a child of its own, so that torch, scikit-learn and other packages that transformers imports, with
# which none of them is concerned, are imported once for all.
CHILDREN = """
import os, sys, jinja2, sklearn.metrics, torch, torch.distributed.tensor
assert not {"transformers", "manyheads", "huggingface_hub"} & sys.modules.keys()
for number, code in enumerate(sys.argv[1:]):
    child = os.fork()
    if child == 0:
        exec(code, {"__name__": "__main__"})
        os._exit(0)  # not reached where it raises: then Python tells what, and the exit code is 1
    if os.waitpid(child, 0)[1]:
        sys.exit(f"program {number} failed")
"""


def run(*codes: str) -> subprocess.CompletedProcess[str]:
    """The programs one after another, in processes that have imported nothing of transformers or ours."""
    command = [sys.executable, "-c", CHILDREN, *codes]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    ManyheadsForCausalLM(tiny("softmax")).save_pretrained(folder)
    return folder


LIGHT = (
    "import sys, manyheads; assert 'transformers' not in sys.modules; "
    "from transformers import AutoConfig, AutoTokenizer; "
    "assert 'transformers.modeling_utils' not in sys.modules and 'manyheads.models.heads' not in sys.modules; "
    "assert not any(type(f).__module__.startswith('manyheads') for f in sys.meta_path); "
    "import inspect; from transformers.models.auto import configuration_auto; "
    "assert 'AutoConfig' in inspect.getsource(configuration_auto); "
)


UNTOLD = """
import os
os.environ["HF_HOME"] = r"{home}"
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(r"{folder}")
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise AssertionError("it was opened, untold")
"""


BEFORE = [
    # Neither manyheads nor the Auto classes beside it import what models are made of.
    LIGHT + "from transformers import AutoModelForCausalLM; ",
    "from transformers import AutoModelForCausalLM; import manyheads; ",
    # The Auto classes, imported in the middle of what our models are made of.
    "import manyheads, transformers.modeling_layers; from transformers import AutoModelForCausalLM; ",
]


def test_opens_whoever_imports_manyheads_and_when(saved: Path, tmp_path: Path) -> None:
    """Before or after transformers; and never, as programs do that only know transformers: told to trust the folder,
    they open it; else the error says so."""
    words = {"auto": "AutoModelForCausalLM", "folder": saved, "name": "ManyheadsForCausalLM"}
    again, untold = tmp_path / "again", UNTOLD.format(home=tmp_path, folder=saved)
    alone = untold + OPEN.format(**words, more=", trust_remote_code=True") + f"; found.save_pretrained(r'{again}')"
    found = run(*(before + OPEN.format(**words, more="") for before in BEFORE), alone)
    assert found.returncode == 0, found.stderr
    assert sorted(p.name for p in again.iterdir()) == sorted(p.name for p in saved.iterdir())
    assert (again / "config.json").read_text() == (saved / "config.json").read_text()


def test_a_saved_folder_says_how_it_is_opened(tmp_path: Path) -> None:
    model = ManyheadsForSequenceClassification(tiny("softmax"))
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "import manyheads\nfrom transformers import AutoModelForSequenceClassification" in text
    assert "trust_remote_code=True" in text
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_auto_model_opens_the_body_that_was_saved(tmp_path: Path) -> None:
    ids = tokens(2, 6)
    both = seq2seq("softmax")
    both.save_pretrained(tmp_path / "both")
    found = AutoModel.from_pretrained(tmp_path / "both", dtype=torch.float64)
    assert type(found) is ManyheadsSeq2SeqModel
    inputs = {"input_ids": ids, "decoder_input_ids": ids}
    assert_close(found(**inputs)[0], both.model(**inputs)[0])
    assert type(AutoModel.from_config(AutoConfig.from_pretrained(tmp_path / "both"))) is ManyheadsSeq2SeqModel

    for model in (randomised(ManyheadsForSequenceClassification(tiny("softmax"))), causal_lm("softmax")):
        folder = tmp_path / type(model).__name__
        model.save_pretrained(folder)
        found = AutoModel.from_pretrained(folder, dtype=torch.float64)
        assert_close(found(ids)[0], model.model(ids)[0])

    ManyheadsForImageClassification(tiny("softmax", image_size=8, patch_size=2)).save_pretrained(tmp_path / "images")
    with pytest.raises(ValueError, match="AutoModelForImageClassification"):
        AutoModel.from_pretrained(tmp_path / "images")


def test_a_configuration_alone_is_saved_and_opened(tmp_path: Path) -> None:
    tiny("softmax").save_pretrained(tmp_path)
    assert (tmp_path / "open_manyheads.py").exists()
    assert isinstance(AutoConfig.from_pretrained(tmp_path), ManyheadsConfig)


def test_the_packaged_byte_model_has_a_tokenizer(tmp_path: Path) -> None:
    found = AutoTokenizer.from_pretrained(BUNDLED)
    text = "def f(x):\n\treturn  'Hé llo' # 你好 <|x|> \x00 \r\n  "
    assert found(text)["input_ids"] == list(text.encode())
    assert found.decode(list(text.encode())) == text
    assert (len(found), found.model_max_length) == (256, 4096)
    byte_tokenizer(4096).save_pretrained(tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_text() == (BUNDLED / file.name).read_text()
    # Ours reads bytes as before, and shows those that are no character.
    assert load_model().tokens([195]) == ["\\xc3"]


@torch.no_grad()
def test_another_head_on_a_causal_language_models_weights_is_causal(tmp_path: Path) -> None:
    """As with transformers' models, and again once that head is saved; unless it is told to see both sides."""
    model, ids = ManyheadsForCausalLM(tiny("softmax")).eval(), tokens(2, 7)
    model.save_pretrained(tmp_path / "lm")
    wanted = model(ids, output_hidden_states=True).hidden_states[-1]
    for auto in (AutoModelForSequenceClassification, AutoModelForTokenClassification):
        auto.from_pretrained(tmp_path / "lm", num_labels=2).save_pretrained(tmp_path / "head")
        for folder in ("lm", "head"):
            found = auto.from_pretrained(tmp_path / folder, num_labels=2).eval()
            assert_close(found(ids, output_hidden_states=True).hidden_states[-1], wanted)
        both = auto.from_pretrained(tmp_path / "lm", num_labels=2, is_causal=False)
        assert not both.model.stack.layers[0].self_attn.mechanism.causal
