"""Write answers token by token: draw each, feed it, and again.

Every token is the same work on the same memory, so on a GPU its hundreds of launches are recorded once a shape, as a
CUDA graph, and sent at once from then on. Nothing waits for the device but the look for finished answers, every few
tokens.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from loguru import logger
from torch import Tensor

from models.decoding import PackedWriter, PlainWriter
from models.head import Logits, distribution

LOOK_EVERY = 4  # tokens


@dataclass(frozen=True)
class Generation:
    """Sampled answers of B products, G rows each, in product order."""

    completions: Tensor  # (B * G, T) ids as sampled; behind the stop token undefined
    action_mask: Tensor  # (B * G, T) bool: up to and including the stop token
    old_log_probs: Tensor  # (B * G, T) float32 at the sampling temperature; 0 where masked
    truncated: Tensor  # (B * G,) bool: no stop token within T


class Drawing:
    """Tokens drawn so far. n rows: the answers that are still written, of B * G."""

    def __init__(self, head: Logits, uniforms: Tensor, temperature: float | None, banned: Tensor, stop_ids: Tensor):
        """uniforms: (B * G, T), one number a token. temperature None takes the likeliest token."""
        rows, columns = uniforms.shape
        self._head, self._temperature, self._banned, self._stop_ids = head, temperature, banned, stop_ids
        self._uniforms = uniforms.flatten()
        self._completions = torch.zeros(rows, columns, dtype=torch.long, device=uniforms.device)
        self._log_probs = torch.zeros(rows, columns, device=uniforms.device)
        self._places = torch.arange(rows, device=uniforms.device) * columns  # (n,) of the next token, among all
        self.token = self._completions[:, :1].clone()  # (n, 1) the newest
        self.finished = torch.zeros(rows, dtype=torch.bool, device=uniforms.device)  # (n,)

    def draw(self, hidden: Tensor) -> None:
        """Draw the token that hidden (n, d) predicts, in every row."""
        probabilities = distribution(self._head, hidden, self._temperature, self._banned)  # (n, V)
        if self._temperature:
            token = inverse_cdf(probabilities, self._uniforms.index_select(0, self._places)[:, None])
        else:
            token = probabilities.argmax(-1, keepdim=True)  # (n, 1)
        self.token.copy_(token)
        self._completions.view(-1).index_copy_(0, self._places, token[:, 0])
        self._log_probs.view(-1).index_copy_(0, self._places, probabilities.gather(1, token)[:, 0].log())
        self.finished.logical_or_((token == self._stop_ids).any(-1))
        self._places.add_(1)

    def unfinished(self, products: int) -> int:
        """Ask how many answers are left of the product that has most; waits for the device."""
        return int((~self.finished).view(products, -1).sum(1).max())

    def keep(self, rows: Tensor) -> None:
        """Draw in some of the rows only."""
        self.token, self.finished, self._places = (each.index_select(0, rows) for each in
                                                   (self.token, self.finished, self._places))

    def generation(self) -> Generation:
        """All answers, as wide as the longest."""
        is_stop = torch.isin(self._completions, self._stop_ids)
        action_mask = is_stop.cumsum(1) - is_stop.long() == 0  # nothing stopped before this token
        longest = int(action_mask.sum(1).max())
        return Generation(self._completions[:, :longest], action_mask[:, :longest],
                          self._log_probs.masked_fill(~action_mask, 0.0)[:, :longest], ~is_stop.any(1))


class Repeated:
    """Work that does the same to the same memory each time: on a GPU recorded once, as a CUDA graph, and replayed.

    Where it can't be recorded, because an operation waits for the device or a library forbids it, it is done each time.
    """

    _can_be = True  # until an attempt fails, once for all: what forbids it is the machine or the model

    def __init__(self, work: Callable[[], None], recorded: bool):
        self._work, self._recorded = work, recorded
        self.begin_anew()

    def begin_anew(self) -> None:
        """Take what comes for other work: of other shapes, or on other memory."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = False

    def __call__(self) -> None:
        if not (self._recorded and Repeated._can_be):
            self._work()
        elif not self._warm:  # libraries set themselves up at the first call, which can't be recorded
            aside, here = torch.cuda.Stream(), torch.cuda.current_stream()
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                self._work()
            here.wait_stream(aside)
            self._warm = True
        else:
            self._graph = self._graph or self._record()
            if self._graph is None:
                Repeated._can_be = False
                self._work()
            else:
                self._graph.replay()

    def _record(self) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        try:  # other threads prepare photos meanwhile, and may ask for memory
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._work()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as problem:
            logger.warning(f"writing a token can't be recorded as a CUDA graph, which is slower: {problem}")
            return None
        return graph


def write(writer: PackedWriter | PlainWriter, drawing: Drawing, embed: Callable[[Tensor], Tensor], products: int,
          length: int, steady: bool) -> Generation:
    """Write every answer to its stop token, or so many tokens long.

    embed: of token ids (n, 1). steady: every token is the same work on the same memory.
    """
    drawing.draw(writer.hidden)
    next_token = Repeated(lambda: drawing.draw(writer.feed(embed(drawing.token))),
                          recorded=steady and writer.hidden.is_cuda)
    with torch.inference_mode() if steady else nullcontext():
        for fed in range(length - 1):
            if fed and fed % LOOK_EVERY == 0:
                unfinished = drawing.unfinished(products)
                if not unfinished:
                    break
                kept = writer.drop(drawing.finished, unfinished, fed)
                if kept is not None:
                    drawing.keep(kept)
                    next_token.begin_anew()
            if writer.make_room(fed):
                next_token.begin_anew()
            next_token()
    return drawing.generation()


def inverse_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Draw one token a row: the first whose cumulative probability exceeds the uniform number; (n, 1)."""
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    # Scaled by the total, the target stays below it, so a token of probability 0 is never the first above.
    # The clamp only meets rows of NaN: those are reported by the caller, not crashed on.
    found = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return found.clamp(max=probabilities.shape[-1] - 1)
