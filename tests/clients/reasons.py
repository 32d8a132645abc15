"""Tests that fail here, by model or kind of layers and by name, each with why it does not apply.

What fails without a reason fails the gate.
"""

REASONS: dict[tuple[str, str], str] = {
    ("image-classifier", "model_get_set_embeddings"): (
        "patches are embedded by a Linear, and the test wants an Embedding: transformers' own ViT replaces this test"
    ),
    ("hyena", "attention_outputs"): "a long convolution has no attention weights: None stands where they would",
    ("hyena", "retain_grad_hidden_states_attentions"): "a long convolution has no attention weights",
    ("mega", "retain_grad_hidden_states_attentions"): (
        "the matrix of what stands in chunks is put together beside the pass: no gradient comes through it"
    ),
    ("moh", "attention_outputs"): "the auxiliary loss of the encoder is one output more than the test counts",
    ("moh", "captum_attributions_add_up"): (
        "heads are turned off by rank: outputs jump on the way from the baseline, and integrated gradients miss jumps"
    ),
}
