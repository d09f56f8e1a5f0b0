"""The load test in short."""

from __future__ import annotations

from demo.bench import run


def test_clients_at_once_get_their_own_answers(mllm_folder):
    report = run([f"checkpoint={mllm_folder}", "repeats=1", "clients=6", "seconds=4"])
    assert report.facts["first fault"] == "none"
    assert report.facts["right answers"] >= 6
    assert report.facts["requests left by their clients"] > 0
    assert report.facts["alive and right at the end"] is True
    assert set(report.ratios) == {
        "first token, in the process / bare generate",
        "first token, through the page / bare generate",
    }
