"""Benchmarks: order of the measurements, ratios, options, table and JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from mllm import cli
from mllm.bench import BenchReport, interleave, median_ratio, parse_options
from vision_moe import InputError


def test_variants_are_called_in_turn_and_every_second_round_backwards():
    calls = []
    variants = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = interleave(variants, repeats=2, warmup=1)
    assert calls == ["a", "b", "b", "a", "a", "b"]
    assert {label: len(values) for label, values in seconds.items()} == {"a": 2, "b": 2}


def test_ratio_is_the_median_of_the_rounds_not_the_ratio_of_medians():
    assert median_ratio([2.0, 30.0, 5.0], [1.0, 10.0, 5.0]) == 2.0


@dataclass
class Options:
    batch_size: int = 4
    models: tuple[str, ...] = ("ViT-B-16",)


def test_options_are_defaults_with_what_was_set():
    assert parse_options(Options, ["batch_size=8"]) == Options(batch_size=8)
    assert parse_options(Options, ["models=[a, b]"]).models == ("a", "b")


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("batch", "not of the form"),
        ("batchsize=3", "nearest known one is 'batch_size'"),
        ("batch_size=many", "'batch_size' is 'many'"),
        ("batch_size=[", "not YAML"),
    ],
)
def test_faulty_options_are_told(word, sentence):
    with pytest.raises(InputError, match=sentence):
        parse_options(Options, [word])


def report():
    made = BenchReport("example", {"batch_size": 4})
    made.add_repeats({"fast": [1.0, 1.0], "slow": [3.0, 5.0]})
    made.compare("gain", "slow", "fast", ">=", 5)
    made.add_ratio("memory", 0.5, "<=", 0.6)
    made.facts["answers that differ"] = 0
    return made


def test_table_says_which_goals_are_reached():
    lines = {line.split("  ")[1]: line for line in report().table().splitlines()[1:]}
    assert "4.000 x (goal >= 5: MISSED)" in lines["gain"]
    assert "0.500 x (goal <= 0.6: reached)" in lines["memory"]


def test_command_prints_the_table_and_writes_the_json(tmp_path, monkeypatch, capsys):
    module = type("Module", (), {"run": staticmethod(lambda overrides: report())})
    monkeypatch.setattr(cli, "BENCHMARKS", {"example": "example_module"})
    monkeypatch.setattr(cli, "import_module", lambda name: module)
    with pytest.raises(SystemExit) as done:
        cli.main(["bench", "example", "--json", str(tmp_path / "bench.json")])
    assert done.value.code == 0
    assert capsys.readouterr().out.startswith("mllm bench example")
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["ratios"] == {"gain": 4.0, "memory": 0.5}
    assert written["repeats"]["slow"] == [3.0, 5.0]
    assert {"hardware", "versions", "config", "goals"} <= written.keys()


def test_help_names_every_benchmark(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in cli.BENCHMARKS)


def test_unknown_benchmark_is_told(capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["bench", "nothing"])
    assert done.value.code == 2
    assert "there is no benchmark 'nothing'" in capsys.readouterr().err
