"""Policy + products -> records: what was answered, how it was read, what it was worth. Training, run.py and
test_model.py all answer through here, so that prompt, sampling and parser are the same."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median

from PIL import Image
from tqdm import tqdm

from evidence import measures
from own_reward import Scorer
from reward import SUCCESS_REWARD, RewardParts
from rollout import PromptEncoder, RolloutFailure, rollout_groups
from sheets.samples import Sample, load_photos

FAILURE_REWARD = 0.3  # answers below it count as plainly wrong


@dataclass(frozen=True)
class Figure:
    """A figure of a set of answers, and what a reader needs to know of it."""

    title: str
    form: str
    meaning: str


FIGURES = {
    "mean_reward": Figure("mean reward", "{:.3f}", "the mean reward of all answers; 1 is perfect"),
    "success_rate": Figure("reward >= 0.9", "{:.1%}", "share of answers with a reward of 0.9 or more"),
    "failure_rate": Figure("reward < 0.3", "{:.1%}", "share of answers with a reward below 0.3: plainly wrong"),
    "zero_rate": Figure("reward 0", "{:.1%}", "share of answers that earn nothing"),
    "within_5": Figure("within 5 %", "{:.1%}", "share of answers with every side within 5 % of the true size"),
    "within_10": Figure("within 10 %", "{:.1%}", "share of answers with every side within 10 %"),
    "within_20": Figure("within 20 %", "{:.1%}", "share of answers with every side within 20 %"),
    "largest_error": Figure("error, largest side", "{:.1%}", "median error of the largest side; a side that "
                            "the answer lacks counts as 100 %"),
    "middle_error": Figure("error, middle side", "{:.1%}", "median error of the middle side"),
    "smallest_error": Figure("error, smallest side", "{:.1%}", "median error of the smallest side"),
    "volume_error": Figure("error, volume", "{:.1%}", "median error of length x width x height, which shipping "
                           "costs follow; where three sizes are known"),
    "slip_rate": Figure("unit slips", "{:.1%}", "share of answers whose sides are all off by one and the same "
                        "unit factor, such as 10 or 25.4"),
    "valid_rate": Figure("readable answers", "{:.1%}", "share of answers in which at least one size can be read"),
}


@dataclass(frozen=True)
class Record:
    """One product's answers."""

    sample: Sample
    answers: list[str]
    parts: list[RewardParts]

    @property
    def key(self) -> tuple[str, int]:
        """Which product this is: sheet and row."""
        return self.sample.sheet, self.sample.row

    @property
    def rewards(self) -> list[float]:
        """The reward of each answer."""
        return [part.reward for part in self.parts]

    @property
    def reward(self) -> float:
        """The mean reward of the product's answers."""
        return fmean(self.rewards)

    def agreed(self) -> tuple[int, float | None]:
        """The answer that agrees most with the others, and the confidence in it (None for one answer)."""
        return measures.most_agreed([part.sizes for part in self.parts])


def evaluate(encoder: PromptEncoder, samples: Sequence[Sample], num_samples: int, temperature: float | None,
             max_length: int, seed: int, batch_size: int, scorer: Scorer | None = None, show: bool = True
             ) -> tuple[list[Record], list[RolloutFailure]]:
    """Answer each product num_samples times (once if greedy: temperature None) and score the answers.

    Of the products done only the records are held. show: a progress bar.
    """
    records, failures = [], []
    for chunk in in_chunks(encoder, samples, batch_size, "held-out", show=show):
        found, failed = answer_together(encoder, chunk, num_samples, temperature, max_length, seed, batch_size, scorer)
        records += found
        failures += failed
    place = {sample: index for index, sample in enumerate(samples)}
    return sorted(records, key=lambda record: place[record.sample]), failures


def answer_together(encoder: PromptEncoder, samples: Sequence[Sample], num_samples: int, temperature: float | None,
                    max_length: int, seed: int, batch_size: int, scorer: Scorer | None = None
                    ) -> tuple[list[Record], list[RolloutFailure]]:
    """Answer a few products as evaluate does, their prompts and photo features held all at once."""
    groups, failures = rollout_groups(encoder, samples, 1 if temperature is None else num_samples, temperature,
                                      max_length, f"evaluate/{seed}", batch_size)
    if scorer is not None:
        scorer.rescore(groups)
    return [Record(group.sample, group.answers, group.parts) for group in groups], failures


