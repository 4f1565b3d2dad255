"""Numbers for Prometheus, under the names that vLLM has for the same things, with ``llava_fast:`` for ``vllm:``."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from llava_fast.engine import Completion, Engine

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)
_FAILED = "abort"  # vLLM's word for what did not come to its end


class Metrics:
    """A registry of one app's own."""

    def __init__(self, engine: Engine, model_name: str):
        self._registry = CollectorRegistry()
        self._model = model_name
        self._registry.register(_EngineNumbers(engine, model_name))
        self._first = self._histogram("time_to_first_token_seconds", "Submission to first token", _SECONDS)
        self._token = self._histogram(
            "request_time_per_output_token_seconds", "Mean time of a token after a request's first", _SECONDS
        )
        self._whole = self._histogram("e2e_request_latency_seconds", "Submission to last token", _SECONDS)
        self._queue = self._histogram("request_queue_time_seconds", "Submission to first computation", _SECONDS)
        self._prefill = self._histogram("request_prefill_time_seconds", "First computation to first token", _SECONDS)
        self._decode = self._histogram("request_decode_time_seconds", "First token to last", _SECONDS)
        self._prompt = self._histogram("request_prompt_tokens", "Tokens of a prompt, image rows included", _TOKENS)
        self._answer = self._histogram("request_generation_tokens", "Tokens of a request's answers", _TOKENS)
        self._images = self._histogram("request_image_tokens", "Image rows of a prompt", (0, *_TOKENS))
        self._requests = Counter(
            "http_requests", "Requests by what became of them", ["method", "handler", "status"], registry=self._registry
        )
        self._tasks = Gauge("asyncio_tasks", "Tasks of the event loop", registry=self._registry)
        self._seconds = Histogram(
            "http_request_duration_seconds",
            "First byte to last, of any request",
            ["method", "handler"],
            registry=self._registry,
            buckets=_SECONDS,
        )

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(f"llava_fast:{name}", text, ["model_name"], registry=self._registry, buckets=buckets)
        return made.labels(self._model)

    def completed(self, completion: Completion) -> None:
        """A request came to its end."""
        tokens = sum(len(output.token_ids) for output in completion.outputs)
        self._prompt.observe(completion.prompt_tokens)
        self._answer.observe(tokens)
        self._images.observe(completion.image_tokens)
        queue, first, whole = completion.queue_s, completion.first_token_s, completion.total_s
        if queue is None or first is None or whole is None:
            return
        self._queue.observe(queue)
        self._first.observe(first)
        self._prefill.observe(max(0.0, first - queue))
        self._whole.observe(whole)
        self._decode.observe(whole - first)
        longest = max(len(output.token_ids) for output in completion.outputs)
        if longest > 1:
            self._token.observe((whole - first) / (longest - 1))

    def http(self, method: str, route: str, status: int, seconds: float) -> None:
        method = method if method in ("GET", "POST", "HEAD", "OPTIONS") else "other"  # a client could make up many
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(method, route).observe(seconds)

    def text(self) -> bytes:
        """Called in the event loop whose tasks are counted."""
        self._tasks.set(len(asyncio.all_tasks()))
        return generate_latest(self._registry)


class _EngineNumbers:
    """What the engine counts by itself, read when it is asked for: requests that did not come over HTTP too."""

    def __init__(self, engine: Engine, model_name: str):
        self._engine, self._model = engine, model_name

    def collect(self) -> Iterable[Metric]:
        stats = self._engine.stats()
        gauges = {
            "num_requests_running": ("Answers that are being generated", stats.running),
            "num_requests_waiting": ("Requests that have not begun", stats.waiting),
            "kv_cache_usage_perc": ("Share of the cache's blocks in use; 1 is all", stats.cache_use),
        }
        counters = {
            "prompt_tokens": ("Tokens of prompts, cached ones included", stats.prompt_tokens + stats.cached_tokens),
            "generation_tokens": ("Tokens drawn", stats.generated_tokens),
            "prefix_cache_queries": ("Tokens looked up in the prefix cache", stats.prefix_tokens),
            "prefix_cache_hits": ("Tokens found there", stats.cached_tokens),
            "mm_cache_queries": ("Images looked up in the feature cache", stats.image_hits + stats.image_misses),
            "mm_cache_hits": ("Images found there", stats.image_hits),
            "num_preemptions": ("Times an answer gave its cache blocks back", stats.preemptions),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(f"llava_fast:{name}", text, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(f"llava_fast:{name}", text, labels=["model_name"])
            counter.add_metric([self._model], value)
            yield counter
        ended = CounterMetricFamily(
            "llava_fast:request_success", "Requests that ended, by reason", labels=["model_name", "finished_reason"]
        )
        reasons = {"stop": 0, "length": 0, _FAILED: 0}
        for reason, count in stats.finished.items():
            reasons[reason if reason in reasons else _FAILED] += count
        for reason, count in reasons.items():
            ended.add_metric([self._model, reason], count)
        yield ended
