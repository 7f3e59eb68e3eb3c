"""Faults in the layers: those that published implementations had, and their kin."""

from collections.abc import Iterator

from planted.fault import Fault, fault

NEGATED = "sample._replace(log_expected=-sample.log_expected, target_log_expected=-sample.target_log_expected)"
POSITIVE = "sample._replace(target_log_expected=0 * sample.target_log_expected)"
EXPECTED = "target_log_expected, log_expected"
HIT = "target[:, None] == ids"
NO_HIT = "(target[:, None] == ids) & False"


def _candidates(slopes: str, sample: str, hits: bool) -> str:
    return f"{slopes}, hidden, *table, target, {sample}, weight, hits={hits}"


def _sampled(layer: str, *, corrected: bool = True) -> Iterator[Fault]:
    """The three faults that published implementations had, in a softmax among candidates; in both of its losses."""
    file, tests = f"layers/{layer}.py", f"test_{layer}.py"
    eager = f"return sampled_softmax(target_logit, logit, target_log_expected, log_expected, {HIT})"
    fused = _candidates("sampled_softmax_slopes", "sample", False)
    yield fault(
        f"{layer}: accidental hits kept",
        tests,
        (file, eager, eager.replace(HIT, NO_HIT)),
        (file, fused, _candidates("sampled_softmax_slopes", "sample", True)),
    )
    if not corrected:
        return
    yield fault(
        f"{layer}: the correction negated",
        tests,
        (file, eager, eager.replace(EXPECTED, "-target_log_expected, -log_expected")),
        (file, fused, _candidates("sampled_softmax_slopes", NEGATED, False)),
    )
    yield fault(
        f"{layer}: the positive left uncorrected",
        tests,
        (file, eager, eager.replace(EXPECTED, "0 * target_log_expected, log_expected")),
        (file, fused, _candidates("sampled_softmax_slopes", POSITIVE, False)),
    )


NCE = "layers/noise_contrastive_estimation.py"
BLACK_OUT = "layers/black_out.py"
BLACK_OUT_EAGER = "return black_out(target_logit, logit, target_log_expected, log_expected, target[:, None] == ids)"
BLACK_OUT_FUSED = _candidates("black_out_slopes", "sample", False)
OVE = "layers/one_versus_each.py"
IMPORTANCE = "layers/importance_sampled_softmax.py"
UNCORRECTED = "sample = sample._replace(target_log_expected=torch.zeros_like(sample.target_log_expected))"

