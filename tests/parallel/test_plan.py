"""`manyheads plan`: what a mechanism exchanges, which scheme fits, and bad input."""

import json

import pytest
from typer.testing import CliRunner

from manyheads.cli import app
from manyheads.parallel.command import number
from manyheads.parallel.plan import Shape, costs, shape_of


def planned(*words: str):
    done = CliRunner().invoke(app, ["plan", *words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout


def test_the_mechanism_says_what_it_exchanges() -> None:
    sizes = {"length": 64, "width": 32, "heads": 4, "dtype": "float32"}
    assert shape_of("softmax", **sizes) == Shape(1, 64, 4, 4, 8, 8, 4)
    assert shape_of("gqa", config={"kv_heads": 2}, **sizes) == Shape(1, 64, 4, 2, 8, 8, 4)
    assert shape_of("mswa", config={"window": 8}, **sizes).windows == (2, 4, 8, 16)
    assert shape_of("lightning", **sizes).memory == (8, 8)
    assert shape_of("based", config={"feature_dim": 3}, **sizes).memory == (13, 9)
    assert shape_of("lightweight-convolution", config={"kernel_size": 5}, **sizes).rows == (4, 32)


def test_pairs_are_counted_one_by_one() -> None:
    for windows in (None, (5,) * 2):
        shape = Shape(1, 23, 2, 2, 1, 1, 4, windows=windows)
        pairs = sum(1 for i in range(23) for j in range(i + 1) if windows is None or i - j < 5)
        total = sum(cost.flops * 3 / cost.busiest for cost in costs(shape, 3) if cost.scheme == "ring")
        assert total == pytest.approx(2 * pairs * 14)


def test_the_least_that_is_sent_among_those_that_fit() -> None:
    words = ("--length", "1M", "--width", "1024", "--heads", "16", "--json")
    found = json.loads(planned(*words))
    assert (found["best"], [row["scheme"] for row in found["schemes"]]) == ("heads", ["ring", "heads"])
    assert json.loads(planned(*words, "--processes", "32"))["best"] == "ring"
    short = json.loads(planned(*words, "--memory", "1GB"))
    assert short["best"] is None
    assert short["enough_processes"] > 8
    again = json.loads(planned(*words, "--memory", "1GB", "--processes", str(short["enough_processes"])))
    assert again["best"] is not None
    assert "None fits" in planned("--memory", "1GB")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--length", "many"], "--length 'many'"),
        (["--memory", "0"], "--memory '0'"),
        (["--mechanism", "titans"], "titans cannot be spread"),
        (["--length", "4", "--processes", "8"], "4 tokens for 8 processes"),
        (["--dtype", "int8"], "dtype='int8'"),
        (["--processes", "0"], "--processes 0"),
        (["--config", "[]"], "not a JSON object"),
    ],
)
def test_bad_input(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(*words)


def test_numbers_with_units() -> None:
    found = [number("--memory", text) for text in ("16384", "128k", "1M", "80GB", "2GiB", "1.5 KB", "50GB/s")]
    assert found == [16384, 128_000, 10**6, 80 * 10**9, 2**31, 1500, 50 * 10**9]
