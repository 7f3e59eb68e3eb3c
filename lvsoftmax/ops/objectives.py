"""Training objectives that look at few words, from their logits.

Letters: N tokens, D hidden, V words, K drawn words. What belongs to the drawn words is ``[K]`` where all tokens share
them and ``[N, K]`` where a token has its own. Values are in nats, in float32 at least.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lvsoftmax.ops.gather_dot import gather_dot
from lvsoftmax.ops.numerics import softplus, upcast


def candidate_rows(
    weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor, ids_K: Tensor, *, sparse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Look up the ``N + K`` rows of the table that the targets and the drawn words need.

    Args:
        weight_VD: the table.
        bias_V: one number per word, or None for zeros.
        target_N: each token's word.
        ids_K: drawn words, shared by the tokens.
        sparse: whether the gradients of table and bias are row-sparse (COO).

    Returns:
        The targets' rows ``[N, D]``, the drawn words' rows ``[K, D]``, and their biases ``[N]`` and ``[K]``.
    """
    ids = torch.cat([target_N, ids_K])
    size = [len(target_N), len(ids_K)]
    target_row_ND, row_KD = F.embedding(ids, weight_VD, sparse=sparse).split(size)
    bias = weight_VD.new_zeros(len(ids)) if bias_V is None else bias_V.gather(0, ids, sparse_grad=sparse)
    target_bias_N, bias_K = bias.split(size)
    return target_row_ND, row_KD, target_bias_N, bias_K


def candidate_logits(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_N: Tensor, ids: Tensor, *, sparse: bool
) -> tuple[Tensor, Tensor]:
    """Return the logits ``[N]`` of the targets and ``[N, K]`` of the drawn words.

    Words shared by the tokens come from ``candidate_rows`` and one matrix product, words that are a token's own from
    ``gather_dot``.
    """
    if ids.ndim == 2:
        logit_NC = gather_dot(hidden_ND, weight_VD, bias_V, torch.cat([target_N[:, None], ids], 1), sparse=sparse)
        return logit_NC[:, 0], logit_NC[:, 1:]
    rows = candidate_rows(weight_VD, bias_V, target_N, ids, sparse=sparse)
    target_row_ND, row_KD, target_bias_N, bias_K = rows
    return upcast(hidden_ND * target_row_ND).sum(1) + target_bias_N, upcast(hidden_ND @ row_KD.T) + bias_K


def left_out_draws(target_N: Tensor, ids: Tensor, *, hits: bool, own: bool) -> tuple[Tensor, Tensor] | None:
    """Return which draws a token does not see: where its key, ``[N]``, equals that of the draw, shaped as ``ids``.

    Args:
        target_N: each token's word.
        ids: drawn words.
        hits: whether a token sees draws of its own target.
        own: whether the draws are the targets themselves; then draw ``n`` is none for token ``n``.
    """
    if not hits:
        return target_N, ids
    if own:
        position_N = torch.arange(len(target_N), device=target_N.device)
        return position_N, position_N
    return None


