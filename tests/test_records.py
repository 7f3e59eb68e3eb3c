"""What the benchmark found: its CSV, its tables, its page."""

import csv
import dataclasses
import html.parser
import json
import re
import sys

import pytest
from benchmarked import CELL

from experiments import benchmark
from experiments.bench import limits, page
from experiments.bench.contestants import Layer
from experiments.bench.race import Memory, Times
from experiments.bench.records import Record, Unfinished, cost_seconds, tables, to_csv
from lvsoftmax.cost import Work


def test_kept_records_come_back_as_they_were(tmp_path):
    times = {"train": Times((0.1, 1 / 3))}
    timed = Record(
        CELL, "a", "layer", "", 3, Work(4, 5), times, {"train": Memory(1, 2, 3, 4)}, {"train": {"b": 0.5}}, "CPU"
    )
    found = [timed, Record(CELL, "b", "peer", "lacks a part")]
    kept = Unfinished(tmp_path / "kept", {"rounds": 2})
    assert kept.load(CELL) == []
    kept.save(CELL, found)
    assert kept.load(CELL) == found and to_csv(kept.load(CELL)) == to_csv(found)
    assert kept.load(dataclasses.replace(CELL, vocab=201)) == []
    assert Unfinished(tmp_path / "kept", {"rounds": 3}).load(CELL) == []
    kept.forget([CELL])
    assert kept.load(CELL) == [] and not (tmp_path / "kept").exists()


def test_a_csv_has_a_column_for_everything_and_a_line_for_everybody():
    record = Record(CELL, "a", "layer", work=Work(10, 20), times={"train": Times((2.0, 1.0))},
                    memory={"train": Memory(100, 7, 60, 50)}, ratios={"train": {"three products": 1.5}})  # fmt: skip
    lines = list(csv.DictReader(to_csv([record, Record.refused(Layer("b"), CELL, "red")]).splitlines()))
    assert lines[0]["train_seconds"] == "1.5" and lines[0]["train_over_products"] == "1.5"
    assert lines[0]["extra_bytes"] == "47" and lines[0]["flops"] == "10" and lines[0]["step_seconds"] == ""
    assert lines[1]["status"] == "not timed" and lines[1]["reason"] == "red" and lines[1]["train_seconds"] == ""
    assert set(lines[0]) == set(Record(CELL, "", "").line())


def test_a_step_is_held_against_the_dearer_of_its_operations_and_its_bytes():
    products = 6 * CELL.tokens * CELL.hidden * CELL.vocab / 1e9  # seconds: 1 GFLOP/s
    pace = {"three products": products, "copy of 256 MiB": limits.Copy.bytes / 2e9}  # 2 GB/s
    assert cost_seconds(Record(CELL, "", "", work=Work(int(3e9), int(1e9))), pace) == pytest.approx(3.0)
    assert cost_seconds(Record(CELL, "", "", work=Work(int(3e9), int(8e9))), pace) == pytest.approx(4.0)
    assert cost_seconds(Record(CELL, "", ""), pace) is None
    assert cost_seconds(Record(CELL, "", "", work=Work(1, 1)), {"three products": 1.0}) is None


def test_a_table_has_the_fastest_first_and_no_empty_columns():
    def record(label, seconds, kind="layer", mode="train"):
        return Record(CELL, label, kind, times={mode: Times((seconds,))}, clock="CPU time",
                      ratios={"train": {"PyTorch, eager": seconds / 4}})  # fmt: skip

    slow, fast, other = record("slow", 2.0), record("fast", 1.0), record("other", 3.0, mode="step")
    red = Record.refused(Layer("red_softmax"), CELL, "log_prob is not normalised")
    (table,) = tables([record("three products", 0.5, "limit"), slow, other, fast, red])
    assert [row.label for row in table.rows] == ["fast", "slow", "other"]
    assert [column.heading for column in table.columns] == ["Loss and gradients, ms", "Whole step, ms", "× eager"]
    assert str(table).splitlines()[2:6] == [
        "|       | Loss and gradients, ms |      Whole step, ms | × eager |",
        "| ----- | ---------------------: | ------------------: | ------: |",
        "| fast  |    1,000 (1,000–1,000) |                     |   0.250 |",
        "| slow  |    2,000 (2,000–2,000) |                     |   0.500 |",
    ]
    assert str(table).endswith("- not timed: red_softmax: log_prob is not normalised\n")


