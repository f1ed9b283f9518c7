"""Write deploy/grafana/phloem.json: the dashboard of servers and gateway, from one line for each panel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parent.parent / "deploy" / "grafana" / "phloem.json"
Panel = tuple[str, str, list[tuple[str, str]]]  # title, unit, [(query, legend)]


def quantiles(name: str) -> list[tuple[str, str]]:
    return [
        (f"histogram_quantile({share}, sum by (le) (rate({name}_bucket[$__rate_interval])))", f"p{share * 100:g}")
        for share in (0.5, 0.95, 0.99)
    ]


def rate(name: str, by: str = "instance") -> list[tuple[str, str]]:
    return [(f"sum by ({by}) (rate({name}[$__rate_interval]))", f"{{{{{by}}}}}")]


SERVERS: list[Panel] = [
    ("Time to first token", "s", quantiles("phloem:time_to_first_token_seconds")),
    ("Between tokens", "s", quantiles("phloem:inter_token_latency_seconds")),
    ("Whole requests", "s", quantiles("phloem:e2e_request_latency_seconds")),
    ("Output tokens a second", "short", rate("phloem:generation_tokens_total")),
    ("Prompt tokens a second", "short", rate("phloem:prompt_tokens_total")),
    ("Prompts found in the cache", "percentunit", [("phloem:cache_hit_rate", "{{instance}}")]),
    ("Requests", "short", [("phloem:num_running_reqs", "runs {{instance}}"),
                           ("phloem:num_queue_reqs", "waits {{instance}}")]),
    ("KV memory in use", "percentunit", [("phloem:token_usage", "{{instance}}")]),
    ("Preempted and out of memory, a second", "short", [
        ("rate(phloem:num_preemptions_total[$__rate_interval])", "preempted {{instance}}"),
        ("rate(phloem:num_out_of_memory_total[$__rate_interval])", "out of memory {{instance}}")]),
    ("Step time outside the model", "percentunit", [("phloem:outside_forward_ratio", "{{instance}}")]),
]  # fmt: skip
GATEWAY: list[Panel] = [
    ("Answers a second", "reqps", rate("phloem_router:requests_total", "status")),
    ("Time to first byte", "s", quantiles("phloem_router:time_to_first_byte_seconds")),
    ("What the gateway adds", "s", quantiles("phloem_router:overhead_seconds")),
    ("Workers", "short", [("phloem_router:workers", "all"), ("phloem_router:workers_ready", "well")]),
    ("Requests at workers", "short", [("phloem_router:worker_requests_running", "{{worker}}")]),
    ("Prompt tokens to compute", "short", [("phloem_router:worker_pending_tokens", "{{worker}}")]),
    ("Predicted share of prompts that is cached", "percentunit", [
        ("sum(rate(phloem_router:cached_tokens_total[$__rate_interval])) "
         "/ sum(rate(phloem_router:prompt_tokens_total[$__rate_interval]))", "cached")]),
    ("Retries, broken streams, refusals a second", "short", [
        ("sum(rate(phloem_router:retries_total[$__rate_interval]))", "retries"),
        ("sum(rate(phloem_router:broken_streams_total[$__rate_interval]))", "broken streams"),
        ("sum by (reason) (rate(phloem_router:refused_total[$__rate_interval]))", "{{reason}}")]),
]  # fmt: skip


def panel(number: int, row: int, at: int, made: Panel) -> dict[str, Any]:
    title, unit, queries = made
    source = {"type": "prometheus", "uid": "${source}"}
    return {
        "id": number,
        "type": "timeseries",
        "title": title,
        "datasource": source,
        "gridPos": {"h": 8, "w": 8, "x": at % 3 * 8, "y": row + at // 3 * 8},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [
            {"refId": chr(65 + index), "expr": expr, "legendFormat": legend, "datasource": source}
            for index, (expr, legend) in enumerate(queries)
        ],
    }


def dashboard() -> dict[str, Any]:
    panels: list[dict[str, Any]] = []
    row = 0
    for title, made in (("Servers", SERVERS), ("Gateway", GATEWAY)):
        head = {"h": 1, "w": 24, "x": 0, "y": row}
        panels.append({"id": len(panels) + 1, "type": "row", "title": title, "gridPos": head, "panels": []})
        panels += [panel(len(panels) + 1 + at, row + 1, at, item) for at, item in enumerate(made)]
        row += 1 + -(-len(made) // 3) * 8
    variable = {"name": "source", "type": "datasource", "query": "prometheus", "label": "Data source"}
    return {
        "uid": "phloem",
        "title": "Phloem",
        "tags": ["phloem"],
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [variable]},
        "panels": panels,
    }


if __name__ == "__main__":
    TARGET.write_text(json.dumps(dashboard(), indent=1) + "\n")
