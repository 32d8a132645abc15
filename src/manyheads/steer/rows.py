"""The catalogue's rows that change what a trained model attends to, and where each is: `python -m manyheads.steer`
prints the table of docs/steering.md."""

from __future__ import annotations

from dataclasses import dataclass

from manyheads.steer.method import method


@dataclass(frozen=True)
class Row:
    """names: of `manyheads steer`. elsewhere: modules, a mechanism or a study by their names. left: why it is not here,
    or what of it is not. trained: forms of `manyheads steer personalise`."""

    number: int
    paper: str
    title: str
    names: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()
    left: str = ""
    trained: tuple[str, ...] = ()


ROWS = (
    Row(9, "2503.03321", "visual attention redistribution", ("redistribute",)),
    Row(17, "2403.18551", "DisenDiff", (), (), "", ("disendiff",)),
    Row(29, "2411.15453", "VMTC and CMAI", ("clustered",), (), "the equations are ours: the paper's abstract has none"),
    Row(30, "2411.19261", "isolation and reposition", ("isolate",), ("manyheads.steer.diffusion.isolate",),
        "references of several subjects, and reposition, are called from Python"),
    Row(41, "2503.02597", "modality-mutual mask", ("modality_mutual",)),
    Row(62, "2406.01388", "AutoStudio's parallel cross attention", ("regional_prompts",), (),
        "no subject branch, for which a model needs an image adapter"),
    Row(68, "2411.10803", "MustDrop", ("must_drop",)),
    Row(73, "2408.03632", "Concept Conductor", ("layout_guidance", "merge_concepts")),
    Row(75, "2403.14781", "Champ", (), (),
        "left out: what it adds to a model is trained guidance encoders, and no such weights fit the packaged one"),
    Row(95, "2405.13870", "FreeCustom", ("multi_reference",), (), "several references are given from Python"),
    Row(101, "2503.23306", "focus directions", ("focus",)),
    Row(123, "2412.13949", "vision-aware heads", ("vision_heads",)),
    Row(137, "2506.10978", "SoftPAG and HeadHunter", ("perturbed_guidance", "perturb"), (),
        "the hunt for heads is called from Python"),
    Row(162, "2412.18108", "visual heads over scales", (), ("manyheads.explain.detectors.scales",),
        "a score, nothing is changed: `manyheads explain` shows it"),
    Row(164, "2312.00878", "GEM", ("gem",), (), "maps are called from Python: word_maps(model, inputs)"),
    Row(173, "2407.21534", "ControlMLLM", ("control",)),
    Row(182, "2408.13987", "FocusICL", ("focus_icl",)),
    Row(202, "2405.17965", "AttenCraft", (), (), "", ("attencraft",)),
    Row(220, "2506.14224", "GridToM", ("push",)),
    Row(222, "2310.12274", "MCPL", (), (), "", ("mcpl",)),
    Row(265, "2412.03632", "MV-Adapter", ("multi_view",), (), "untrained: the branches are the base's own"),
    Row(285, "2401.12264", "CoAVT", (), (),
        "left out: the abstract names a query encoder and three losses, its equations and masks could not be read; no "
        "official code, and what it reads are trained audio and video encoders"),
    Row(298, "2411.19628", "DyVTE", ("visual_exit",)),
    Row(301, "2501.12206", "imbalanced attention", ("imbalance",)),
    Row(304, "2311.02126", "PILL", ("modality_gate",), ("manyheads.mechanisms.cross.modality_gate",),
        "gates are fitted from Python (fit_gates); the mechanism and its adapters are for new models"),
    Row(305, "2412.03248", "AIM", ("merge_and_prune",)),
    Row(307, "2406.12718", "AGLA", ("agla",)),
    Row(347, "2106.12620", "IA-RED2", ("interpreted",), (), "from Python: the command has no model of images alone"),
    Row(350, "2409.11402", "NVLM's tile tags", (), ("manyheads.steer.tile_tags",),
        "called from Python, with prompts of tiles"),
    Row(366, "2304.03869", "space-time attention", ("space_time",), (), "coefficients are given, not searched by CLIP"),
    Row(367, "2410.04780", "causal attention maps", ("causal_maps",)),
    Row(369, "2306.01732", "ColorDiffuser", ("colour_propagation",), (), "from the abstract; no colour encoder"),
    Row(375, "2410.05963", "VL-SAM", (), (),
        "left out: the rule that keeps its attention flow from collapse could not be read"),
    Row(376, "2410.18977", "MotionCLR", ("edit_words", "borrow_maps")),
    Row(392, "2405.14701", "DreamText", (), (), "its recogniser of text and its label encoder, trained models both",
        ("dreamtext",)),
    Row(397, "2211.12572", "plug-and-play features", ("plug_and_play",), ("manyheads.steer.diffusion.plug_and_play",),
        "features of a residual branch are named from Python"),
    Row(418, "2406.15765", "heads chosen offline", ("calibrate",), ("manyheads.steer.calibrate",)),
)  # fmt: skip


def table() -> str:
    """A Markdown table, a line per row."""
    lines = ["| row | paper | by name | models | not here, or elsewhere |", "|---|---|---|---|---|"]
    for row in ROWS:
        found = [method(name) for name in row.names]
        kinds = ", ".join(
            dict.fromkeys([*(kind for own in found for kind in own.kinds), *["diffusion"] * len(row.trained)])
        )
        where = ", ".join(f"`{name.removeprefix('manyheads.')}`" for name in row.elsewhere)
        rest = "; ".join(part for part in (where, row.left) if part)
        names = ", ".join(
            [*(f"`{name}`" for name in row.names), *(f"`personalise --with {own}`" for own in row.trained)]
        )
        lines.append(f"| {row.number} | {row.title}, {row.paper} | {names} | {kinds} | {rest} |")
    return "\n".join(lines)
