"""Counts and times for Prometheus, in a registry of their own; names after vLLM's."""

import os
import re
from pathlib import Path

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""Where processes that serve one model together keep their counts, for each to read all."""
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 300)
ROWS = (0, 1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Of one server. `iteration` is called in the engine's thread, all else in the event loop's."""

    def __init__(self):
        self.registry = registry = CollectorRegistry()

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"sememe_{name}", what, labels, registry=registry)

        def gauge(name: str, what: str, *labels: str, together: str = "livesum") -> Gauge:
            options = {"registry": registry, "multiprocess_mode": together}
            return Gauge(f"sememe_{name}", what, labels, **options)

        def times(name: str, what: str, *labels: str) -> Histogram:
            name = f"sememe_{name}_seconds"
            return Histogram(name, what, labels, registry=registry, buckets=SECONDS)

        self.running = gauge("requests_running", "Requests with a row, or reading for one.")
        self.waiting = gauge("requests_waiting", "Requests in the queue.")
        self.requests = counter("requests_total", "POST requests that are through.", "outcome")
        self.prompt_tokens = counter("prompt_tokens_total", "Tokens of prompts.")
        self.generation_tokens = counter("generation_tokens_total", "Tokens written.")
        self.read_tokens = counter("read_tokens_total", "Tokens read, prompts and written ones.")
        self.concepts = counter("concepts_total", "Concepts written.")
        self.concept_rate = gauge(
            "concept_rate", "Concepts per token read, since the start.", together="livemostrecent"
        )
        self.first_token = times("time_to_first_token", "From a request to its first token.")
        self.gap = times("inter_token_latency", "Between two tokens of an answer.")
        self.whole = times("e2e_request_latency", "From a request to its end.")
        self.queued = times("request_queue_time", "From a request to its row.")
        self.cache = gauge("cache_bytes", "Keys and values of all rows.", "slice")
        self.step = times("step", "Of the engine.", "phase")
        self.middle_rows = Histogram(
            "sememe_middle_rows",
            "Rows that a step ran the middle layers for.",
            registry=registry,
            buckets=ROWS,
        )
        self.last_iteration = None

    def iteration(self, iteration) -> None:
        """What the engine has done in one, an `engine.Iteration`."""
        self.last_iteration = iteration
        self.running.set(iteration.rows)
        self.waiting.set(iteration.waiting)
        for name, size in iteration.cache_bytes.items():
            self.cache.labels(name).set(size)
        for phase, seconds in iteration.seconds.items():
            self.step.labels(phase).observe(seconds)
        if "decode" in iteration.seconds:
            self.middle_rows.observe(iteration.middle_rows)

    def outcome(self, outcome: str) -> None:
        self.requests.labels(outcome).inc()

    def reading(self, tokens: int, concepts: int) -> None:
        """Tokens that a request has read, and the concepts among them."""
        self.read_tokens.inc(tokens)
        self.concepts.inc(concepts)
        total = self.value("sememe_read_tokens_total")
        self.concept_rate.set(self.value("sememe_concepts_total") / total if total else 0.0)

    def value(self, name: str, **labels: str) -> float:
        """Of one series; 0 before it was counted."""
        return self.registry.get_sample_value(name, labels) or 0.0

    def outcomes(self) -> dict[str, int]:
        """How many requests have come to what."""
        return counted(self.requests.collect())

    def text(self) -> bytes:
        """Of all processes that serve the model together."""
        folder = os.environ.get(FOLDER)
        return generate_latest(self.registry if folder is None else all_in(folder))


def all_in(folder: str) -> CollectorRegistry:
    """Counts of all processes; those of one that was killed stay, but it runs no requests now."""
    for path in Path(folder).glob("gauge_live*.db"):
        number = int(re.findall(r"\d+", path.name)[-1])
        if not psutil.pid_exists(number):
            mark_process_dead(number, folder)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, folder)
    return registry


def outcomes_in(folder: str) -> dict[str, int]:
    """How many requests of all processes have come to what."""
    return counted(x for x in all_in(folder).collect() if x.name == "sememe_requests")


def counted(families) -> dict[str, int]:
    samples = (x for family in families for x in family.samples if x.name.endswith("_total"))
    return {x.labels["outcome"]: int(x.value) for x in samples}