def in_chunks(encoder: PromptEncoder, samples: Sequence[Sample], size: int, title: str, done: int = 0,
              show: bool = True) -> Iterator[list[Sample]]:
    """Cut products into chunks whose prompts are about as long, the longest first, with a progress bar.

    While one chunk is worked on, the prompts of the next are prepared; behind it they are dropped. done: products
    that were done before these.
    """
    ordered = sorted(samples, key=lambda sample: (len(sample.photos), len(sample.text)), reverse=True)
    with tqdm(total=done + len(ordered), initial=done, desc=title, unit="product", leave=False,
              disable=None if show else True, dynamic_ncols=True) as bar:
        for start in range(0, len(ordered), size):
            chunk = ordered[start:start + size]
            encoder.prefetch(ordered[start:start + 2 * size])
            yield chunk
            encoder.forget(chunk)
            bar.update(len(chunk))


def summarise(records: Sequence[Record]) -> dict[str, float]:
    """Reduce records to the figures that are compared (see FIGURES); shares are of answers, 0 to 1.

    Figures of sides that no label has are left out.
    """
    parts = [part for record in records for part in record.parts]
    if not parts:
        return {}
    return {
        "mean_reward": fmean(part.reward for part in parts),
        "success_rate": fmean(part.reward >= SUCCESS_REWARD for part in parts),
        "failure_rate": fmean(part.reward < FAILURE_REWARD for part in parts),
        "zero_rate": fmean(part.reward == 0 for part in parts),
        **{f"within_{percent}": fmean(measures.within(part.errors, percent / 100) for part in parts)
           for percent in (5, 10, 20)},
        **_size_errors(records),
        "slip_rate": fmean(measures.unit_slip(part.sizes, record.sample.label) is not None
                           for record in records for part in record.parts),
        "valid_rate": fmean(part.valid for part in parts),
        "products": len(records),
        "answers": len(parts),
    }


def _size_errors(records: Sequence[Record]) -> dict[str, float]:
    errors = {f"{side}_error": [measures.side_error(part.errors, side) for record in records for part in record.parts]
              for side in ("largest", "middle", "smallest")}
    errors["volume_error"] = [measures.volume_error(part.sizes, record.sample.label)
                              for record in records for part in record.parts]
    known = {name: _known(values) for name, values in errors.items()}
    return {name: median(values) for name, values in known.items() if values}


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def blank_photos(sample: Sample) -> list[Image.Image]:
    """Open a product's photos as plain grey pictures of the same sizes."""
    return [Image.new("RGB", photo.size, (128, 128, 128)) for photo in load_photos(sample)]


def with_other_photos(samples: Sequence[Sample]) -> list[Sample]:
    """Give every product with photos as many of another one, none of them its own; the label stays its own.

    The next one that has enough gives them, else the one that has most; products that none can give any are left out.
    """
    swapped = []
    for index, sample in enumerate(samples):
        given: tuple[str, ...] = ()
        for other in (*samples[index + 1:], *samples[:index]):
            foreign = tuple(photo for photo in other.photos if photo not in sample.photos)[:len(sample.photos)]
            given = max(given, foreign, key=len)
            if len(given) == len(sample.photos):
                break
        if given:
            swapped.append(replace(sample, photos=given))
    return swapped


def ablations(samples: Sequence[Sample], make_encoder: Callable[..., PromptEncoder]
              ) -> dict[str, tuple[PromptEncoder, list[Sample]]]:
    """Pair each photo ablation with the encoder and the products that carry it out, all of them with photos."""
    shown = [sample for sample in samples if sample.photos]
    return {"no photos": (make_encoder(), [replace(sample, photos=()) for sample in shown]),
            "photos blanked": (make_encoder(open_photos=blank_photos), shown),
            "other products' photos": (make_encoder(), with_other_photos(samples))}
