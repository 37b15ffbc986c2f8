"""Prometheus metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jinaclip.server.admission import Limiter
from jinaclip.server.queue import Batcher

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
STAGES = ("fetch", "decode", "tokenise", "wait", "run")


class Metrics(Collector):
    """The counters and histograms of a server, and the state of its queues and admission limits.

    Args:
        batchers, limiters: the queue and the admission limit of each tower.

    Attributes:
        registry: all metrics.
        requests: answered requests, by path and status.
        seconds: request latency in seconds, by path.
        items: answered items, by tower.
        stages: seconds in each of STAGES, by tower. A run is counted once for its whole batch, and tokenising once
            for the texts that one thread tokenises together; the other stages are counted per item.
    """

    def __init__(self, batchers: Mapping[str, Batcher[Any]], limiters: Mapping[str, Limiter]) -> None:
        self._batchers, self._limiters = batchers, limiters
        self.registry = CollectorRegistry()
        self.registry.register(self)
        histogram = partial(Histogram, buckets=SECONDS, registry=self.registry)
        self.requests = Counter("jinaclip_requests", "answered requests", ("path", "status"), registry=self.registry)
        self.seconds = histogram("jinaclip_request_seconds", "request latency", ("path",))
        self.items = Counter("jinaclip_items", "answered texts and images", ("tower",), registry=self.registry)
        self.stages = histogram("jinaclip_stage_seconds", "time in a stage", ("tower", "stage"))

    def collect(self) -> Iterator[Metric]:
        """The state of the queues and limits. Called by the registry when /metrics is requested."""
        waiting = GaugeMetricFamily("jinaclip_queue_items", "queued items", labels=["tower"])
        oldest = GaugeMetricFamily("jinaclip_queue_oldest_seconds", "age of the oldest queued item", labels=["tower"])
        in_use = GaugeMetricFamily("jinaclip_accepted_items", "items accepted and not yet answered", labels=["tower"])
        dropped = CounterMetricFamily("jinaclip_dropped_items", "items of disconnected clients", labels=["tower"])
        failed = CounterMetricFamily("jinaclip_failed_items", "items whose run failed", labels=["tower"])
        refused = CounterMetricFamily("jinaclip_refused_items", "items over the queue limit", labels=["tower"])
        batches = CounterMetricFamily("jinaclip_batches", "batches by number of items", labels=["tower", "size"])
        for tower, batcher in self._batchers.items():
            waiting.add_metric([tower], batcher.waiting())
            oldest.add_metric([tower], batcher.oldest())
            in_use.add_metric([tower], self._limiters[tower].in_use)
            dropped.add_metric([tower], batcher.counts.dropped)
            failed.add_metric([tower], batcher.counts.failed)
            refused.add_metric([tower], self._limiters[tower].refused)
            for size, count in sorted(batcher.counts.batches.items()):
                batches.add_metric([tower, str(size)], count)
        yield from (waiting, oldest, in_use, dropped, failed, refused, batches)
