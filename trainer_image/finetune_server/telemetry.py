"""Metrics under vLLM's names, so that dashboards and autoscalers need not know which engine they watch.

Names and labels: https://docs.vllm.ai/en/stable/usage/metrics/
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric

from finetune_server.sequences import Sequence

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
_TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)


class Telemetry:
    """The engine's metrics; every method may be called from any thread."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._labels = {"model_name": model_name, "engine": "0"}
        self.running = self._gauge("num_requests_running", "Sequences in the batch.")
        self.waiting = self._gauge("num_requests_waiting", "Sequences that wait for a place in the batch.")
        self.cache_usage = self._gauge("kv_cache_usage_perc", "Share of the key-value memory in use, 0 to 1.")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens processed.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self.preemptions = self._counter("num_preemptions", "Sequences put back for lack of memory.")
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _SECONDS
        )
        self.time_per_output_token = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of one answer.", _TOKEN_SECONDS
        )
        self.latency = self._histogram(
            "e2e_request_latency_seconds", "From arrival to the last token.", _SECONDS
        )
        self.queue_time = self._histogram(
            "request_queue_time_seconds", "From arrival to the batch.", _SECONDS
        )
        self.request_prompt_tokens = self._histogram("request_prompt_tokens", "Tokens per prompt.", _TOKENS)
        self.request_generation_tokens = self._histogram(
            "request_generation_tokens", "Tokens per answer.", _TOKENS
        )
        self._success = Counter(
            "vllm:request_success",
            "Answers by why they ended.",
            [*self._labels, "finished_reason"],
            registry=self.registry,
        )

    def observe_token(self, sequence: Sequence) -> None:
        """Counts a token of an answer, now."""
        now = time.monotonic()
        if sequence.last_token is None:
            self.time_to_first_token.observe(now - sequence.arrived)
        else:
            self.time_per_output_token.observe(now - sequence.last_token)
        sequence.last_token = now
        self.generation_tokens.inc()

    def observe_end(self, sequence: Sequence, reason: str) -> None:
        """Counts an answer that ended now."""
        self.latency.observe(time.monotonic() - sequence.arrived)
        self.request_prompt_tokens.observe(len(sequence.prompt))
        self.request_generation_tokens.observe(len(sequence.output))
        self._success.labels(**self._labels, finished_reason=reason).inc()

    def watch_adapters(
        self, read: Callable[[], tuple[Iterable[str], Iterable[str]]], *, max_loras: int
    ) -> None:
        """Adds vllm:lora_requests_info; `read` returns the adapters of running and of waiting sequences."""
        self.registry.register(_AdapterInfo(read, max_loras))

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"vllm:{name}", text, list(self._labels), registry=self.registry).labels(**self._labels)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"vllm:{name}", text, list(self._labels), registry=self.registry).labels(
            **self._labels
        )

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"vllm:{name}", text, list(self._labels), registry=self.registry, buckets=buckets
        ).labels(**self._labels)


class _AdapterInfo:
    """One series whose value is the time and whose labels name the adapters, as vLLM has it."""

    def __init__(self, read: Callable[[], tuple[Iterable[str], Iterable[str]]], max_loras: int) -> None:
        self._read = read
        self._max_loras = max_loras

    def collect(self) -> Iterable[Metric]:
        running, waiting = self._read()
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters in use; the value is the time of the reading.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        family.add_metric(
            [str(self._max_loras), ",".join(sorted(running)), ",".join(sorted(waiting))], time.time()
        )
        yield family