class Requests(html.parser.HTMLParser):
    """Notes what a page would fetch."""

    def __init__(self):
        super().__init__()
        self.wanted = []

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "href", "srcset", "poster", "data") and not (value or "").startswith(("data:", "#")):
                self.wanted.append((tag, name, value))


def grid_records():
    """Two sizes of vocabulary, a layer, the eager softmax, and a layer that was refused."""
    for vocab in (100, 1000):
        cell = dataclasses.replace(CELL, vocab=vocab)
        for label, kind, seconds in (("PyTorch, eager", "peer", vocab / 1e3), ("<b>tree</b>", "layer", vocab / 1e5)):
            memory, over_eager = Memory(5 * vocab, 0, vocab, 0), seconds / vocab * 1e3
            yield Record(
                cell, label, kind, work=Work(10, 20), times={"train": Times((seconds, seconds))}, clock="CPU time",
                memory={"train": memory}, ratios={"train": {"PyTorch, eager": over_eager}},
            )  # fmt: skip
        yield Record.refused(Layer("red_softmax"), cell, "log_prob is not normalised")


ENVIRONMENT = {"processor": "a processor", "device": "cpu", "versions": {"torch": "2"}, "config": {"rounds": 3}}


def test_the_page_shows_time_and_memory_against_v_and_asks_nobody_for_anything():
    text = page.html("Benchmark", ENVIRONMENT, list(grid_records()))
    reader = Requests()
    reader.feed(text)
    assert reader.wanted == [] and "default-src 'none'" in text
    figures = [json.loads(found) for found in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text)]
    captions = [text.split(", ")[-1] for text in re.findall("<figcaption>(.*?)</figcaption>", text)]
    assert [figure["layout"]["yaxis"]["title"]["text"] for figure in figures] == captions == ["milliseconds", "MiB"]
    for figure in figures:
        assert figure["layout"]["xaxis"]["type"] == figure["layout"]["yaxis"]["type"] == "log"
        assert [trace["meta"] for trace in figure["data"]] == ["PyTorch, eager", "<b>tree</b>"]
        assert figure["data"][0]["x"] == [100, 1000]
    assert figures[0]["data"][1]["y"] == pytest.approx([1.0, 10.0])
    body = re.sub(r"<script.*?</script>", "", text, flags=re.S)
    assert "&lt;b&gt;tree" in body and "<b>tree" not in body
    assert "red_softmax" in body and "log_prob is not normalised" in body
    assert "10.00 ms for 8 tokens, 100.0 times as fast as the eager softmax." in body
    assert text == page.html("Benchmark", ENVIRONMENT, list(grid_records()))


def test_who_was_timed_at_some_sizes_is_not_timed_at_the_others():
    large, larger = (dataclasses.replace(CELL, vocab=vocab) for vocab in (10_000, 1_000_000))
    records = [*grid_records(), Record(large, "<b>tree</b>", "layer", "takes 9.0 GiB")]
    records += [Record(cell, "PyTorch, eager", "peer", "takes more") for cell in (large, larger)]
    records.append(Record(larger, "<b>tree</b>", "layer", "takes 90.0 GiB"))
    assert page.not_timed(records) == [
        ("red_softmax", "log_prob is not normalised"),
        ("<b>tree</b>", "at V 10,000: takes 9.0 GiB"),
        ("PyTorch, eager", "at V 10,000 and 1,000,000: takes more"),
        ("<b>tree</b>", "at V 1,000,000: takes 90.0 GiB"),
    ]
    body = page.html("Benchmark", ENVIRONMENT, records).partition("Not timed")[2]
    assert "at V 10,000: takes 9.0 GiB" in body and "at V 1,000,000: takes 90.0 GiB" in body


def test_without_what_draws_there_are_tables_and_a_word_about_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "experiments.bench.page", None)
    monkeypatch.delattr("experiments.bench.page")
    benchmark.draw(tmp_path, "benchmark.html", "Benchmark", ENVIRONMENT, [])
    assert capsys.readouterr().out.startswith("no page, only the tables: ") and not list(tmp_path.iterdir())