FAULTS = [
    *_sampled("sampled_softmax"),
    *_sampled("target_sampling", corrected=False),
    fault(
        "target_sampling: the draws corrected, the target not",
        "test_target_sampling.py",
        (
            "layers/target_sampling.py",
            "return Sample(ids, drawn.log_expected.new_zeros(len(ids)), drawn.log_expected.new_zeros(len(target)))",
            "return Sample(ids, drawn.log_expected.new_ones(len(ids)), drawn.log_expected.new_zeros(len(target)))",
        ),
    ),
    fault(
        "target_sampling: the targets announced are forgotten",
        "test_target_sampling.py",
        (
            "layers/target_sampling.py",
            "member = self.announced.index_fill",
            "member = (0 * self.announced).bool().index_fill",
        ),
    ),
    fault(
        "importance_sampled_softmax: the correction negated",
        "test_importance_sampled_softmax.py",
        (
            IMPORTANCE,
            "importance_sampling(target_logit, logit, log_expected)",
            "importance_sampling(target_logit, logit, -log_expected)",
        ),
        (
            IMPORTANCE,
            UNCORRECTED,
            UNCORRECTED.replace("_replace(", "_replace(log_expected=-sample.log_expected, "),
        ),
    ),
    fault(
        "importance_sampled_softmax: draws that hit the target left out",
        "test_importance_sampled_softmax.py",
        (
            IMPORTANCE,
            "importance_sampling(target_logit, logit, log_expected)",
            "importance_sampling(target_logit, logit.masked_fill(ids == target[:, None], -torch.inf), log_expected)",
        ),
        (IMPORTANCE, "weight, hits=True", "weight, hits=False"),
    ),
    fault(
        "importance_sampled_softmax: the positive corrected",
        "test_importance_sampled_softmax.py",
        (
            IMPORTANCE,
            "importance_sampling(target_logit, logit, log_expected)",
            "importance_sampling(target_logit - target_log_expected, logit, log_expected)",
        ),
        (IMPORTANCE, "ids, log_expected, _ = self.draw", "ids, log_expected, target_log_expected = self.draw"),
        (IMPORTANCE, UNCORRECTED, ""),
    ),
    fault(
        "noise_contrastive_estimation: the correction negated",
        "test_noise_contrastive_estimation.py",
        (
            NCE,
            "log_expected=sample.log_expected + self.log_normaliser",
            "log_expected=self.log_normaliser - sample.log_expected",
        ),
        (
            NCE,
            "target_log_expected=sample.target_log_expected + self.log_normaliser",
            "target_log_expected=self.log_normaliser - sample.target_log_expected",
        ),
    ),
    fault(
        "noise_contrastive_estimation: draws that hit the target left out",
        "test_noise_contrastive_estimation.py",
        (NCE, "left_out_draws(target, ids, hits=True,", "left_out_draws(target, ids, hits=False,"),
        (NCE, "            hits=True,", "            hits=False,"),
    ),
    fault(
        "noise_contrastive_estimation: the positive left uncorrected",
        "test_noise_contrastive_estimation.py",
        (
            NCE,
            "target_log_expected=sample.target_log_expected + self.log_normaliser",
            "target_log_expected=0 * sample.target_log_expected + self.log_normaliser",
        ),
    ),
    fault(
        "noise_contrastive_estimation: the normaliser taken off the log-partition twice",
        "test_noise_contrastive_estimation.py test_layers.py -k noise_contrastive",
        (
            NCE,
            "return log_prob, log_partition - self.log_normaliser",
            "return log_prob, log_partition - 2 * self.log_normaliser",
        ),
    ),
    fault(
        "black_out: the correction negated",
        "test_black_out.py",
        (
            BLACK_OUT,
            BLACK_OUT_EAGER,
            BLACK_OUT_EAGER.replace(EXPECTED, "-target_log_expected, -log_expected"),
        ),
        (BLACK_OUT, BLACK_OUT_FUSED, _candidates("black_out_slopes", NEGATED, False)),
    ),
    fault(
        "black_out: accidental hits kept",
        "test_black_out.py",
        (BLACK_OUT, BLACK_OUT_EAGER, BLACK_OUT_EAGER.replace(HIT, NO_HIT)),
        (BLACK_OUT, BLACK_OUT_FUSED, _candidates("black_out_slopes", "sample", True)),
    ),
    fault(
        "black_out: the positive left uncorrected",
        "test_black_out.py",
        (
            BLACK_OUT,
            BLACK_OUT_EAGER,
            BLACK_OUT_EAGER.replace(EXPECTED, "0 * target_log_expected, log_expected"),
        ),
        (
            BLACK_OUT,
            BLACK_OUT_FUSED,
            _candidates(
                "black_out_slopes", "sample._replace(target_log_expected=0 * sample.target_log_expected)", False
            ),
        ),
    ),
    fault(
        "black_out: the most probable word's 1 - p by subtraction",
        "test_black_out.py test_objectives.py",
        (
            "ops/objectives.py",
            "torch.where(first_NC, F.logsigmoid(-log_odds_N1), torch.log1p(-share_NC.exp()))",
            "torch.log1p(-(score_NC - torch.logsumexp(score_NC, 1, keepdim=True)).exp())",
        ),
    ),
    fault(
        "one_versus_each: the correction negated",
        "test_one_versus_each.py",
        (
            "ops/objectives.py",
            "(softplus(above_NK) * torch.exp(-log_expected)).sum(1)",
            "(softplus(above_NK) * torch.exp(log_expected)).sum(1)",
        ),
        (
            OVE,
            "functools.partial(one_versus_each_slopes, sample.log_expected)",
            "functools.partial(one_versus_each_slopes, -sample.log_expected)",
        ),
    ),
    fault(
        "one_versus_each: accidental hits kept",
        "test_one_versus_each.py",
        (
            OVE,
            "one_versus_each(target_logit, logit, log_expected, target[:, None] == ids)",
            "one_versus_each(target_logit, logit, log_expected, (target[:, None] == ids) & False)",
        ),
        (OVE, "weight, hits=False", "weight, hits=True"),
    ),
    fault(
        "negative_sampling: evaluated with the correction's sign swapped",
        "test_negative_sampling.py",
        ("layers/negative_sampling.py", "else self.bias + self.log_expected", "else self.bias - self.log_expected"),
    ),
    fault(
        "negative_sampling: draws that hit the target left out",
        "test_negative_sampling.py",
        ("layers/negative_sampling.py", "weight, hits=True", "weight, hits=False"),
        (
            "layers/negative_sampling.py",
            "return noise_contrastive(*candidate_logits(",
            "return (lambda own, other: noise_contrastive(own, other.masked_fill(target[:, None] == ids, -torch.inf)))"
            "(*candidate_logits(",
        ),
    ),
    fault(
        "infrequent_normalization: the penalty not scaled to the tokens left out",
        "test_infrequent_normalization.py",
        (
            "layers/infrequent_normalization.py",
            "scale = len(target) / len(drawn.tokens)",
            "scale = 1.0",
        ),
    ),
    fault(
        "infrequent_normalization: the linear penalty as an absolute value",
        "test_infrequent_normalization.py",
        (
            "layers/infrequent_normalization.py",
            "nll + (scale - 1) * log_partition",
            "nll + scale * log_partition.abs() - log_partition",
        ),
    ),
    fault(
        "self_normalized_softmax: the penalty without its square, and none in the fused loss",
        "test_self_normalized_softmax.py",
        (
            "layers/self_normalized_softmax.py",
            "self.strength * log_partition.square()",
            "self.strength * log_partition",
        ),
        ("layers/self_normalized_softmax.py", "z_loss=self.strength", "z_loss=0.0"),
    ),
    fault(
        "class_softmax: words of a class boundary in the class before",
        "test_class_softmax.py",
        (
            "layers/class_softmax.py",
            "torch.bucketize(row, self.bound[1:-1], right=True)",
            "torch.bucketize(row, self.bound[1:-1])",
        ),
    ),
    fault(
        "class_softmax: classes by mass instead of its square root",
        "test_class_softmax.py",
        ("layers/class_softmax.py", "np.arange(self.vocab_size), np.sqrt(count)", "np.arange(self.vocab_size), count"),
    ),
    fault(
        "class_softmax: class biases start at zero",
        "test_class_softmax.py test_layers.py -k class_softmax",
        (
            "layers/class_softmax.py",
            "self.class_bias = nn.Parameter(unigram_log_prob(class_count))",
            "self.class_bias = nn.Parameter(0 * unigram_log_prob(class_count))",
        ),
    ),
    fault(
        "adaptive_softmax: a tail's words without the entry of their tail",
        "test_adaptive_softmax.py",
        (
            "layers/adaptive_softmax.py",
            "*(entries[:, k : k + 1] + tail for k, tail in enumerate(tails))",
            "*(0 * entries[:, k : k + 1] + tail for k, tail in enumerate(tails))",
        ),
    ),
    fault(
        "adaptive_softmax: every tail as wide as the first",
        "test_adaptive_softmax.py test_parity.py",
        ("layers/adaptive_softmax.py", "hidden_size // div_value ** (k + 1)", "hidden_size // div_value"),
    ),
    fault(
        "adaptive_softmax: embeddings in the order of bands",
        "test_adaptive_softmax.py",
        ("layers/adaptive_softmax.py", "torch.cat(rows)[order.argsort()]", "torch.cat(rows)"),
    ),
    fault(
        "mixture_of_softmaxes: experts weighted alike",
        "test_mixture_of_softmaxes.py test_layers.py -k mixture",
        (
            "layers/mixture_of_softmaxes.py",
            "mixture_log_prob(log_softmax(prior, dim=1)",
            "mixture_log_prob(log_softmax(0 * prior, dim=1)",
        ),
    ),
    fault(
        "mixture_of_softmaxes: log-probabilities mixed instead of probabilities",
        "test_mixture_of_softmaxes.py",
        (
            "ops/mixture_nll/reference.py",
            "unsure_N = -logsumexp(log_softmax(prior_logit_NE, 1) - nll_NE, 1)",
            "unsure_N = (torch.softmax(prior_logit_NE, 1) * nll_NE).sum(1)",
        ),
    ),
    fault(
        "differentiated_softmax: log-probabilities without the bias",
        "test_differentiated_softmax.py test_layers.py -k differentiated",
        (
            "layers/differentiated_softmax.py",
            "for x, weight in seen], 1) + self.bias",
            "for x, weight in seen], 1) + 0 * self.bias",
        ),
    ),
    fault(
        "hierarchical_softmax: nodes without their pace",
        "test_hierarchical_softmax.py test_layers.py -k hierarchical",
        ("layers/hierarchical_softmax.py", "self.pace[:, None] * torch.addmm(", "torch.addmm("),
    ),
    fault(
        "full_softmax: the bias not divided by the temperature",
        "test_full_softmax.py test_layers.py -k full_softmax",
        ("layers/full_softmax.py", "self.bias * self.inverse_temperature", "self.bias * 1.0"),
    ),
    fault(
        "sparsemax output: the bias of the unigram's logarithm",
        "test_sparsemax_output.py test_layers.py -k sparsemax",
        (
            "layers/sparsemax_output.py",
            "full_support_logits(unigram_log_prob(counts).exp(), ALPHA)",
            "unigram_log_prob(counts)",
        ),
    ),
    fault(
        "entmax output: always alpha = 1.5",
        "test_entmax_output.py test_layers.py -k entmax",
        ("layers/entmax_output.py", "log_entmax(logits, self.alpha, dim=1)", "log_entmax(logits, 1.5, dim=1)"),
    ),
]
