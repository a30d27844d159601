"""What a step holds in the memory of each GPU, counted from the model's shape, the options and the lengths of rows.

It counts what the code does: bfloat16 copies that autocast makes of float32 weights, what layers keep for the backward
pass, a rollout's keys, float32 logits. Left out: what CUDA itself takes, what the allocator leaves unused, norms and
biases, the vision's own layers while it trains. tests/test_scaling.py holds it against measured bytes,
docs/scaling.md shows what comes of it.
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from config import TrainOptions
from models.decoding import columns_of_room, tokens_of_room
from models.head import CHUNK_NUMBERS

MOMENTS = {"adamw": 8.0, "adamw_8bit": 2 + 8 / 256}  # bytes a number that trains; in 8 bits a scale for 256 each
_CHUNK = 64  # tokens that transformers' delta rule takes together
_FOUR_BITS = 0.53  # bytes a number, scales among them


@dataclass(frozen=True)
class DeltaNet:
    """The sizes of a gated delta net."""

    keys: int  # key heads times the size of one
    values: int
    heads: int  # of values
    head_size: int  # of a key
    state: int  # numbers of a head's state


@dataclass(frozen=True)
class Shape:
    """A model's sizes; numbers are parameters."""

    language: float  # numbers in the language model, embeddings and head among them
    vision: float  # numbers in the vision and its way into the language model
    layer: float  # numbers in a layer's matrices
    largest: float  # numbers in the largest of them
    linears: int  # matrices that an adapter is put on, in all layers
    features: float  # their inputs and outputs, added up
    vocabulary: int
    tied: bool  # the head is the embedding
    width: int
    inner: int  # of the MLP
    attentions: int  # layers of attention
    deltas: int  # layers with a gated delta net
    heads: int
    query: int  # heads times the size of one
    keys: int  # key heads times the size of one
    head_size: int
    gated: bool = False  # the query's projection gives a gate as well
    normed: bool = False  # queries and keys are normed
    delta: DeltaNet | None = None

    @property
    def layers(self) -> int:
        """All layers."""
        return self.attentions + self.deltas

    @property
    def head(self) -> int:
        """Numbers in the head."""
        return self.vocabulary * self.width

    @property
    def outside(self) -> int:
        """Numbers outside of the layers: embedding and head."""
        return self.head if self.tied else 2 * self.head


@dataclass(frozen=True)
class Work:
    """The lengths and numbers that a step meets at most."""

    prompt: int  # tokens, photos' among them
    photo_tokens: int = 0
    products: int = 1  # a pass of reference and update
    sampled: int = 1  # products sampled together


