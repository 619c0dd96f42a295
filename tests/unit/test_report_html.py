"""The report: one page that needs nothing else, of complete, running, empty and unmeasured fronts."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from autocompress.front import load_front
from autocompress.plan import CompressionPlan, LayerPlan, Quality, Recipe, SplitGap, Student
from autocompress.report import diagnostics, figures
from autocompress.report.describe import describe_plan, highlights, recovery_text, split_gap_text, tied_text, verdict
from autocompress.report.html import write_report
from autocompress.report.space import SpaceSummary, read_space
from autocompress.report.tables import read_rejected, read_trials, readable_points
from tests.fixtures.runs import build_run, make_front


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return write_report(run).read_text(encoding="utf-8")


class _Links(HTMLParser):
    """Collects what a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.scripts += tag == "script"
        if tag in ("script", "img", "iframe", "source") and values.get("src"):
            self.fetched.append(str(values["src"]))
        if tag == "link" and values.get("href"):
            self.fetched.append(str(values["href"]))


def chart_data(page: str) -> dict[str, dict[str, object]]:
    return json.loads(re.search(r'id="figures">(.*?)</script>', page, re.DOTALL)[1])


def test_the_page_fetches_nothing(page: str) -> None:
    parser = _Links()
    parser.feed(page)
    assert parser.fetched == []
    assert parser.scripts == 3


def test_every_chart_the_buttons_ask_for_exists(page: str) -> None:
    charts = chart_data(page)
    assert {f"front-{axis}-{split}" for axis in ("latency", "size", "macs") for split in ("test", "validation")} <= set(
        charts
    )
    assert {"decisions-keep", "decisions-bits", "decisions-compute", "prediction", "stages", "history"} <= set(charts)
    assert set(re.findall(r'data-figure="([^"]+)"', page)) <= set(charts)


def test_the_page_says_what_was_found(page: str, run: Path) -> None:
    sentence, _ = verdict(load_front(run))
    assert sentence in page
    assert "within 1 point of the original" in sentence
    for expected in ("AMD EPYC 9R14", "autocompress search config.yaml", "dominated as measured by p03", "p11"):
        assert expected in page


def test_names_cannot_inject(tmp_path: Path) -> None:
    front = make_front(3).model_copy(update={"task": "<script>alert(1)</script>", "model": '"><img src=x>'})
    page = write_report(build_run(tmp_path / "run", front)).read_text(encoding="utf-8")
    assert "<script>alert(1)" not in page
    assert "<img src=x>" not in page


@pytest.mark.parametrize(
    "front",
    [
        make_front(0, status="running"),
        make_front(1, status="running"),
        make_front(4, measured=False),
        make_front(30),
    ],
    ids=["empty", "one", "unmeasured", "many"],
)
def test_any_front_renders_without_the_other_files(tmp_path: Path, front) -> None:
    page = write_report(build_run(tmp_path / "run", front, extras=False)).read_text(encoding="utf-8")
    assert ("still running" in page) == (front.status == "running")
    assert ("the target was not present" in page) == (not front.verified)


@pytest.mark.parametrize(
    ("objectives", "first"),
    [
        (("error",), "latency"),
        (("macs",), "macs"),
        (("latency_ms", "size_bytes"), "latency"),
        (("energy_mj", "peak_memory_bytes", "size_bytes", "macs"), "energy"),
        (("error", "peak_memory_bytes", "latency_ms", "size_bytes"), "memory"),
    ],
)
def test_a_front_of_any_objectives_renders_against_them(
    tmp_path: Path, objectives: tuple[str, ...], first: str
) -> None:
    front = make_front(1 if len(objectives) == 1 else 5)
    points = tuple(point.model_copy(update={"energy_mj": 0.1}) for point in front.points)
    front = front.model_copy(update={"objectives": objectives, "constraints": {"drop": 1.0}, "points": points})
    page = write_report(build_run(tmp_path / "run", front)).read_text(encoding="utf-8")
    charts = chart_data(page)
    wanted = {"macs": "macs", "energy_mj": "energy", "peak_memory_bytes": "memory"}
    axes = {"latency", "size", *(wanted[name] for name in objectives if name in wanted)}
    assert {f"front-{axis}-{split}" for axis in axes for split in ("test", "validation")} <= set(charts)
    assert set(re.findall(r'data-figure="([^"]+)"', page)) <= set(charts)
    assert f'data-figure="front-{first}-test"' in page
    assert (first == "energy") == ("energy, mJ (log scale)" in page)