def leave_out(logit_NK: Tensor, keys: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return the logits, -inf where ``left_out_draws`` says that a token does not see the draw."""
    return logit_NK if keys is None else logit_NK.masked_fill(keys[0][:, None] == keys[1], -torch.inf)


def sampled_softmax(
    target_logit_N: Tensor, logit_NK: Tensor, target_log_expected_N: Tensor, log_expected: Tensor, hit_NK: Tensor
) -> Tensor:
    """Return the cross-entropy of each target among itself and the drawn words, their logits corrected.

    ``-log( exp(s_t - l_t) / (exp(s_t - l_t) + sum_{k: not hit} exp(s_k - l_k)) )`` with ``l`` the log expected count:
    Jean et al. 2015, section 3 (there ``l = log q``), and TensorFlow's ``sampled_softmax_loss``.

    Computed as ``log(1 + exp(d))``, so that value and gradient keep their digits as the target's share goes to one.

    Args:
        target_logit_N: ``s_t``.
        logit_NK: ``s_k``.
        target_log_expected_N: ``l_t``.
        log_expected: ``l_k``.
        hit_NK: where a drawn word is the token's own target, and is left out.
    """
    corrected_NK = (upcast(logit_NK) - log_expected).masked_fill(hit_NK, -torch.inf)
    others_N = torch.logsumexp(corrected_NK, 1)
    return -F.logsigmoid(upcast(target_logit_N) - target_log_expected_N - others_N)


def importance_sampling(target_logit_N: Tensor, logit_NK: Tensor, log_expected: Tensor) -> Tensor:
    """Return ``-s_t + log sum_k exp(s_k) / (K q_k)``, the log-partition estimated by importance sampling.

    Its gradient is the self-normalised estimator of Bengio & Senecal 2003: ``-ds_t + sum_k w_k ds_k / sum_k w_k`` with
    ``w_k = exp(s_k) / q_k``. The target is not in the sum: the value may be negative.

    Args:
        target_logit_N: ``s_t``.
        logit_NK: ``s_k`` of K independent draws.
        log_expected: ``log(K q_k)``.
    """
    return torch.logsumexp(upcast(logit_NK) - log_expected, 1) - upcast(target_logit_N)


def noise_contrastive(target_logit_N: Tensor, logit_NK: Tensor) -> Tensor:
    """Return ``-log sigmoid(t) - sum_k log sigmoid(-s_k)``: telling the target from the drawn words, one by one.

    With ``t`` and ``s`` the logits less the log expected counts this is noise-contrastive estimation (Mnih & Teh 2012,
    equation 8), with the plain logits negative sampling (Mikolov et al. 2013, equation 4). Draws that hit the
    target are noise like any other.

    Args:
        target_logit_N: ``t``.
        logit_NK: ``s_k``.
    """
    return softplus(-upcast(target_logit_N)) + softplus(upcast(logit_NK)).sum(1)


def black_out(
    target_logit_N: Tensor, logit_NK: Tensor, target_log_expected_N: Tensor, log_expected: Tensor, hit_NK: Tensor
) -> Tensor:
    """Return ``-log p_t - sum_{k: not hit} log(1 - p_k)`` with ``p`` the softmax of the corrected logits.

    Ji et al. 2016, equation 6. The softmax runs over the target and the draws that do not hit it. Only the most
    probable of them can have ``p`` above a half; its ``1 - p`` is what the others have, and is summed from them.

    The arguments are those of ``sampled_softmax``.
    """
    own_N = upcast(target_logit_N) - target_log_expected_N
    other_NK = (upcast(logit_NK) - log_expected).masked_fill(hit_NK, -torch.inf)
    score_NC = torch.cat([own_N[:, None], other_NK], 1)
    first_NC = torch.zeros_like(score_NC, dtype=torch.bool).scatter(1, score_NC.argmax(1, keepdim=True), True)
    rest_NC = score_NC.masked_fill(first_NC, -torch.inf)
    log_odds_N1 = score_NC.amax(1, keepdim=True) - torch.logsumexp(rest_NC, 1, keepdim=True)
    share_NC = rest_NC - torch.logsumexp(score_NC, 1, keepdim=True)
    log_p_N = torch.where(first_NC[:, 0], F.logsigmoid(log_odds_N1[:, 0]), share_NC[:, 0])
    log_others_NC = torch.where(first_NC, F.logsigmoid(-log_odds_N1), torch.log1p(-share_NC.exp()))
    return -log_p_N - log_others_NC[:, 1:].sum(1)


def one_versus_each(target_logit_N: Tensor, logit_NK: Tensor, log_expected: Tensor, hit_NK: Tensor) -> Tensor:
    """Return ``-sum_{k: not hit} log sigmoid(t - s_k) / exp(log_expected_k)``.

    Over independent draws its mean is ``-sum_{w != target} log sigmoid(t - s_w)``, Titsias 2016, equation 5: a bound on
    the negative log-likelihood from above.

    Args:
        target_logit_N: ``t``.
        logit_NK: ``s_k``.
        log_expected: of the drawn words.
        hit_NK: where a drawn word is the token's own target, and is left out.
    """
    above_NK = (upcast(logit_NK) - upcast(target_logit_N)[:, None]).masked_fill(hit_NK, -torch.inf)
    return (softplus(above_NK) * torch.exp(-log_expected)).sum(1)


def log_weight_sums(logit_NK: Tensor, log_expected: Tensor) -> Tensor:
    """Return ``[2, N]``: the logs of the sums of ``w_k = exp(s_k - log_expected_k)`` and of ``w_k^2``.

    The sums of two blocks of draws are joined by ``logaddexp``.
    """
    log_weight_NK = upcast(logit_NK) - log_expected
    return torch.stack([torch.logsumexp(log_weight_NK, 1), torch.logsumexp(2 * log_weight_NK, 1)])


def effective_sample_size(log_sums_2N: Tensor) -> Tensor:
    """Return ``(sum_k w_k)^2 / sum_k w_k^2`` of each token, between 1 and K.

    Kong 1992; Bengio & Senecal 2003 decide by it how many words to draw.

    Args:
        log_sums_2N: logs of the two sums, as ``log_weight_sums`` returns them.
    """
    return (2 * log_sums_2N[0] - log_sums_2N[1]).exp()