@dataclass(frozen=True)
class Footprint:
    """Bytes: held all the time, beside that at the fullest moment of each phase, and on the host with --offload."""

    held: dict[str, float]
    phases: dict[str, dict[str, float]]
    host: dict[str, float] = field(default_factory=dict)

    @property
    def fullest(self) -> str:
        """The phase that takes most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> float:
        """The bytes of the fullest moment."""
        return sum(self.held.values()) + sum(self.phases[self.fullest].values())


def shape_of(language_model: nn.Module, head: nn.Module, vision: float = 0) -> Shape:
    """Read the shape off a language model, be it on meta, in 4 bits or under an adapter; vision: its numbers."""
    config, layers = language_model.config, language_model.layers
    mixers = [getattr(layer, "self_attn", None) or layer.linear_attn for layer in layers]
    attentions = [mixer for mixer in mixers if hasattr(mixer, "q_proj")]
    deltas = [mixer for mixer in mixers if not hasattr(mixer, "q_proj")]
    linears = [module for layer in layers for name, module in layer.named_modules()
               if isinstance(module, nn.Linear) and ".lora_" not in name]
    sizes = [linear.in_features * linear.out_features for linear in linears]  # in 4 bits a weight has fewer numbers
    counted = {id(linear.weight) for linear in linears}
    others = {id(weight): weight.numel() for module in (language_model, head)
              for name, weight in module.named_parameters() if id(weight) not in counted and ".lora_" not in name}
    query, keys, head_size, gated, normed = 0, 0, 1, False, False
    for mixer in attentions[:1]:
        query, keys, head_size = mixer.o_proj.in_features, mixer.k_proj.out_features, mixer.head_dim
        gated, normed = mixer.q_proj.out_features > query, hasattr(mixer, "q_norm")
    delta = [DeltaNet(mixer.key_dim, mixer.value_dim, mixer.num_v_heads, mixer.head_k_dim,
                      mixer.head_k_dim * mixer.head_v_dim) for mixer in deltas[:1]]
    return Shape(sum(sizes) + sum(others.values()), vision, sum(sizes) / len(layers), max(sizes), len(linears),
                 sum(linear.in_features + linear.out_features for linear in linears), head.out_features,
                 head.weight is language_model.get_input_embeddings().weight, config.hidden_size,
                 config.intermediate_size, len(attentions), len(deltas), query // head_size, query, keys, head_size,
                 gated, normed, *delta)


def footprint(shape: Shape, options: TrainOptions, work: Work, world: int = 1, on_gpu: bool = True,
              copies: bool = True) -> Footprint:
    """Count a step of one of `world` processes; copies False: of one that has no memory for a rollout's copies."""
    split = splits(options, world)
    held = {name: size / (world if split else 1) for name, size in held_bytes(shape, options).items()}
    host = held if options.offload else {}
    gradients = {} if options.offload else {"gradients": held.pop("gradients")}
    passes = -(-(options.minibatch_size or options.batch_size) // work.products)
    if split and options.reduce_once and passes > 1 and not options.lora_rank:  # whole until the last pass
        gradients = {"gradients": held_bytes(shape, options)["gradients"]}
    phases = {"rollout": _rollout(shape, options, work, split, on_gpu, copies),
              "update, forward": _forward(shape, options, work, split, on_gpu) | gradients,
              "update, backward": _backward(shape, options, work, split, on_gpu) | gradients}
    if options.kl_weight:
        phases["reference"] = _reference(shape, options, work, split)
    features = {"photo features": 4.0 * options.batch_size * work.photo_tokens * shape.width}
    return Footprint({} if options.offload else held, {name: phase | features for name, phase in phases.items()}, host)


def splits(options: TrainOptions, world: int) -> bool:
    """Whether weights are split, over processes or into parts that come from the host one after the other."""
    return options.sharding != "none" and (world > 1 or options.offload)


def held_bytes(shape: Shape, options: TrainOptions) -> dict[str, float]:
    """Bytes of weights, of what trains them and of the reference, all processes together; gradients in updates only."""
    both, size = shape.language + shape.vision, _size(options)
    adapter = (options.lora_rank or 0) * shape.features
    trained = adapter or shape.language + (shape.vision if options.train_vision else 0)
    weights = 4 * both
    if options.lora_rank:
        in_layers = shape.layers * shape.layer if options.quantize == "4bit" else 0
        weights = _FOUR_BITS * in_layers + size * (both - in_layers) + 4 * adapter
    held = {"weights": weights, "gradients": 4 * trained, "Adam's moments": MOMENTS[options.optimizer] * trained}
    if options.kl_weight and not options.lora_rank:
        held["reference"] = size * shape.language + (4 if options.train_vision else size) * shape.vision
    return held


def kept_in_a_layer(shape: Shape, options: TrainOptions, tokens: int, chunked: int, on_gpu: bool = True
                    ) -> dict[str, float]:
    """Bytes that the backward pass wants of a layer, by its kind; chunked: tokens where each row is cut in chunks.

    What lies between layers is float32, and so are norms; matrices multiply copies in the compute dtype. A norm that
    trains keeps what it multiplies, a frozen matrix keeps nothing, the adapter beside it what it reads itself.
    """
    size, full = _size(options), not options.lora_rank
    own = size * (options.lora_rank or 0) * shape.linears / shape.layers  # what goes from A to B
    # Two sums, norms and their divisors; the MLP's two products, its activation and what they make together.
    common = (8 + 8 * full) * shape.width + 8 + 4 * size * shape.inner + own
    return ({"attention": tokens * (common + _attention(shape, size, full, on_gpu))} if shape.attentions else {}) | (
        {"delta net": tokens * common + chunked * _delta_net(shape, shape.delta, size, full)} if shape.delta else {})


def _attention(shape: Shape, size: int, full: bool, on_gpu: bool) -> float:
    query, keys = shape.query, shape.keys
    # In bfloat16 each of the five matrices that read a norm's output keeps a copy of its own.
    kept = (10 if size == 2 else 8) * shape.width
    kept += size * (3 * query + 2 * keys) + 4 * shape.heads  # queries, answers and their copy; keys, values
    kept += size * keys if size == 2 else 0  # a prompt's keys are copied for the prompt and again for the answers
    kept += 2 * size * query if on_gpu and query != keys else 0  # keys and values repeated for each query
    if shape.normed:
        kept += (8 if full else 4) * (query + keys) + 4 * (query + keys) / shape.head_size
    if shape.gated:
        kept += (4 if size == 2 else 12) * query
    return kept


def _delta_net(shape: Shape, delta: DeltaNet, size: int, full: bool) -> float:
    """As transformers' own rule goes, in float32 and in chunks; fla's kernels, where installed, take less."""
    repeated = delta.heads * delta.head_size
    if size == 2:
        return (12 * shape.width + 8 * delta.keys + 38 * repeated + (32 + 4 * full) * delta.values
                + (930 + 4 * full) * delta.heads + 8 * delta.heads * delta.state / _CHUNK)
    return (8 * shape.width + 16 * delta.keys + (48 if repeated > delta.keys else 52) * repeated
            + (40 + 4 * full) * delta.values + (1316 + 4 * full) * delta.heads
            + 4 * delta.heads * delta.state / _CHUNK)


def _rollout(shape: Shape, options: TrainOptions, work: Work, split: bool, on_gpu: bool, copies: bool
             ) -> dict[str, float]:
    """Bytes while prompts are read, while a token is written, or while buffers grow, whatever takes most."""
    size, products, tokens = _size(options), work.sampled, work.sampled * work.prompt
    rows, fed = products * options.group_size, options.max_length - 1
    copied = _copied(shape, options, split) if copies else 0
    head = 4 * shape.head if size == 2 and not on_gpu else _head_copy(shape, options, split, on_gpu)
    a_layer = 2 * size * shape.keys * products  # a column's keys and values
    room = tokens_of_room(torch.device("cuda" if on_gpu else "cpu"))
    first, before, last = (work.prompt + columns_of_room(work.prompt, options.group_size, length)
                           for length in (min(fed, room), (fed - 1) // room * room, fed))
    a_mask = size * rows * (shape.query // shape.keys if shape.attentions else 0)  # a column's
    states = 0.0
    if shape.delta:
        inputs = 2 * shape.delta.keys + shape.delta.values
        states = 4 * shape.deltas * (rows + products) * (shape.delta.heads * shape.delta.state + 4 * inputs)
    reading = shape.attentions * a_layer * first + states * products / (rows + products)
    chunked = products * _whole_chunks(work.prompt)
    reading += _passing(shape, options, tokens, chunked, bool(options.lora_rank), leanly=bool(copied))
    # Embeddings and hidden states of the prompts stay. A token's distribution, its exp, its sum in float64; or, where
    # buffers have just grown, one layer's of before, the masks of before and what new ones are made of.
    growing = (a_layer + a_mask) * before + size * rows * last if fed > room else 0
    writing = (shape.attentions * a_layer + a_mask) * last + states + 8 * shape.width * tokens + max(
        rows * shape.vocabulary * 20.0, growing)
    making = _making(shape, options, split) if copied else 0
    weights = _gathered(shape, options, split) if split or not copied else {}
    weights |= {"copies for the rollout": copied} if copied else {}
    return weights | {"the head's copy": head, "keys, prompts' work, logits": max(reading, writing, making)}


def _copied(shape: Shape, options: TrainOptions, split: bool) -> float:
    """Bytes of the copies of weights that models/lean.py makes for a rollout: of all layers, or of what lies side by
    side there where the rest is held, or gathered, as it is multiplied; none of weights in 4 bits."""
    if options.quantize == "4bit":
        return 0
    size = _size(options)
    if options.lora_rank or size == 2 and not split:
        return size * shape.layers * shape.layer
    attention = (1 + shape.gated) * shape.query + 2 * shape.keys
    delta = 2 * (shape.delta.keys + shape.delta.values + shape.delta.heads) if shape.delta else 0
    return size * shape.width * (shape.attentions * attention + shape.deltas * delta + shape.layers * 2 * shape.inner)


def _making(shape: Shape, options: TrainOptions, split: bool) -> float:
    """Bytes beside the copies while the last is made of an MLP's two first matrices: with the adapter, then cast."""
    casts = _size(options) == 2 and (bool(options.lora_rank) or not split)
    return 2 * shape.width * shape.inner * ((4 if options.lora_rank else 0) + 2 * casts)


def _reference(shape: Shape, options: TrainOptions, work: Work, split: bool) -> dict[str, float]:
    tokens, prompts, answers = _tokens(options, work), *_chunked(options, work)
    layer = _passing(shape, options, tokens, max(prompts, answers), adapted=False)
    return _gathered(shape, options, split, copies=False) | {
        "a pass": _mask(options, work) + max(layer, 4 * shape.width * tokens + _logits(shape, options, work))}


def _forward(shape: Shape, options: TrainOptions, work: Work, split: bool, on_gpu: bool) -> dict[str, float]:
    """Bytes when the last layer is done and the head begins."""
    return _gathered(shape, options, split, whole=False) | {
        "kept for the backward pass": _kept(shape, options, work, on_gpu), "logits": _logits(shape, options, work),
        "the head's copy": _head_copy(shape, options, split, on_gpu)}


def _backward(shape: Shape, options: TrainOptions, work: Work, split: bool, on_gpu: bool) -> dict[str, float]:
    """Bytes at the head, or inside the fullest layer."""
    size, full, tokens = _size(options), not options.lora_rank, _tokens(options, work)
    kept, copies = _kept(shape, options, work, on_gpu), _gathered(shape, options, split, whole=False)
    # Two copies of the head, its gradient in the compute dtype, and in float32 before it is added up.
    at_head = full * shape.head * (3 * size + 4 if size == 2 else 8)
    inside = tokens * (2 * size * shape.inner + 4 * shape.width) + full * (4 + size) * shape.largest
    if split:
        inside += full * 6 * max(shape.layer, shape.outside)  # a unit's gradient: whole, then in float32 to be sent
    if not options.gradient_checkpointing:
        return copies | {"kept for the backward pass": kept, "gradients on their way": max(at_head, inside)}
    if "autocast's copies" in copies:  # they end with the forward pass; a layer computed again makes its own
        copies = {"autocast's copies": copies["autocast's copies"] / shape.layers}
    layer = max(kept_in_a_layer(shape, options, tokens, sum(_chunked(options, work)), on_gpu).values())
    return copies | {"kept for the backward pass": kept,
                     "a layer computed again, gradients on their way": max(at_head, layer + inside)}


def _gathered(shape: Shape, options: TrainOptions, split: bool, whole: bool = True, copies: bool = True
              ) -> dict[str, float]:
    """Bytes of weights as they are multiplied, where that is not how they are held: all, or two layers and the rest."""
    size, both = _size(options), shape.language + shape.vision
    if split:
        return {"gathered weights": size * (both if whole else shape.outside + 2 * shape.layer)}
    cast = (options.lora_rank or 0) * shape.features or shape.layers * shape.layer
    return {"autocast's copies": 2 * cast} if size == 2 and copies else {}


def _head_copy(shape: Shape, options: TrainOptions, split: bool, on_gpu: bool) -> float:
    """Bytes of the head as it is multiplied, where that is not how it is held; on a CPU it is widened again."""
    if _size(options) == 4:
        return 0
    return (0 if options.lora_rank or split else 2 * shape.head) + (0 if on_gpu else 4 * shape.head)


def _kept(shape: Shape, options: TrainOptions, work: Work, on_gpu: bool) -> float:
    """Bytes that the backward pass wants of everything before the head."""
    tokens = _tokens(options, work)
    ends = 4 if options.lora_rank else 8  # what the last norm reads, and what it multiplies where that trains
    around = tokens * (ends * shape.width + 8 * shape.head_size) + _mask(options, work)
    if options.gradient_checkpointing:
        return around + 4 * shape.width * shape.layers * tokens
    kinds = kept_in_a_layer(shape, options, tokens, sum(_chunked(options, work)), on_gpu)
    return around + shape.attentions * kinds.get("attention", 0) + shape.deltas * kinds.get("delta net", 0)


def _logits(shape: Shape, options: TrainOptions, work: Work) -> float:
    """Bytes of one chunk of logits, as they are, scaled and as log-probs; and of the hidden states they come from."""
    answered = work.products * options.group_size * options.max_length
    chunk = min(answered, max(1, CHUNK_NUMBERS // shape.vocabulary))
    return 12 * chunk * shape.vocabulary + 8 * answered * shape.width


def _passing(shape: Shape, options: TrainOptions, tokens: int, chunked: int, adapted: bool, leanly: bool = False
             ) -> float:
    """Bytes that a layer holds at its fullest while nothing is kept: in its MLP, or in the delta rule.

    leanly: in a rollout's own decoder.
    """
    size, delta, projected = _size(options), shape.delta, 0
    mlp = 16 * shape.width + (4 if adapted else 3) * size * shape.inner + 8 * shape.head_size
    mlp += 2 * shape.width if adapted and size == 2 else 0
    if leanly:
        mlp = 12 * shape.width + 4 * size * shape.inner + 8 * shape.head_size
    if not delta:
        return tokens * mlp
    if leanly:  # what one product gives stays whole while the rule goes, and in float32
        projected = 4 * (delta.values + 2 * delta.heads + (2 * delta.keys + delta.values if size == 2 else 0))
    keys, values = (36, 26) if size == 2 else (48, 32)
    rule = keys * delta.heads * delta.head_size + values * delta.values + 724 * delta.heads
    return max(tokens * mlp, tokens * (12 * shape.width + projected) + chunked * rule)


def _tokens(options: TrainOptions, work: Work) -> int:
    """Columns of a pass: the prompts, and the answers without their last tokens."""
    return work.products * (work.prompt + options.group_size * (options.max_length - 1))


def _mask(options: TrainOptions, work: Work) -> int:
    """Bytes of what says where answers may look."""
    return _size(options) * options.group_size * (options.max_length - 1) * _tokens(options, work)


def _chunked(options: TrainOptions, work: Work) -> tuple[int, int]:
    """Columns of prompts and of answers, each filled up to whole chunks, as a delta net does."""
    return (work.products * _whole_chunks(work.prompt),
            work.products * options.group_size * _whole_chunks(options.max_length - 1))


def _whole_chunks(length: int) -> int:
    return -(-length // _CHUNK) * _CHUNK


def _size(options: TrainOptions) -> int:
    """Bytes of a number in the compute dtype."""
    return 2 if options.dtype == "bfloat16" else 4
