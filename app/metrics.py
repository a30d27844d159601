"""What the service counts and measures, for Prometheus: base units, counters end in _total."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SIDES = tuple(round(0.001 * 10 ** (step / 4), 6) for step in range(17))  # metres, 1 mm to 10 m, four a decade


class Metrics:
    """The service's figures, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        add = {"registry": self.registry}
        self.requests = Counter("vlm_requests", "requests by endpoint and outcome", ["endpoint", "outcome"], **add)
        self.seconds = Histogram("vlm_request_seconds", "from the first byte to the answer", ["endpoint"],
                                 buckets=_SECONDS, **add)
        self.queue_seconds = Histogram("vlm_queue_seconds", "from a whole request to its batch", buckets=_SECONDS,
                                       **add)
        self.model_seconds = Histogram("vlm_model_seconds", "of a batch at the model", buckets=_SECONDS, **add)
        self.queue_length = Gauge("vlm_queue_length", "requests that wait", **add)
        self.batch_size = Histogram("vlm_batch_size", "products answered together", buckets=(1, 2, 4, 8, 12, 16, 32),
                                    **add)
        self.answers = Counter("vlm_answers", "answers of the model", ["reading"], **add)
        self.confidence = Histogram("vlm_confidence_ratio", "how far a product's answers agree",
                                    buckets=[step / 20 for step in range(1, 21)], **add)
        self.reviews = Counter("vlm_reviewed_products", "products by whether a person should look", ["review"], **add)
        self.longest_side = Histogram("vlm_longest_side_metres", "the longest side answered, to see drift",
                                      buckets=_SIDES, **add)
        self.photo_failures = Counter("vlm_photo_failures", "photos refused, by reason", ["reason"], **add)
        self.restarts = Counter("vlm_worker_restarts", "worker processes and engines lost", ["worker"], **add)

    def text(self) -> bytes:
        """Write them in Prometheus' text format."""
        return generate_latest(self.registry)

    def answered(self, sizes: list[float], readings: list[bool], confidence: float | None, review: bool) -> None:
        """Count one product's answer; sizes in cm, largest first; readings: which answers could be read."""
        for readable in readings:
            self.answers.labels("readable" if readable else "unreadable").inc()
        if confidence is not None:
            self.confidence.observe(confidence)
        self.reviews.labels("yes" if review else "no").inc()
        if sizes:
            self.longest_side.observe(sizes[0] / 100)