def test_the_history_is_over_quality_and_the_costs_that_were_searched(tmp_path: Path) -> None:
    for name, objectives in (("one", ("latency_ms",)), ("error", ("error",)), ("two", ("size_bytes", "latency_ms"))):
        front = make_front(3).model_copy(update={"objectives": objectives, "constraints": {"drop": 1.0}})
        page = write_report(build_run(tmp_path / name, front)).read_text(encoding="utf-8")
        assert "history" in chart_data(page)


def test_a_single_point_is_named_by_what_was_asked_for(tmp_path: Path) -> None:
    front = make_front(1).model_copy(
        update={"objectives": ("latency_ms",), "constraints": {"drop": 1.0, "size_bytes": 2e6}}
    )
    (item,) = highlights(load_front(build_run(tmp_path / "run", front)))
    assert item.title == "Fastest, within drop 1.00 points, size 2 MB"


def test_the_gap_between_validation_and_test_stands_beside_chance(tmp_path: Path) -> None:
    gap = SplitGap(mean=0.004, mean_by_chance=(-0.005, 0.005), largest=0.01, largest_by_chance=(-0.004, 0.006))
    front = make_front(2)
    scores = ((0.93, 0.92), (0.92, 0.922))
    points = tuple(
        point.model_copy(update={"quality": point.quality.model_copy(update={"validation": v, "test": t})})
        for point, (v, t) in zip(front.points, scores, strict=True)
    )
    front = front.model_copy(update={"points": points, "search": front.search.model_copy(update={"split_gap": gap})})
    loaded = load_front(build_run(tmp_path / "run", front))
    text = split_gap_text(loaded)
    assert text == (
        "Validation minus test accuracy over the 2 points: +0.40 points on average (chance alone: -0.50 to +0.50), "
        "+1.00 points at most (chance alone: -0.40 to +0.60)."
    )
    assert text in write_report(loaded.path).read_text(encoding="utf-8")
    older = load_front(build_run(tmp_path / "older", front.model_copy(update={"search": make_front(2).search})))
    assert "chance" not in split_gap_text(older)
    assert "+0.40 points on average, +1.00 points at most" in split_gap_text(older)
    assert split_gap_text(load_front(build_run(tmp_path / "empty", make_front(0)))) == ""


def test_the_page_says_which_models_were_recovered_and_for_how_long(page: str, run: Path, tmp_path: Path) -> None:
    told = recovery_text(load_front(run))
    assert told.startswith("11 of 12 models of the front were recovered, by 45 to 500 steps of training; the others")
    assert told in page
    stitched = make_front(2)
    bare = [p.model_copy(update={"plan": p.plan.model_copy(update={"recipe": Recipe()})}) for p in stitched.points]
    alone = build_run(tmp_path / "alone", stitched.model_copy(update={"points": tuple(bare)}))
    assert "database of compressed layers" in recovery_text(load_front(alone))
    assert "were recovered" not in recovery_text(load_front(alone))
    assert recovery_text(load_front(build_run(tmp_path / "none", make_front(0)))) == ""


def test_ties_are_named(page: str) -> None:
    assert ">tied with p01</span>" in page
    assert tied_text(["a", "b", "c", "d", "e"]) == "a, b and 3 more"
    assert tied_text([]) == ""


def test_files_cut_off_in_mid_write_are_left_out(tmp_path: Path) -> None:
    run = build_run(tmp_path / "run")
    for name in ("space.json", "environment.json", "trials.csv", "rejected.csv"):
        (run / name).write_text('{"a": [' if name.endswith("json") else "")
    assert write_report(run).is_file()


def test_verdict_without_a_point_that_is_close(tmp_path: Path) -> None:
    front = make_front(12)
    front = front.model_copy(update={"points": front.points[-2:]})
    sentence, _ = verdict(load_front(build_run(tmp_path / "run", front)))
    assert sentence == "9.3x faster, 25x smaller at -5.06 points against the original."


def test_the_headline_does_not_promise_on_test_what_held_on_validation(tmp_path: Path) -> None:
    front = make_front(7)
    last = front.points[-1]
    unlucky = last.model_copy(
        update={"quality": last.quality.model_copy(update={"validation": 0.9300, "test": 0.9100})}
    )
    front = front.model_copy(update={"points": (unlucky,)})
    sentence, basis = verdict(load_front(build_run(tmp_path / "run", front)))
    assert "at -1.75 points against the original" in sentence
    assert "within 1 point on validation" in basis


def test_each_highlighted_point_is_named_once(run: Path) -> None:
    named = [item.point.id for item in highlights(load_front(run))]
    assert len(named) == len(set(named))
    assert "p11" in named


