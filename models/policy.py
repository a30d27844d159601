"""The policy and its reference: embed a prompt once, sample a group, take a group's log-probs; what trains.

Device and dtype are handled here and in models.py, nowhere else. Weights that train are float32; with --dtype bfloat16
the matrix products run under autocast. Dropout is never active (eval mode), so sampling and update see the same
network.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from torch import Tensor, nn

from config import TrainOptions
from models import lora, shared_prefix
from models.checkpointing import checkpointed, repeated_layers
from models.decoding import PackedWriter, PlainWriter, room_for
from models.family import ModelError, Prompt, PromptParts, device_of
from models.head import Logits, compute_dtype, token_log_probs
from models.lean import LeanDecoder, lean
from models.loading import (
    DTYPES,
    choose_device,
    choose_dtype,
    family_of,
    fitting_names,
    load_minicpm,
    load_weights,
    stop_token_ids,
)
from models.memory import Copies, PassSize
from models.sampling import Drawing, Generation, write

_WORTH_SAYING = 2 ** 30 // 100  # bytes of copies


@dataclass(frozen=True)
class _Rows:
    """Embedded prompts, and perhaps what follows them: B rows, padded to one width."""

    inputs: Tensor  # (B, L, d), photos in place
    mask: Tensor  # (B, L) bool: not padding
    photo_mask: Tensor  # (B, L) bool: filled by photo features
    positions: Tensor  # (B, L), or (axes, B, L)
    last_positions: Tensor  # (B, 1), or (axes, B, 1): of each prompt's last token

    def repeated(self, group_size: int) -> "_Rows":
        """Every row group_size times."""
        return _Rows(self.inputs.repeat_interleave(group_size, 0), self.mask.repeat_interleave(group_size, 0),
                     self.photo_mask.repeat_interleave(group_size, 0),
                     self.positions.repeat_interleave(group_size, -2),
                     self.last_positions.repeat_interleave(group_size, -2))

    def followed_by(self, embedded: Tensor, offsets: Tensor) -> "_Rows":
        """Append embedded columns (B, C, d), offsets (B, C) tokens behind the first one after the prompt."""
        columns = embedded.shape[1]
        return _Rows(torch.cat([self.inputs, embedded.to(self.inputs.dtype)], 1),
                     nn.functional.pad(self.mask, (0, columns), value=True),
                     nn.functional.pad(self.photo_mask, (0, columns)),
                     torch.cat([self.positions, self.last_positions + 1 + offsets], -1), self.last_positions)


class Root(nn.Module):
    """Does work inside one forward call, whatever parts of the model the work uses: weights that are split over
    processes are gathered and given back around it (sharding.py)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, work: Callable[..., Any], *args: Any) -> Any:
        """Do the work."""
        return work(*args)


