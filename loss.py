"""All the maths of GRPO, on plain tensors: masked means, group advantages, the KL estimate, the clipped loss.

Shapes: N answers (all groups of a batch), T completion tokens, G candidates of one product.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from replay_buffer import Experience

LOG_RATIO_LIMIT = 20.0  # exp(20) is finite in float32; beyond it a ratio says nothing but "far away"


def masked_mean(values: Tensor, mask: Tensor | None, dim: int | None = None) -> Tensor:
    """Average over the masked-in entries; 0 where there are none. Masked-out values may be anything, even NaN."""
    if mask is None:
        return values.mean() if dim is None else values.mean(dim)
    kept = torch.where(mask, values, 0.0)
    if dim is None:
        return kept.sum() / mask.sum().clamp(min=1)
    return kept.sum(dim) / mask.sum(dim).clamp(min=1)


def group_advantages(rewards: Tensor, eps: float = 1e-8, std_floor: float = 0.0, scale: str = "group",
                     batch_rewards: Tensor | None = None) -> Tensor:
    """Turn one group's rewards (G,) into advantages (G,): (r - mean) / (max(std, std_floor) + eps).

    The standard deviation is the sample's (G - 1), as in the usual trainers. A group of one gets 0, and so does a group
    without spread. scale "group": the mean and deviation are the group's (DeepSeekMath, arXiv 2402.03300, eq. 21);
    "batch": the mean is the group's, the deviation that of batch_rewards (arXiv 2508.08221); "none": the mean is only
    subtracted (Dr. GRPO, arXiv 2503.20783).
    """
    rewards = rewards.float()
    centred = rewards - rewards.mean()
    if len(rewards) < 2:
        return torch.zeros_like(rewards)
    if rewards.max() == rewards.min():  # rounding of the mean must not be blown up by 1 / eps
        return torch.zeros_like(rewards)
    if scale == "none":
        return centred
    spread = (batch_rewards if scale == "batch" else rewards).float().std()
    return centred / (spread.clamp(min=std_floor) + eps)


def approx_kl_divergence(log_probs: Tensor, log_probs_ref: Tensor, action_mask: Tensor | None = None) -> Tensor:
    """Estimate KL(policy || reference) per token: exp(ref - new) - (ref - new) - 1, never negative; 0 where masked.

    The k3 estimator, http://joschu.net/blog/kl-approx.html
    """
    log_ratio = log_probs_ref.float() - log_probs.float()
    if action_mask is not None:
        log_ratio = torch.where(action_mask, log_ratio, 0.0)
    log_ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return log_ratio.exp() - log_ratio - 1


@dataclass(frozen=True)
class LossTerms:
    """The loss of a batch and what it is made of, means over real tokens; the first two have a gradient."""

    total_loss: Tensor
    kl_divergence: Tensor  # 0 without ref_log_probs
    ratio: Tensor
    clip_fraction: Tensor
    entropy: Tensor


class VLM_GRPOLoss(nn.Module):  # the public name of the loss
    """Clipped policy-gradient loss with a KL term towards the reference policy.

    Per token: -min(ratio * A, clip(ratio, 1 - clip_eps, 1 + clip_eps_high) * A) + kl_weight * kl
    - entropy_weight * entropy, then loss_type "grpo": masked mean over an answer's tokens, mean over answers
    (arXiv 2402.03300); "dapo": mean over all tokens (arXiv 2503.14476); "dr_grpo": sum / (answers * max_length)
    (arXiv 2503.20783).
    entropy: that of the next token, a bonus against answers that are all alike (arXiv 1602.01783).
    ratio_level "token": ratio = pi / pi_old of each token; "sequence": of each token the geometric mean over its answer
    (GSPO, arXiv 2507.18071, eq. 5 and 7).
    clip_ratio_c: for A < 0 the first term is -clip_ratio_c * A at most, which else grows with the ratio without bound
    (dual clip, arXiv 1912.09729); None: no such bound.
    Answers that are taught have no part in all that: sft_weight * supervised() is added.
    """

    def __init__(self, clip_eps: float, kl_weight: float, clip_eps_high: float | None = None, loss_type: str = "grpo",
                 max_length: int | None = None, mask_truncated: bool = False, ratio_level: str = "token",
                 clip_ratio_c: float | None = None, entropy_weight: float = 0.0, sft_weight: float = 0.0):
        super().__init__()
        if loss_type not in ("grpo", "dapo", "dr_grpo"):
            raise ValueError(f"loss_type {loss_type!r}: take grpo, dapo or dr_grpo")
        if ratio_level not in ("token", "sequence"):
            raise ValueError(f"ratio_level {ratio_level!r}: take token or sequence")
        if loss_type == "dr_grpo" and not max_length:
            raise ValueError("loss_type dr_grpo divides by max_length: give it")
        self.clip_eps = clip_eps
        self.clip_eps_high = clip_eps if clip_eps_high is None else clip_eps_high
        self.kl_weight = kl_weight
        self.loss_type = loss_type
        self.max_length = max_length
        self.mask_truncated = mask_truncated
        self.ratio_level = ratio_level
        self.clip_ratio_c = math.inf if clip_ratio_c is None else clip_ratio_c
        self.entropy_weight = entropy_weight
        self.sft_weight = sft_weight

    def mask(self, experience: Experience) -> Tensor:
        """The sampled tokens that count, (N, T) bool: without truncated answers if they are left out."""
        mask = experience.action_mask
        if experience.taught is not None:
            mask = mask & ~experience.taught[:, None]
        if not self.mask_truncated or experience.truncated is None:
            return mask
        return mask & ~experience.truncated[:, None]

    def taught_mask(self, experience: Experience) -> Tensor:
        """The tokens of answers that are taught, (N, T) bool."""
        if experience.taught is None:
            return torch.zeros_like(experience.action_mask)
        return experience.action_mask & experience.taught[:, None]

    def supervised(self, log_probs: Tensor, experience: Experience) -> Tensor:
        """The supervised loss: the mean of -log_probs (N, T) over the tokens of answers that are taught."""
        return masked_mean(-log_probs.float(), self.taught_mask(experience))

    def size(self, experience: Experience) -> Tensor:
        """What the loss is a mean over: answers, or tokens for dapo. Weighs micro-batches of one minibatch."""
        mask = self.mask(experience)
        return mask.sum() if self.loss_type == "dapo" else mask.any(1).sum()

    def ratio(self, log_probs: Tensor, experience: Experience) -> Tensor:
        """The importance ratio of each token, or of its whole answer, (N, T); 1 or the answer's where masked."""
        mask = self.mask(experience)
        log_ratio = torch.where(mask, log_probs.float() - experience.old_log_probs.float(), 0.0)  # (N, T)
        if self.ratio_level == "sequence":
            log_ratio = masked_mean(log_ratio, mask, dim=1)[:, None].expand_as(log_ratio)
        return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()

    def mean_ratio(self, log_probs: Tensor, experience: Experience) -> Tensor:
        """The mean ratio of the tokens that count."""
        return masked_mean(self.ratio(log_probs, experience), self.mask(experience))

    def forward(self, log_probs: Tensor, experience: Experience) -> tuple[Tensor, Tensor]:
        """Return (loss, mean kl over real tokens), the kl 0 without ref_log_probs. log_probs: (N, T) with gradient."""
        terms = self.terms(log_probs, experience)
        return terms.total_loss, terms.kl_divergence

    def terms(self, log_probs: Tensor, experience: Experience, entropy: Tensor | None = None) -> LossTerms:
        """Return the loss with what it is made of.

        log_probs: (N, T) with gradient. entropy: (N, T), with gradient where entropy_weight is not 0, and then not
        to be left out; else only averaged, and -log_probs stands in, of the same mean for tokens the policy sampled.
        """
        if self.entropy_weight and entropy is None:
            raise ValueError("entropy_weight needs the entropy of each token: give it")
        mask = self.mask(experience)
        log_probs = torch.where(mask, log_probs.float(), 0.0)
        advantages = experience.advantages.float().reshape(-1, 1)  # (N, 1)

        ratio = self.ratio(log_probs, experience)  # (N, T)
        clipped = ratio.clamp(1 - self.clip_eps, 1 + self.clip_eps_high)
        surrogate = torch.min(ratio * advantages, clipped * advantages)  # (N, T)
        if self.clip_ratio_c < math.inf:
            floor = self.clip_ratio_c * advantages
            surrogate = torch.where(advantages < 0, torch.max(surrogate, floor), surrogate)
        per_token = -surrogate
        mean_kl = log_probs.new_zeros(())
        if experience.ref_log_probs is not None:
            kl = approx_kl_divergence(log_probs, experience.ref_log_probs, mask)  # (N, T)
            per_token = per_token + self.kl_weight * kl
            mean_kl = masked_mean(kl, mask)
        if self.entropy_weight:
            per_token = per_token - self.entropy_weight * entropy
        with torch.no_grad():
            bound = ((ratio > 1 + self.clip_eps_high) & (advantages > 0)) | \
                    (((ratio < 1 - self.clip_eps) | (ratio > self.clip_ratio_c)) & (advantages < 0))
            means = [masked_mean(values, mask)
                     for values in (ratio, bound.float(), -log_probs if entropy is None else entropy)]
        return LossTerms(self._mean(per_token, mask), mean_kl, *means)

    def _mean(self, per_token: Tensor, mask: Tensor) -> Tensor:
        if self.loss_type == "dapo":
            return masked_mean(per_token, mask)
        answers = mask.any(1)  # (N,)
        if self.loss_type == "dr_grpo":
            sums = torch.where(mask, per_token, 0.0).sum(1)
            return masked_mean(sums, answers) / self.max_length
        return masked_mean(masked_mean(per_token, mask, dim=1), answers)