def test_a_plan_in_words() -> None:
    space = SpaceSummary(("a", "b"), {"a": 16, "b": 48})
    assert describe_plan(CompressionPlan(), space) == "all channels, fp32"
    plan = CompressionPlan(
        base=Student(width=0.5),
        groups={"a": 8, "b": 24},
        layers={
            "a": LayerPlan.model_validate({"compute": "int8", "storage": {"bits": 4}}),
            "b": LayerPlan.model_validate({"compute": "int8", "storage": {"bits": 8}}),
        },
    )
    assert describe_plan(plan, space) == "50% of channels, all int8, 4-bit weights in 1"
    shallow = plan.model_copy(update={"base": Student(width=1.0, depth=0.5, dropped=("layer1.0",)), "groups": {}})
    assert describe_plan(shallow, space).startswith("without 1 residual block, all channels")


def test_a_student_keeps_its_share_of_the_groups_it_does_not_mention() -> None:
    space = SpaceSummary((), {"a": 16})
    assert space.keep_ratio(CompressionPlan(base=Student(width=0.25)), "a") == 0.25
    assert space.keep_ratio(CompressionPlan(), "a") == 1.0


@pytest.mark.parametrize(
    "stored",
    [
        {"layers": ["a", "b"], "groups": {"g": 8}},
        {"layers": [{"name": "a"}, {"name": "b"}], "groups": [{"id": "g", "size": 8}]},
        {"graph": {"layers": [{"name": "a"}, {"name": "b"}], "groups": {"g": {"size": 8}}}},
    ],
)
def test_shapes_of_space_json(tmp_path: Path, stored: dict[str, object]) -> None:
    (tmp_path / "space.json").write_text(json.dumps(stored))
    assert read_space(tmp_path / "space.json", []) == SpaceSummary(("a", "b"), {"g": 8})


def test_without_space_json_the_largest_count_is_the_size(tmp_path: Path) -> None:
    plans = [CompressionPlan(groups={"g": 4}), CompressionPlan(groups={"g": 16}, layers={"a": LayerPlan()})]
    assert read_space(tmp_path / "absent.json", plans) == SpaceSummary(("a",), {"g": 16})


def test_optunas_columns_are_read(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "number": [0, 1, 2],
            "state": ["COMPLETE", "PRUNED", "COMPLETE"],
            "values_error": [0.1, 0.2, float("inf")],
            "values_latency_ms": [1.0, 2.0, 3.0],
        }
    )
    frame.to_csv(tmp_path / "trials.csv", index=False)
    trials = read_trials(tmp_path, ("error", "latency_ms"))
    assert trials.to_dict("list") == {"error": [0.1], "latency_ms": [1.0]}
    assert read_trials(tmp_path, ("error", "size_bytes")).empty
    assert read_rejected(tmp_path).empty


def test_the_table_has_the_original_first(run: Path) -> None:
    front = load_front(run)
    table = readable_points(front, SpaceSummary((), {}))
    assert list(table["kind"][:3]) == ["reference", "baseline", "point"]
    assert table.loc["reference", "how"] == "the original"
    assert table.loc["int8", "faster"] == "2.1x"


def test_prediction_error_is_relative_to_the_measurement(run: Path) -> None:
    mean, worst = diagnostics.prediction_error(load_front(run))
    assert 0 < mean < worst < 0.06


def test_the_line_joins_the_best_on_the_two_axes(run: Path) -> None:
    front = load_front(run)
    line = figures.front_figure(front, SpaceSummary((), {}), split="validation").data[0]
    assert list(line.x) == sorted(line.x)
    assert list(line.y) == sorted(line.y, reverse=True)


def test_before_the_test_split_is_scored_people_see_validation(tmp_path: Path) -> None:
    front = make_front()
    bare = [p.model_copy(update={"quality": Quality(validation=p.quality.validation)}) for p in front.points]
    reference = front.reference.model_copy(update={"quality": Quality(validation=front.reference.quality.validation)})
    running = front.model_copy(
        update={"status": "running", "points": tuple(bare), "reference": reference, "baselines": ()}
    )
    loaded = load_front(build_run(tmp_path / "run", running))
    sentence, basis = verdict(loaded)
    assert "nan" not in sentence + basis
    assert "validation" in basis
    assert split_gap_text(loaded) == ""
    assert loaded.points[0].split == "validation"
    assert loaded.points[0].shown == loaded.points[0].validation
    assert loaded.points[0].test_drop is None
    rows = readable_points(loaded, read_space(tmp_path / "none.json", []))
    assert rows["test"].str.endswith(" on validation").all()
    assert not rows.astype(str).apply(lambda column: column.str.contains("nan")).any().any()