class Policy:
    """A model with its tokenizer and image processor, behind the operations that GRPO needs."""

    def __init__(self, model: nn.Module, tokenizer: Any, image_processor: Any, dtype: torch.dtype = torch.float32,
                 max_slice_nums: int | None = None, max_pixels: int | None = None, exact_path: bool = False,
                 gradient_checkpointing: bool = False, root: Root | None = None):
        self.model = model.eval()
        self.root = root or Root(model)  # one that is there already has its weights split
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.family = family_of(model.config.model_type)
        self.family.check_bounds(model, image_processor, max_slice_nums, max_pixels)
        self.family.make_lean(model)
        self.dtype = dtype
        self.max_slice_nums = max_slice_nums
        self.max_pixels = max_pixels
        self.device = device_of(model)
        self._language_model = self.family.language_model(model)
        self._head = self.family.head(model)
        self._embed_tokens = self._language_model.get_input_embeddings()
        self.exact_path = exact_path
        if not exact_path:
            shared_prefix.install(self._language_model)
        self.gradient_checkpointing = gradient_checkpointing
        self._banned = torch.tensor(self.family.never_sampled(model, tokenizer), device=self.device)
        self.stop_ids = torch.tensor(stop_token_ids(model, tokenizer), device=self.device)
        self.adapter: Any = None  # peft's wrapper around the model, when low-rank adapters are in it
        self.adapter_name: str | None = lora.TRAINED  # the one that works here; None: the base alone
        self.sampled_together = PassSize()
        self.copies = Copies()

    @property
    def rounds(self) -> bool:
        """Whether products of matrices are rounded more coarsely than float32 is: in bfloat16, or in a GPU's TF32."""
        return self.dtype != torch.float32 or torch.get_float32_matmul_precision() != "highest"

    def add_adapter(self, rank: int, alpha: int | None, base_path: str) -> None:
        """Put a new adapter on every linear layer of the language model; alpha None: 2 * rank."""
        self.adapter = lora.add_adapter(self.model, self.family.lora_targets(self.model), rank, alpha or 2 * rank,
                                        base_path)

    def without_adapter(self) -> "Policy":
        """The same model as it is with the adapter switched off: the base, no second copy."""
        base = copy.copy(self)
        base.adapter_name = None
        return base

    def with_reference_adapter(self) -> "Policy":
        """The same model with another adapter in place of the one that trains, where move_towards() puts it."""
        lora.add_reference(self.adapter)
        other = copy.copy(self)
        other.adapter_name = lora.REFERENCE
        return other

    def load_weights(self, path: str) -> None:
        """Take on a checkpoint: its adapter, put on this model, or its weights; raises ModelError when none fits."""
        if lora.is_adapter(path):
            self.adapter = lora.load_adapter(self.model, path)
        else:
            load_weights(self.model, path)

    @torch.no_grad()
    def move_towards(self, other: "Policy", mix: float) -> None:
        """Move every weight, or every one of the adapter, towards that of another policy of the same model:
        (1 - mix) * own + mix * other."""
        for own, its in zip(self.own_weights(), other.own_weights(), strict=True):
            own.copy_((1 - mix) * own.to(its.dtype) + mix * its)

    def own_weights(self) -> list[Tensor]:
        """What tells this policy from others of the same model: its adapter, or every weight; of what is split, this
        process's share."""
        state = self.model.state_dict()  # gives back, unlike parameters(), what a pass has left gathered
        return [state[name] for name, _ in self.model.named_parameters()
                if self.adapter is None or lora.part_of(name, self.adapter_name)]

    def check_weights(self, path: str) -> None:
        """Refuse a checkpoint that load_weights would not take, reading no tensor of it; raises ModelError."""
        if lora.is_adapter(path):
            lora.check_adapter(self.model, path)
        else:
            fitting_names(self.model, path)

    def merge_adapter(self) -> None:
        """Add the adapter to the model's weights, for good."""
        lora.merge_adapter(self.adapter)
        self.adapter = None

    def save(self, model_path: str, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write the model as a folder that loads by itself, or the adapter alone where there is one; the processor too.

        model_path: the model that this one came from. weights: the whole ones, where this process has only a share.
        """
        if self.adapter is None:
            self.family.save(self.model, self.tokenizer, self.image_processor, model_path, folder, weights)
        else:
            lora.save_adapter(self.adapter, folder, weights)
            self.family.save_processor(self.tokenizer, self.image_processor, model_path, folder)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """The compute dtype, and the adapter on or off."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            with nullcontext() if self.adapter is None else lora.active(self.adapter, self.adapter_name):
                yield

    def encode_prompt(self, text: str, photos: Sequence[Any]) -> Prompt:
        """Prepare a prompt text and its photos (CPU tensors)."""
        return self.prompt_parts().encode_prompt(text, photos)

    def prompt_parts(self) -> PromptParts:
        """What prompts are made with: all that a process needs to prepare them."""
        return PromptParts(self.family, self.tokenizer, self.image_processor, self.max_slice_nums, self.max_pixels)

    def photo_features(self, prompts: Sequence[Prompt]) -> list[Tensor | None]:
        """Encode the photos of some prompts: per prompt (photo tokens, width), or None without photos."""
        with self.computing():
            return self.root(self.family.photo_features, self.model, prompts)

    def sample(self, prompts: Sequence[Prompt], features: Sequence[Tensor | None], uniforms: Tensor,
               temperature: float | None) -> Generation:
        """Sample G answers a prompt from one prefill, top_p 1, top_k 0, no repetition penalty.

        uniforms: (B * G, T) float64 in [0, 1), one number a token: the whole randomness. A product's answers depend
        on the products beside it and on the device by rounding alone. In float32 that hardly ever decides a token; in
        bfloat16 it does in one of a few hundred. temperature None answers greedily.
        """
        def work() -> Generation:
            with torch.no_grad(), self.computing():
                return self.root(self._sample, prompts, features, uniforms.to(self.device), temperature)

        try:
            return work()
        except torch.OutOfMemoryError:
            if len(prompts) > 1 or not self.copies.taken:
                raise
        # Outside of the except block: the error holds on to what the pass had computed.
        self.copies.wanted = False
        logger.warning("out of memory while answers to one product were written: without copies of the language "
                       "model's weights from now on, which is slower")
        return work()

    def _sample(self, prompts: Sequence[Prompt], features: Sequence[Tensor | None], uniforms: Tensor,
                temperature: float | None) -> Generation:
        group_size, length = len(uniforms) // len(prompts), uniforms.shape[1]
        prefix = self._embed(prompts, features)
        dtype = compute_dtype(prefix.inputs)
        head = Logits(self._head.weight, dtype, few_rows=not self.exact_path)
        drawing = Drawing(head, uniforms, temperature, self._banned, self.stop_ids)
        if self.exact_path:
            writer = self._begin_plain(prefix, features, group_size)
            return write(writer, drawing, self._embed_ids, len(prompts), length, steady=False)
        leanly = lean(self._language_model, dtype, prefix.inputs.dtype) if self.copies.wanted else nullcontext()
        with leanly as decoder:
            self._note_copies(decoder)
            layout = shared_prefix.lay_out_prompts([len(prompt.input_ids) for prompt in prompts], self.device,
                                                   room_for(prefix.inputs.shape[1], group_size, length, self.device))
            hidden = self._forward(prefix, features, layout=layout).last_hidden_state.flatten(0, 1)
            writer = PackedWriter(decoder or self._decode, layout, hidden.index_select(0, layout.predictors),
                                  prefix.last_positions, group_size, length)
            return write(writer, drawing, self._embed_ids, len(prompts), length, steady=decoder is not None)

    def _note_copies(self, decoder: LeanDecoder | None) -> None:
        self.copies.taken = decoder.copied if decoder else 0
        if self.copies.taken >= _WORTH_SAYING and not self.copies.said:
            logger.info(f"while answers are written, copies of the language model's weights in {self.dtype} take "
                        f"{self.copies.taken / 2 ** 30:.2f} GiB")
            self.copies.said = True

    def _begin_plain(self, prefix: _Rows, features: Sequence[Tensor | None], group_size: int) -> PlainWriter:
        """Run the prompts through the model once, into transformers' own cache."""
        out = self._forward(prefix, features, use_cache=True)
        cache, columns = out.past_key_values, prefix.mask.shape[1]
        if cache is None or cache.get_seq_length() != columns:
            raise ModelError(f"{type(self._language_model).__name__} returned no cache of the prompt's length")
        return PlainWriter(self._language_model, cache, out.last_hidden_state[:, -1], prefix.last_positions,
                           prefix.mask, group_size)

    def _decode(self, embedded: Tensor, positions: Tensor, layout: Any) -> Tensor:
        """Run new tokens through the language model as transformers wrote it: hidden states (n, 1, d)."""
        mask = embedded.new_zeros(1, 1, 1, 1)  # as in _forward
        return self._language_model(inputs_embeds=embedded, attention_mask=mask, position_ids=positions,
                                    use_cache=False, layout=layout).last_hidden_state

    def log_probs(self, prompts: Sequence[Prompt], completions: Tensor, action_mask: Tensor, temperature: float,
                  features: Sequence[Tensor | None] | None = None, exact_path: bool | None = None,
                  with_entropy: bool = True) -> tuple[Tensor, Tensor]:
        """Take answers' log-probs: of the tokens taken, and the entropy at each token.

        completions, action_mask: (B * G, T), G rows a prompt in order. Returns two (B * G, T) float32, 0 where masked.
        features: reuse encoded photos; None encodes them here, with gradient where the vision trains.
        exact_path: a row an answer instead of a row a group; None does as the policy was told. with_entropy False
        leaves the entropy 0.
        """
        rows = self._plain_rows if (self.exact_path if exact_path is None else exact_path) else self._shared_rows
        layers = repeated_layers(self.model) if self.gradient_checkpointing else []
        with self.computing(), checkpointed(layers):
            return self.root(self._log_probs, rows, prompts, completions, action_mask, temperature, features,
                             with_entropy)

    def _log_probs(self, rows: Callable[..., Tensor], prompts: Sequence[Prompt], completions: Tensor,
                   action_mask: Tensor, temperature: float, features: Sequence[Tensor | None] | None,
                   with_entropy: bool) -> tuple[Tensor, Tensor]:
        if features is None:
            features = self.family.photo_features(self.model, prompts)
        hidden = rows(prompts, features, completions, action_mask)  # (tokens, d)
        taken, entropy = token_log_probs(self._head, hidden, completions[action_mask], temperature, self._banned,
                                      with_entropy)
        zeros = torch.zeros(action_mask.shape, device=self.device)
        return zeros.masked_scatter(action_mask, taken), zeros.masked_scatter(action_mask, entropy)

    def _shared_rows(self, prompts: Sequence[Prompt], features: Sequence[Tensor | None], completions: Tensor,
                     action_mask: Tensor) -> Tensor:
        """Hidden states that predict the answers' tokens, (tokens, d): a row a group, the prompt computed once."""
        layout = shared_prefix.lay_out_groups([len(prompt.input_ids) for prompt in prompts], action_mask, self.dtype)
        rows = self._embed(prompts, features)
        if layout.answers is not None:
            rows = rows.followed_by(self._embed_ids(completions.flatten()[layout.answers.tokens]),
                                    layout.answers.offsets)
        hidden = self._forward(rows, features, layout=layout).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, layout.predictors)

    def _plain_rows(self, prompts: Sequence[Prompt], features: Sequence[Tensor | None], completions: Tensor,
                    action_mask: Tensor) -> Tensor:
        """The slow twin of _shared_rows: a row an answer, the prompt computed for each."""
        group_size, columns = len(completions) // len(prompts), completions.shape[1]
        prefix = self._embed(prompts, features, left=True).repeated(group_size)
        # Behind a stop token nothing is read: no token sees it, and the log-probs there are left out.
        rows = prefix.followed_by(self._embed_ids(completions),
                                  torch.arange(columns, device=self.device).expand(len(completions), -1))
        hidden = self._forward(rows, [photo for photo in features for _ in range(group_size)]).last_hidden_state
        return hidden[:, -columns - 1:-1][action_mask]  # the prompt's last token predicts the first

    def _embed_ids(self, ids: Tensor) -> Tensor:
        """Embed tokens: (.., d).

        In bfloat16 they are rounded to it, as autocast rounds other matrices, and what the layers add up to them stays
        in float32, whatever dtype the weights are held in: policy and reference compute alike.
        """
        embedded = self._embed_tokens(ids)
        return embedded.bfloat16().float() if self.dtype == torch.bfloat16 else embedded

    def _embed(self, prompts: Sequence[Prompt], features: Sequence[Tensor | None], left: bool | None = None) -> _Rows:
        """Embed prompts, photos in place; left: padded there, as plain rows are."""
        left = self.exact_path if left is None else left
        longest = max(len(prompt.input_ids) for prompt in prompts)
        inputs, positions, last_positions = [], [], []
        mask, photo_mask = (torch.zeros(len(prompts), longest, dtype=torch.bool) for _ in range(2))
        for index, (prompt, photo) in enumerate(zip(prompts, features, strict=True)):
            length = len(prompt.input_ids)
            start = longest - length if left else 0
            padding = (start, longest - length - start)
            row = self._embed_ids(prompt.input_ids.to(self.device))  # (P_i, d)
            if photo is not None:
                at = self.family.photo_positions(self.model, prompt)  # (P_i,)
                if int(at.sum()) != len(photo):  # masked_scatter would drop the rest without a word
                    raise ModelError(f"the prompt has room for {int(at.sum())} photo tokens, the vision gave "
                                     f"{len(photo)}")
                row = row.masked_scatter(at.to(self.device)[:, None], photo[:, :row.shape[1]].to(row.dtype))
                photo_mask[index, start:start + length] = at
            inputs.append(nn.functional.pad(row, (0, 0, *padding)))
            mask[index, start:start + length] = True
            counted = self.family.positions(self.model, prompt)  # (P_i,), or (axes, P_i)
            positions.append(nn.functional.pad(counted, padding))
            last_positions.append(counted[..., -1:])
        return _Rows(torch.stack(inputs), mask.to(self.device), photo_mask.to(self.device),
                     torch.stack(positions, -2).to(self.device), torch.stack(last_positions, -2).to(self.device))

    def _forward(self, rows: _Rows, features: Sequence[Tensor | None], use_cache: bool = False,
                 layout: shared_prefix.Layout | None = None) -> Any:
        """Run the language model on rows that begin with prompts; features: one entry a row."""
        arguments = self.family.decoder_arguments(self.model, features, rows.photo_mask)
        if layout is None:
            mask = None if bool(rows.mask.all()) else rows.mask  # without padding kernels take their fast causal path
        else:
            arguments["layout"] = layout
            mask = rows.inputs.new_zeros(1, 1, 1, 1)  # four axes: transformers builds no mask; the layout masks
        return self._language_model(inputs_embeds=rows.inputs, attention_mask=mask, position_ids=rows.positions,
                                    use_cache=use_cache, **arguments)

    def answers(self, completions: Tensor, action_mask: Tensor) -> list[str]:
        """Decode answers for people and for the reward; the ids themselves are never made from these strings."""
        return [self.tokenizer.decode(row[mask], skip_special_tokens=True)
                for row, mask in zip(completions.cpu(), action_mask.cpu(), strict=True)]


def load_policy(model_path: str, options: TrainOptions, device: str, trust_remote_code: bool,
                at_birth: Callable[[nn.Module], Root | None] | None = None, trains: bool = True) -> Policy:
    """Load a model as a run with these options does, before any of the run's own weights or adapter.

    Under an adapter the frozen base is held in the compute dtype, or in 4 bits; weights that train are float32.
    at_birth: done to the model before its weights are read, see family.AtBirth; gives its root where it splits it.
    trains False: never, so nothing is checkpointed.
    """
    target, roots = choose_device(device), []
    dtype = DTYPES[choose_dtype(options.dtype, target)]
    model, tokenizer, image_processor = load_minicpm(
        model_path, dtype if options.lora_rank else torch.float32, trust_remote_code, options.quantize,
        at_birth and (lambda model: roots.append(at_birth(model))))
    if options.offload and roots:  # what is split waits on the host, and is computed with on the GPU
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(target))
    else:
        model.to(target)
    return Policy(model, tokenizer, image_processor, dtype, options.max_slice_nums,
                  options.max_pixels, options.exact_path, options.gradient_checkpointing and trains, *roots)
