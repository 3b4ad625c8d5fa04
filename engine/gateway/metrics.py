"""The gateway's own Prometheus metrics, in a registry of their own: two gateways in a process do not meet."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from engine.api import Answer
from engine.gateway.audit import Access

_SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counts of what the routes did. Labels are routes, codes and fixed words: never names, ids or texts."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "requests that ended", "operation", "status")
        self.refusals = self._counter("refusals", "requests that were refused, by cause", "cause")
        self.seconds = Histogram(
            "m3d_gateway_request_seconds",
            "from a request's head to the end of its answer",
            ("operation",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.first_text = Histogram(
            "m3d_gateway_first_text_seconds",
            "from a question to its first text",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.studies = self._counter(
            "studies", "studies that were opened: known to the gateway, known to the server, or new", "found"
        )
        self.resent = self._counter("studies_resent", "studies that the server had evicted, sent again from a file")
        self.evicted = self._counter("studies_gone", "requests for studies that the server does not hold any more")
        self.tokens = self._counter("tokens", "tokens of prompts, of those cached, and of answers", "kind")
        self.answers = self._counter("answers", "whole answers, with and without [SEG]", "seg")
        self.bytes = self._counter("bytes", "bytes of bodies", "direction")

    def gauge(self, name: str, what: str, value: Callable[[], float]) -> None:
        """A value that is read when the metrics are."""
        Gauge(f"m3d_gateway_{name}", what, registry=self.registry).set_function(value)

    def answered(self, answer: Answer) -> None:
        took = answer.timings
        self.tokens.labels("prompt").inc(took.prompt_tokens)
        self.tokens.labels("cached").inc(took.cached_tokens)
        self.tokens.labels("answer").inc(took.answer_tokens)
        self.answers.labels("yes" if "[SEG]" in answer.text else "no").inc()
        if took.first_text_s is not None:
            self.first_text.observe(took.first_text_s)

    def ended(self, access: Access) -> None:
        self.requests.labels(access.operation, str(access.status or 0)).inc()
        self.seconds.labels(access.operation).observe(access.seconds)
        if access.outcome != "ok":
            self.refusals.labels(access.outcome).inc()
        self.bytes.labels("in").inc(access.bytes_in)
        self.bytes.labels("out").inc(access.bytes_out)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"m3d_gateway_{name}", what, labels, registry=self.registry)
