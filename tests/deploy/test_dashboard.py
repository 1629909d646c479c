"""The dashboard and the scrape example ask for what a server has."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from paceline.sampling.params import SamplingParams
from paceline.serve.client import EngineStatus
from paceline.serve.gate import OPEN
from paceline.serve.metrics import Metrics

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "paceline.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]
SCRAPE = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
SELECTOR = re.compile(r"\b((?:paceline|process)_\w+)\s*(?:\{(.*?)\})?")


@pytest.fixture(scope="module")
def labels() -> dict[str, set[str]]:
    """A server's series once it has answered, with what labels each; those of a scrape included."""
    metrics = Metrics("tiny", lambda: EngineStatus("ready", True, True))
    metrics.request(SamplingParams(max_tokens=5), 3)
    metrics.http_finished("/v1/models", "GET", 200)
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {"job", "instance"}).update(sample.labels)
    return found


@pytest.mark.parametrize("expression", sorted(set(EXPRESSIONS)))
def test_every_series_and_label_exists(expression, labels):
    selected = SELECTOR.findall(expression)
    assert selected
    for name, matchers in selected:
        assert name in labels
        asked = set(re.findall(r"(\w+)\s*=~?", matchers))
        grouped = set(itertools.chain(*(re.findall(r"\w+", by) for by in re.findall(r"by \((.*?)\)", expression))))
        assert asked | grouped <= labels[name]
        assert not name.endswith("_total") or "rate(" in expression or "increase(" in expression


def test_variables_are_defined_and_ask_for_what_exists(labels):
    variables = {one["name"]: one for one in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z_]+)", json.dumps([EXPRESSIONS, PANELS]))) - {"__rate_interval"}
    assert used == set(variables)
    for one in variables.values():
        if one["type"] == "query":
            metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", one["query"]["query"]).groups()
            assert label in labels[metric]


def test_what_an_operator_watches_is_there():
    text = " ".join(EXPRESSIONS)
    for name in (
        *("requests_running", "requests_waiting", "kv_cache_usage_ratio", "engine_ready", "engine_restarts_total"),
        *("time_to_first_token_seconds_bucket", "inter_token_latency_seconds_bucket", "request_seconds_bucket"),
        *("queue_seconds_bucket", "prefill_seconds_bucket", "decode_seconds_bucket", "generation_tokens_total"),
        *("prefix_cache_hit_tokens_total", "accepted_draft_tokens_total", "preemptions_total"),
    ):
        assert f"paceline_{name}{{" in text


def test_panels_have_ids_titles_and_places_of_their_own():
    places = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = set(itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])))
        assert not cells & places, panel["title"]
        places |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert all(panel["title"] and panel["description"] for panel in PANELS)


def test_the_scrape_asks_for_what_needs_no_key():
    (job,) = SCRAPE["scrape_configs"]
    assert job["metrics_path"] in OPEN
    jobs = set(re.findall(r'job="(\w+)"', " ".join(EXPRESSIONS)))
    assert jobs == {job["job_name"]}
    assert job["static_configs"] == [{"targets": ["localhost:8000"]}]
