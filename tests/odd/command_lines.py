"""Odd command lines: every command, every option, with values that no one should give."""

from __future__ import annotations

import random
from collections.abc import Iterator

NUMBERS = [
    "0",
    "-1",
    "1",
    "3",
    "1.5",
    "nan",
    "inf",
    "-inf",
    "1e999",
    "9" * 30,
    "9" * 5000,
    "0x10",
    "1_000",
    "",
    " ",
    "x",
    "٣",
    "-0",
    "+1",
    "1e-320",
]
WORDS = [
    "",
    " ",
    "x",
    "softmax",
    "softmax ",
    "SOFTMAX",
    "sofmax",
    "-",
    "--",
    "*",
    "a" * 5000,
    "a,b",
    ",",
    ",,",
    "\n",
    "x\x1b[31m",
    "\ud800",
    "é",
    "../x",
    "None",
    "{}",
    "[]",
    "0",
]
NAMES = [
    "softmax",
    "moba[block=64,top_k=2]",
    "moba[block=nan]",
    "moba[block=.nan]",
    "moba[block=0]",
    "moba[",
    "moba]",
    "[]",
    "moba[]",
    "moba[block]",
    "moba[=1]",
    "moba[block=[1]]",
    "moba[block=64]]",
    "moba[[block=64]]",
    "moba[block={a: 1}]",
    "moba[block=&a [*a]]",
    "moba[block=*a]",
    "moba[block=" + "[" * 5000 + "]",
    'moba[block="]',
    "moba[block=!!python/name:os.system]",
    "moba[name=softmax]",
    "moba[heads=0]",
    "moba[heads=3]",
    "moba[dim=7]",
    "moba[dim=1e9]",
    "moba[causal=true]",
    "moba[nope=1]",
    "moba[block=" + "9" * 6000 + "]",
    "moba[block=2020-01-01]",
    "linformer[length=1000000000000]",
    "linformer[length=-1]",
    "sparse-sinkhorn[block=0]",
    "nope[x=1]",
    "nope",
    "gqa[kv_heads=0]",
    "gqa[kv_heads=1.5]",
    "titans[chunk=0]",
    "softmax[rotary=1]",
    "softmax[rotary={base: x}]",
    "softmax[rotary={x: 1}]",
    "softmax[rotary={base: .nan}]",
    "moba[block=0x" + "f" * 6000 + "]",
    "moba[args=1]",
    "moba[args={block: 1}]",
]
POLICIES = [
    "streaming",
    "snapkv[window_size=0]",
    "snapkv[window_size=nan]",
    "snapkv[window_size=-1]",
    "snapkv[x=1]",
    "s",
    "",
    "nope",
    "duo",
    "razor",
    "tidal",
    "longheads",
    "moa",
    "moa[rule=1]",
    "moa[rule=[1,x]]",
    "h2o[name=1]",
    "lococo",
    "lococo[x=1]",
    "streaming[sink_size=1e99]",
    "streaming[sink_size=.inf]",
    "full[compression_ratio=2]",
    "full[compression_ratio=0.5,budget_tokens=1]",
    "snapkv[allocation=adakv]",
    "snapkv[allocation=adakv(x=1)]",
    "snapkv[allocation=policy]",
    "snapkv[storage=quantised(bits=0)]",
    "snapkv[storage=quantised(bits=x)]",
    "snapkv[storage=quantised(",
    "duo[gates=1]",
    "duo[gates=[[x]]]",
    "duo[gates=.nan]",
    "razor[echo=1]",
    "tova[budget_tokens=-1]",
    "tova[budget_bytes=x]",
    "quantised[bits=3]",
    "expected[a=&a [*a]]",
    "streaming[sink_size=null]",
    "streaming[sink_size={}]",
    "snapkv[kernel_size=2]",
    "snapkv[kernel_size=0]",
    "tidal[x]",
]
CONFIGS = ["{", "[]", "7", "null", "{}", '{"dim": 0}', '{"dim": -1}', '{"dim": 1.5}', '{"dim": "x"}', '{"heads": 0}', '{"heads": 3}', '{"dim": NaN}', '{"heads": Infinity}', '{"nope": 1}', '{"dim": ' + "9" * 6000 + "}", '{"dim": 1000000000000}', '{"dim": 2000000}',
           "[" * 100_000, '{"a":' * 20_000, '{"rotary": 1}', '{"rotary": {"base": "x"}}', '{"causal": true}', '{"causal": 1}', '{"bias": "x"}', '{"": 1}', '{"self": 1}', '{"cls": 1}', '{"config": {}}', '{"kv_heads": 0}', "\ud800", '"x"', "", '{"dim": {"a": 1}}', '{"heads": [1]}', '{"dim": null}']  # fmt: skip


