"""What docs/measured.md says above each of its tables: the command, the sizes, what a figure is and is not."""

from __future__ import annotations

RECALL = (
    "`python benchmarks/quality.py recall`: multi-query associative recall by `manyheads compare --all --task recall`, "
    "n 64, 8 pairs, one layer of width 128 behind a short convolution, one seed, 300 steps. What stays below 95% was "
    "trained once more for five times as long (until it reached 95%): the last column tells what is slow to learn from "
    "what cannot. The card says why."
)
DIGITS = (
    "`python benchmarks/quality.py digits`: handwritten digits in 16 patches of four pixels (in a grid of 64 where a "
    "mechanism takes nothing else), two layers of width 64, one seed, 400 steps; 364 images to answer, so that one "
    "image is 0.3%."
)
CANVASES = (
    "`python benchmarks/canvases.py`: a digit among distractors on 64 x 64 pixels, in 8 x 8 patches on which digits "
    "stand whole, two layers of width 64, 200 steps of 32, 256 images to answer. What a cell sees in one layer tells "
    "mechanisms apart here as 8 x 8 digits do not; a block that brings a convolution of its own learns sooner than one "
    "that must learn it. What large-kernel-attention adds is at first next to nothing, a product of four small layers "
    "(begun as released it is large, and wants the layer scale of 0.01 of its block): it learns as little as what "
    "mixes no cells. The error is the spread over seeds where there are several, else that of 256 answers. Seconds are "
    "of a machine shared with other work."
)
RELATIONS = (
    "`python benchmarks/relations.py`: which community a node is of where few say theirs and four edges in ten are "
    "noise; what the node across a ring holds, four edges away (chance is 25% for both); boxes around digits among "
    "distractors, by their overlap with the true ones. A node that sees all others and no edges cannot tell either of "
    "the first two. The error is the spread over seeds."
)
VISION = (
    "`python benchmarks/vision.py`: maps of 64 x 64 cells of 64 features, two heads, forward. Windows against "
    "`scaled_dot_product_attention` over all cells with the mask that says who sees whom; convolutions against the "
    "same ones in plain torch; how time grows with the cells of a map, from 32 x 32 to 256 x 256; a graph of 100,000 "
    "edges. Where the figure is above the target, it fell short."
)
STUDIES = (
    "`python benchmarks/studies.py`: each study of `manyheads explain study --list` at its own size. A claim counts as "
    "seen where it holds in the mean or in every seed, as the study says, over three seeds at least; where it is not "
    "seen, the small model may be the reason."
)
FIELD = (
    "`python benchmarks/field.py`: small forms of published benchmarks, two layers of width 32, hundreds of steps, "
    "no cell beyond 10 seconds, 30 of recall beyond its length, 60 of CAB's (* where that ended it). Three seeds "
    "where a spread stands, else one. The trivial answer knows how often each answer is right and nothing else. No "
    "figure compares with a paper's: the tasks' page says what each lacks."
)
PARTS = {
    "causal": "Every causal mechanism: counting letters, mazes of 3 x 3 (whole ways) and synthetic nucleotides (bits "
    "per base, lower is better). Functions in context are not here: in so few steps nobody learns them, see below.",
    "beyond": "Trained at one length, scored at two and four times it: recall without positions, functions with rotary "
    "ones where a mechanism takes them.",
    "recall": "Multi-query recall of 12 pairs over the width of the model; in brackets the state of the whole model.",
    "gcog": "gCOG: what the evaluation has that training has not.",
    "cab": "CAB's seven stand-ins and their index: the mean over tasks of deviations from this table's mean, of each "
    "seed by itself. Indices closer than their spreads are ties.",
    "cab-wide": "The same in one layer of width 64.",
}
LENGTH = (
    "`python benchmarks/linear.py`: width 256, 4 heads; forward milliseconds of the mechanism alone, and the slope "
    "of log time over log n from 2k to 32k. Decode: a step at a context of 64k over one at 1k, where the state is of "
    "fixed size."
)
PEERS = (
    "`python benchmarks/peers.py`: the same operator with the same weights in another package, outputs and gradients "
    "equal before anything is timed. Ratios are our time over theirs: below one, manyheads is faster."
)
VLM = (
    "`python benchmarks/vlm.py`: the packaged `vlm` on held-out digits, 64 pictures a kind of question. Without a "
    "picture and under noise it answers by what usually stands together. Is it there: of digits that are and of as "
    "many that are not, drawn at random, the most usual ones, or partners of what is there (POPE)."
)
STEER = (
    "`python benchmarks/steer.py`: is a digit there, asked of noisy held-out pictures; the absent ones are partners of "
    "those there. Hallucinated: yes to what is not there; seen: yes to what is; told apart: how often yes is more "
    "favoured where the digit is there than where another is not, 0.5 by chance. A claim shows where hallucinated "
    "falls and right does not. Steps are those of a small Llama."
)
THINNING = (
    "`python benchmarks/thinning.py`: a Llama-shaped LLaVA of 12 layers of width 256, random, with 1,024 image tokens; "
    "ratios to the same model with all of them, by turns."
)
THINNING_ANSWERS = (
    "`python benchmarks/thinning_answers.py`: answers of the packaged `vlm` about 64 held-out scenes a kind. Image "
    "tokens: the share of (layer, token) pairs that was still there."
)
DRAWING = (
    "`python benchmarks/steer_diffusion.py`: the packaged `dit`, the same noise with and without; a claim shows where "
    "the change is beyond twice its standard error. Costs are no claims."
)
DRAWING_UNET = "`python benchmarks/steer_diffusion.py --model unet`: as above, on the packaged UNet."
PERSONAL = (
    "`python benchmarks/personalise.py`: the packaged `dit` taught a faint digit and a barred one from four pictures, "
    "each form of `manyheads steer personalise` with the weights of its released code (AttenCraft's masks by a lower "
    "threshold) beside plain fine-tuning of the same parameters on the same batches; means of three seeds. A claim "
    "shows where the change is beyond twice its standard error; of other captions, where it is not a twentieth worse "
    "even then."
)
PERSONAL_UNET = "`python benchmarks/personalise.py --model unet`: as above, on the packaged UNet."
SPEECH = (
    "`python benchmarks/speech.py`: an encoder-decoder on utterances of 12 tokens whose frames show their tokens, the "
    "same training for each depth; right: next tokens under the true text, mean of the seeds; speeds are ratios within "
    "one run. Below it one pass of training over utterances of very different lengths, by a fixed batch size and by "
    "buckets whose batch sizes were found by measuring in the memory that the fixed size takes at the longest lengths."
)
CONVERT = (
    "`python benchmarks/convert.py`: what [conversions](converting.md) cost, mean of the seeds, each with text, hidden "
    "keys, calibration and training of its own; bits and KL are of held-out text. Healed beside the original healed "
    "alike (`none`), of so many tokens and seeds as the row says. Below it what the papers claim, and whether every "
    "seed has that order: by KL to the original, where healed by bits per token."
)
BACKBONES = (
    "`python benchmarks/backbones.py`: mean of the seeds. A window and half the layers by distillation, in both orders "
    "and each alone for as many tokens; weights of shifts, healed alike; a Swin of two stages on scikit-learn's "
    "digits, pruned by DIMAP and by magnitude. Time is a share of the original's, of a prompt of so many tokens or a "
    "batch."
)
CONVERT_SPEEDS = (
    "`python benchmarks/convert_speeds.py`: attention transfer beside full healing of the same converted layers, over "
    "100 steps as `--transfer 100` takes them, where a row that comes back needs no pass of the host; a token behind "
    "8,192 through our cache; a linear layer's step over the length; a linear layer of shifts. Ratios within one run."
)
CONVERT_STREAM = (
    "`python benchmarks/convert_stream.py`: a checkpoint converted file by file, each in a fresh process, beside "
    "loading and saving it, which takes 1; and a whole model in memory."
)
REAL = (
    "`python benchmarks/real.py`: SmolLM2-135M-Instruct (the model `smollm2`), every cache after the same prompt of "
    "library text, all by turns on one thread. Time of a token (the median of 24 pairs, of 96 at 512 tokens, with its "
    "standard error), of the prompt and bytes held are ratios to transformers' DynamicCache; KL and bits per token are "
    "of the 24 tokens that follow; keys are hidden at several depths of other prompts, and asked for after entries "
    "were dropped."
)
COMMANDS = (
    "`python benchmarks/commands.py`: each command on SmolLM2-135M-Instruct in a fresh process and folder, from Enter "
    "to the prompt, with the threads that torch takes by itself. The time left is what it said a third of the way."
)