class Lines:
    """Draws command lines. made: the odd files of `corners.corner`; out: a folder that may be written to."""

    def __init__(self, made: dict[str, list[str]], out: str, seed: int) -> None:
        self.made, self.out, self.rng = made, out, random.Random(seed)
        self.calm = False

    def draw(self, count: int) -> Iterator[list[str]]:
        kinds = [
            self.list,
            self.show,
            self.check,
            self.compare,
            self.heads,
            self.shrink,
            self.explain,
            self.study,
            self.serve,
            self.find,
            self.board,
            self.plan,
            self.steer,
            self.other,
        ]
        weights = [1, 1, 4, 6, 4, 6, 6, 2, 3, 1, 1, 3, 5, 1]
        for _ in range(count):
            self.calm = self.rng.random() < 0.6  # one odd thing in a line that is well otherwise gets furthest
            yield self.rng.choices(kinds, weights)[0]()

    def one(self, *pools: list[str]) -> str:
        return self.rng.choice(self.rng.choice(pools))

    def path(self) -> str:
        return self.rng.choice(self.made["paths"])

    def model(self) -> str:
        if self.calm and self.rng.random() < 0.7:
            return self.made["models"][0]
        return self.rng.choice(self.made["models"]) if self.rng.random() < 0.7 else self.one(self.made["paths"], WORDS)

    def some(self, options: dict[str, object], most: int = 3) -> list[str]:
        """Some of the options, each with a value of its own maker; None: a flag."""
        chosen: list[str] = []
        for name in self.rng.sample(sorted(options), self.rng.randint(0, min(2 if self.calm else most, len(options)))):
            maker = options[name]
            chosen += [name] if maker is None else [name, maker()]  # type: ignore[operator]
        return chosen

    def number(self) -> str:
        return self.rng.choice(NUMBERS)

    def word(self) -> str:
        return self.rng.choice(WORDS)

    def target(self) -> str:
        """Where something is written: nowhere but in the folder, should it be."""
        odd = [
            path for path in self.made["paths"] if set(path) - set("/.~ ") and not path.startswith(("/dev", "/proc"))
        ]
        return (
            self.rng.choice(odd)
            if self.rng.random() < 0.3 and not self.calm
            else f"{self.out}/{self.rng.randrange(10**9)}"
        )

    def list(self) -> list[str]:
        return [
            "list",
            *self.some({"--family": self.word, "--pattern": self.word, "--json": None, "--nope": self.word}),
        ]

    def show(self) -> list[str]:
        return ["show", self.one(WORDS, NAMES), *self.some({"--json": None})]

    def check(self) -> list[str]:
        module = [
            "json:x",
            "no_such:X",
            ":",
            "a:",
            ":b",
            "os:path",
            "manyheads.cli:app",
            "x.y.z:Q",
            "antigravity_no:X",
            "manyheads:Mechanism",
            "..:X",
            "a b:c",
            "json:" + "x" * 999,
            "manyheads.mechanism:Mechanism",
            "typing:Any",
            "ctypes.wintypes:X",
            "\ud800:x",
            "é:x",
            "lib2to3:x",
            "manyheads.card:Card",
        ]
        name = self.one(WORDS, NAMES, module, ["softmax", "moba", "gqa"])
        some = {"--pattern": self.word, "--config": lambda: self.rng.choice(CONFIGS), "--json": None}
        wanted = self.rng.choice(["undeclared", "dtype", "nope", "", "shapes"])
        return ["check", name, "--property", wanted, *self.some(some)]

    def scheduler(self) -> str:
        return self.rng.choice(["", "x", "tcp://", "tcp://127.0.0.1:1", "127.0.0.1:1", "http://x", "tcp://127.0.0.1:99999", "inproc://x", "\ud800"])  # fmt: skip

    def compare(self) -> list[str]:
        some = {
            "--experiment": lambda: self.one(self.made["yaml"], self.made["yaml"], self.made["yaml"], self.made["paths"]), "--preset": lambda: self.one(WORDS, ["quick", "full"]),
            "--task": lambda: self.one(WORDS, ["recall", "digits", "recall[n=0]", "recall[n=nan]", "recall[n=1e30]", "text[x=1]", "recall[vocab_size=.inf]", "recall[n=&a [*a]]", "recall[model={layers: 0}]", "recall[model=1]", "recall[training={steps: -1}]"]),
            "--seeds": self.number, "--section": lambda: self.one(WORDS, ["speed", "quality"]), "--all": None,
            "--scheduler": self.scheduler, "--processes": lambda: self.rng.choice(["0", "-1", "x", "65", "1e9"]), "--retry-failed": None, "--json": None,
        }  # fmt: skip
        return [
            "compare",
            *[self.one(NAMES, ["softmax"] if self.calm else WORDS) for _ in range(self.rng.choice([0, 0, 1, 1, 2]))],
            "--out",
            self.target(),
            *self.some(some, 4),
        ]

    def heads(self) -> list[str]:
        some = {
            "--measure": lambda: self.one(WORDS, ["sink", "gates", "sink,nope", "echo,,"]),
            "--text": self.path,
            "--length": self.number,
            "--steps": self.number,
            "--seed": self.number,
            "--thorough": None,
            "--json": None,
        }
        return ["heads", self.model(), "--out", self.target(), *self.some(some)]

    def shrink(self) -> list[str]:
        some = {
            "--policy": lambda: self.one(POLICIES, WORDS), "--budget-tokens": self.number, "--budget-bytes": self.number, "--compression-ratio": self.number,
            "--heads": lambda: self.one(self.made["paths"], self.made["profiles"]), "--text": self.path, "--tasks": self.word, "--length": self.number, "--trials": self.number,
            "--scheduler": self.scheduler, "--thorough": None, "--ask": self.word, "--chat": lambda: self.one(WORDS, ["open", "protected"]), "--sweep": None, "--device": lambda: self.one(WORDS, ["cpu", "cuda", "cuda:x", "cpu:7", "meta", "cpu:", "mps"]), "--dtype": lambda: self.one(WORDS, ["float32", "bfloat16", "float64"]), "--retry-failed": None, "--json": None,
        }  # fmt: skip
        good = self.made["models"][0]
        return [
            "shrink",
            good if self.rng.random() < 0.4 else self.model(),
            "--out",
            self.target(),
            *self.some(some, 4),
        ]

    def explain(self) -> list[str]:
        source = self.rng.choice(
            [
                ["--text", self.one(WORDS, ["Some words.", "\x00", "word " * 300])],
                ["--file", self.path()],
                ["--image", self.path()],
                [],
            ]
        )
        if self.calm and self.rng.random() < 0.6:
            source = ["--text", "Some words."]
        some = {
            "--target": self.word,
            "--method": lambda: self.one(WORDS, ["rollout", "grad-cam", "relevance"]),
            "--layers": lambda: self.one(NUMBERS, ["0-99999999", "5-2", "0-", "-", "0,0", "1-1-1", "0-1", "²", "0,"]),
            "--no-heads": None,
            "--thorough": None,
            "--page-mb": self.number,
            "--json": None,
        }
        good = self.made["models"][0]
        return [
            "explain",
            good if self.rng.random() < 0.3 else self.model(),
            *source,
            "--no-heads",
            "--out",
            self.target(),
            *self.some(some),
        ]

    def study(self) -> list[str]:
        return [
            "explain",
            "study",
            self.one(WORDS, ["rank-heads", "memorisation", "../x"]),
            "--out",
            self.target(),
            *self.some(
                {
                    "--seeds": self.number,
                    "--scheduler": self.scheduler,
                    "--json": None,
                    "--list": None,
                    "--model": self.word,
                }
            ),
        ]

    def serve(self) -> list[str]:
        some = {
            "--port": self.number,
            "--host": lambda: self.one(
                WORDS,
                [
                    "::1",
                    "127.0.0.1",
                    "0.0.0.0",
                    "256.1.1.1",
                    "localhost",
                    "127.1",
                    "[::1]",
                    "x.invalid",
                    "127.0.0.1:80",
                ],
            ),
            "--reports": self.path,
            "--allow-remote": None,
        }
        return ["serve", self.model(), "--no-open", *self.some(some)]

    def find(self) -> list[str]:
        some = {"--limit": self.number, "--by": self.word, "--json": None}
        return ["find", self.one(WORDS, ["long documents", "", "\x00", "?" * 9000, "記憶"]), *self.some(some)]

    def board(self) -> list[str]:
        return [
            "board",
            "--out",
            self.one(self.made["paths"]),
            "--family",
            self.one(WORDS),
            *self.some({"--pattern": self.word}),
        ]

    def plan(self) -> list[str]:
        size = lambda: self.one(NUMBERS, ["1M", "80GB", "1e400", "-1k", "9" * 400, "1 TB", "nan", "0x10"])  # noqa: E731
        some = {
            "--length": size, "--width": self.number, "--heads": self.number, "--mechanism": lambda: self.one(NAMES, WORDS),
            "--config": lambda: self.rng.choice(CONFIGS), "--processes": lambda: self.rng.choice(["0", "-1", "x", "65", "1e9"]), "--memory": size, "--bandwidth": size,
            "--layers": self.number, "--batch": self.number, "--dtype": self.word, "--json": None,
        }  # fmt: skip
        return ["plan", *self.some(some, 4)]

    def steer(self) -> list[str]:
        if self.rng.random() < 0.2:
            return ["steer", "list", *self.some({"--kind": self.word, "--json": None})]
        named = ["boost", "boost[factor=2]", "boost[factor=-1]", "boost[span=x]", "scaled[heads=0.9]", "perturb[amount=nan]",
                 "buckets[bases=1]", "offsets", "pick", "boost[factor=1e999]", "boost[heads=0.0,0.x]", "redistribute", "juice"]  # fmt: skip
        some = {
            "--with": lambda: self.one(named, named, POLICIES, WORDS), "--text": lambda: self.one(WORDS, ["Some words."]),
            "--file": self.path, "--image": self.path, "--span": self.word, "--chat": None, "--wanted": self.word,
            "--sweep": lambda: self.one(WORDS, ["factor=1,2", "factor=", "factor=nan", "nope=1", "=1", "factor=1,,2"]),
            "--new": self.number, "--json": None,
        }  # fmt: skip
        good = self.made["models"][0]
        well = ["--with", self.rng.choice(named), "--text", "Some words."] if self.calm else []
        return [
            "steer",
            good if self.rng.random() < 0.4 else self.model(),
            "--out",
            self.target(),
            *well,
            *self.some(some, 3),
        ]

    def other(self) -> list[str]:
        return [self.word() for _ in range(self.rng.randint(0, 3))]
