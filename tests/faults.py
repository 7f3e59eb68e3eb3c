"""Faults to plant in the package, each of which some test must notice: `python tests/faults.py [words of a title]`.

Every fault is put into a private copy of the repository, alone, and the tests named beside it are run there until the
first one fails. What is printed is a table: the fault, and the test that noticed it. The status is 1 if one went
unnoticed. `tests/test_faults.py` keeps the faults from outliving the lines that they change.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Fault:
    """A change of the package's text.

    Attributes:
        title: what is wrong with it.
        edits: file below ``lvsoftmax``, what stands there once, and what comes in its place.
        tests: files below ``tests``, and pytest's options.
    """

    title: str
    edits: tuple[tuple[str, str, str], ...]
    tests: tuple[str, ...]


def _fault(title: str, tests: str, *edits: tuple[str, str, str]) -> Fault:
    return Fault(title, edits, tuple(tests.split()))


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
    yield _fault(
        f"{layer}: accidental hits kept",
        tests,
        (file, eager, eager.replace(HIT, NO_HIT)),
        (file, fused, _candidates("sampled_softmax_slopes", "sample", True)),
    )
    if not corrected:
        return
    yield _fault(
        f"{layer}: the correction negated",
        tests,
        (file, eager, eager.replace(EXPECTED, "-target_log_expected, -log_expected")),
        (file, fused, _candidates("sampled_softmax_slopes", NEGATED, False)),
    )
    yield _fault(
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
    _fault(
        "target_sampling: the draws corrected, the target not",
        "test_target_sampling.py",
        (
            "layers/target_sampling.py",
            "return Sample(ids, drawn.log_expected.new_zeros(len(ids)), drawn.log_expected.new_zeros(len(target)))",
            "return Sample(ids, drawn.log_expected.new_ones(len(ids)), drawn.log_expected.new_zeros(len(target)))",
        ),
    ),
    _fault(
        "target_sampling: the targets announced are forgotten",
        "test_target_sampling.py",
        (
            "layers/target_sampling.py",
            "member = self.announced.index_fill",
            "member = (0 * self.announced).bool().index_fill",
        ),
    ),
    _fault(
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
    _fault(
        "importance_sampled_softmax: draws that hit the target left out",
        "test_importance_sampled_softmax.py",
        (
            IMPORTANCE,
            "importance_sampling(target_logit, logit, log_expected)",
            "importance_sampling(target_logit, logit.masked_fill(ids == target[:, None], -torch.inf), log_expected)",
        ),
        (IMPORTANCE, "weight, hits=True", "weight, hits=False"),
    ),
    _fault(
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
    _fault(
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
    _fault(
        "noise_contrastive_estimation: draws that hit the target left out",
        "test_noise_contrastive_estimation.py",
        (NCE, "left_out_draws(target, ids, hits=True,", "left_out_draws(target, ids, hits=False,"),
        (NCE, "            hits=True,", "            hits=False,"),
    ),
    _fault(
        "noise_contrastive_estimation: the positive left uncorrected",
        "test_noise_contrastive_estimation.py",
        (
            NCE,
            "target_log_expected=sample.target_log_expected + self.log_normaliser",
            "target_log_expected=0 * sample.target_log_expected + self.log_normaliser",
        ),
    ),
    _fault(
        "noise_contrastive_estimation: the normaliser taken off the log-partition twice",
        "test_noise_contrastive_estimation.py test_layers.py -k noise_contrastive",
        (
            NCE,
            "return log_prob, log_partition - self.log_normaliser",
            "return log_prob, log_partition - 2 * self.log_normaliser",
        ),
    ),
    _fault(
        "black_out: the correction negated",
        "test_black_out.py",
        (
            BLACK_OUT,
            BLACK_OUT_EAGER,
            BLACK_OUT_EAGER.replace(EXPECTED, "-target_log_expected, -log_expected"),
        ),
        (BLACK_OUT, BLACK_OUT_FUSED, _candidates("black_out_slopes", NEGATED, False)),
    ),
    _fault(
        "black_out: accidental hits kept",
        "test_black_out.py",
        (BLACK_OUT, BLACK_OUT_EAGER, BLACK_OUT_EAGER.replace(HIT, NO_HIT)),
        (BLACK_OUT, BLACK_OUT_FUSED, _candidates("black_out_slopes", "sample", True)),
    ),
    _fault(
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
    _fault(
        "black_out: the most probable word's 1 - p by subtraction",
        "test_black_out.py test_objectives.py",
        (
            "ops/objectives.py",
            "torch.where(first_NC, F.logsigmoid(-log_odds_N1), torch.log1p(-share_NC.exp()))",
            "torch.log1p(-(score_NC - torch.logsumexp(score_NC, 1, keepdim=True)).exp())",
        ),
    ),
    _fault(
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
    _fault(
        "one_versus_each: accidental hits kept",
        "test_one_versus_each.py",
        (
            OVE,
            "one_versus_each(target_logit, logit, log_expected, target[:, None] == ids)",
            "one_versus_each(target_logit, logit, log_expected, (target[:, None] == ids) & False)",
        ),
        (OVE, "weight, hits=False", "weight, hits=True"),
    ),
    _fault(
        "negative_sampling: evaluated with the correction's sign swapped",
        "test_negative_sampling.py",
        ("layers/negative_sampling.py", "else self.bias + self.log_expected", "else self.bias - self.log_expected"),
    ),
    _fault(
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
    _fault(
        "infrequent_normalization: the penalty not scaled to the tokens left out",
        "test_infrequent_normalization.py",
        (
            "layers/infrequent_normalization.py",
            "scale = len(target) / len(drawn.tokens)",
            "scale = 1.0",
        ),
    ),
    _fault(
        "infrequent_normalization: the linear penalty as an absolute value",
        "test_infrequent_normalization.py",
        (
            "layers/infrequent_normalization.py",
            "nll + (scale - 1) * log_partition",
            "nll + scale * log_partition.abs() - log_partition",
        ),
    ),
    _fault(
        "self_normalized_softmax: the penalty without its square, and none in the fused loss",
        "test_self_normalized_softmax.py",
        (
            "layers/self_normalized_softmax.py",
            "self.strength * log_partition.square()",
            "self.strength * log_partition",
        ),
        ("layers/self_normalized_softmax.py", "z_loss=self.strength", "z_loss=0.0"),
    ),
    _fault(
        "class_softmax: words of a class boundary in the class before",
        "test_class_softmax.py",
        (
            "layers/class_softmax.py",
            "torch.bucketize(row, self.bound[1:-1], right=True)",
            "torch.bucketize(row, self.bound[1:-1])",
        ),
    ),
    _fault(
        "class_softmax: classes by mass instead of its square root",
        "test_class_softmax.py",
        ("layers/class_softmax.py", "np.arange(self.vocab_size), np.sqrt(count)", "np.arange(self.vocab_size), count"),
    ),
    _fault(
        "class_softmax: class biases start at zero",
        "test_class_softmax.py test_layers.py -k class_softmax",
        (
            "layers/class_softmax.py",
            "self.class_bias = nn.Parameter(unigram_log_prob(class_count))",
            "self.class_bias = nn.Parameter(0 * unigram_log_prob(class_count))",
        ),
    ),
    _fault(
        "adaptive_softmax: a tail's words without the entry of their tail",
        "test_adaptive_softmax.py",
        (
            "layers/adaptive_softmax.py",
            "*(entries[:, k : k + 1] + tail for k, tail in enumerate(tails))",
            "*(0 * entries[:, k : k + 1] + tail for k, tail in enumerate(tails))",
        ),
    ),
    _fault(
        "adaptive_softmax: every tail as wide as the first",
        "test_adaptive_softmax.py test_parity.py",
        ("layers/adaptive_softmax.py", "hidden_size // div_value ** (k + 1)", "hidden_size // div_value"),
    ),
    _fault(
        "adaptive_softmax: embeddings in the order of bands",
        "test_adaptive_softmax.py",
        ("layers/adaptive_softmax.py", "torch.cat(rows)[order.argsort()]", "torch.cat(rows)"),
    ),
    _fault(
        "mixture_of_softmaxes: experts weighted alike",
        "test_mixture_of_softmaxes.py test_layers.py -k mixture",
        (
            "layers/mixture_of_softmaxes.py",
            "mixture_log_prob(log_softmax(prior, dim=1)",
            "mixture_log_prob(log_softmax(0 * prior, dim=1)",
        ),
    ),
    _fault(
        "mixture_of_softmaxes: log-probabilities mixed instead of probabilities",
        "test_mixture_of_softmaxes.py",
        (
            "ops/mixture_nll/reference.py",
            "unsure_N = -logsumexp(log_softmax(prior_logit_NE, 1) - nll_NE, 1)",
            "unsure_N = (torch.softmax(prior_logit_NE, 1) * nll_NE).sum(1)",
        ),
    ),
    _fault(
        "differentiated_softmax: log-probabilities without the bias",
        "test_differentiated_softmax.py test_layers.py -k differentiated",
        (
            "layers/differentiated_softmax.py",
            "for x, weight in seen], 1) + self.bias",
            "for x, weight in seen], 1) + 0 * self.bias",
        ),
    ),
    _fault(
        "hierarchical_softmax: nodes without their pace",
        "test_hierarchical_softmax.py test_layers.py -k hierarchical",
        ("layers/hierarchical_softmax.py", "self.pace[:, None] * torch.addmm(", "torch.addmm("),
    ),
    _fault(
        "full_softmax: the bias not divided by the temperature",
        "test_full_softmax.py test_layers.py -k full_softmax",
        ("layers/full_softmax.py", "self.bias * self.inverse_temperature", "self.bias * 1.0"),
    ),
    _fault(
        "spherical softmax: the weight without epsilon's root",
        "test_normalisers.py test_spherical_softmax.py",
        (
            "ops/normalisers.py",
            "torch.hypot(score, score.new_tensor(math.sqrt(self.epsilon)))",
            "torch.hypot(score, score.new_tensor(self.epsilon))",
        ),
    ),
    _fault(
        "Taylor softmax: the polynomial of first order",
        "test_normalisers.py test_taylor_softmax.py",
        (
            "ops/normalisers.py",
            "return _UNIT.log_weight(upcast(score) + 1) - math.log(2)",
            "return (upcast(score) + 1).abs().log()",
        ),
    ),
    _fault(
        "sigsoftmax: the sigmoid of the opposite score",
        "test_normalisers.py test_sig_softmax.py",
        ("ops/normalisers.py", "return score + F.logsigmoid(score)", "return score + F.logsigmoid(-score)"),
    ),
    _fault(
        "other normalisers: the transpose of the Jacobian",
        "test_normalisers.py",
        ("ops/normalisers.py", "p.unsqueeze(-2)) * slope.unsqueeze(-2)", "p.unsqueeze(-2)) * slope.unsqueeze(-1)"),
    ),
    _fault(
        "division by the sum takes negative scores",
        "test_normalisers.py test_softmax.py",
        ("ops/normalisers.py", "score[(score < 0) | ~score.isfinite()]", "score[~score.isfinite()]"),
    ),
    _fault(
        "entmax: the Jacobian with the exponent of another alpha",
        "test_sparse.py",
        ("ops/sparse.py", "g = _powers(probability, 2 - alpha)", "g = _powers(probability, 1 - alpha)"),
    ),
    _fault(
        "entmax: the loss without the target's entropy",
        "test_sparse.py",
        ("ops/sparse.py", "log_theta, alpha) - entropy).clamp_(min=0)", "log_theta, alpha)).clamp_(min=0)"),
    ),
    _fault(
        "entmax: the slope in alpha without its centre",
        "test_sparse.py",
        ("ops/sparse.py", "share_NV = g_NV / g_NV.sum(1, keepdim=True)", "share_NV = 0 * g_NV"),
    ),
    _fault(
        "entmax: half the bound on what is in the support",
        "test_sparse.py test_linear_entmax.py",
        ("ops/sparse.py", "SLACK = 1.001", "SLACK = 0.5"),
    ),
    _fault(
        "sparsemax output: the bias of the unigram's logarithm",
        "test_sparsemax_output.py test_layers.py -k sparsemax",
        (
            "layers/sparsemax_output.py",
            "full_support_logits(unigram_log_prob(counts).exp(), ALPHA)",
            "unigram_log_prob(counts)",
        ),
    ),
    _fault(
        "entmax output: always alpha = 1.5",
        "test_entmax_output.py test_layers.py -k entmax",
        ("layers/entmax_output.py", "log_entmax(logits, self.alpha, dim=1)", "log_entmax(logits, 1.5, dim=1)"),
    ),
    _fault(
        "Gumbel: noise added with its sign reversed",
        "test_gumbel.py",
        ("ops/gumbel.py", "return log_weight - noise", "return log_weight + noise"),
    ),
    _fault(
        "Gumbel-softmax: straight-through without the soft sample's gradient",
        "test_gumbel.py",
        ("ops/gumbel.py", "return soft + (one_hot - soft).detach()", "return one_hot"),
    ),
    _fault(
        "online: the first of two merged sums not rescaled",
        "test_online.py",
        ("ops/online.py", "a.total * (a.maximum - base).exp() + b.total", "a.total + b.total"),
    ),
    _fault(
        "online attention: the causal mask one key late",
        "test_online.py",
        ("ops/online.py", ".triu(1)", ".triu(2)"),
    ),
    _fault(
        "online attention: backward without the path through the sum",
        "test_online.py",
        ("ops/online.py", ".sub_(through_total[..., rows, :])", ".sub_(0 * through_total[..., rows, :])"),
    ),
    _fault(
        "midx: the correction lacks log K",
        "test_noise_of_contexts.py test_sampled_softmax.py",
        ("noise/midx.py", "shift = math.log(self.count)", "shift = 0.0"),
    ),
    _fault(
        "exact softmax in C++: half the gradient of the squared log-sum-exp",
        "test_linear_cross_entropy.py",
        ("ops/linear_cross_entropy/kernel.cpp", "slope = 2 * args.z_loss", "slope = 1 * args.z_loss"),
    ),
    _fault(
        "exact softmax in C++: rows that fill a block up have weights out of range",
        "test_linear_cross_entropy.py -k cpp",
        ("ops/linear_cross_entropy/kernel.cpp", "std::numeric_limits<Sum>::max() / 2;", "0;"),
    ),
    _fault(
        "spherical softmax in C++: the derivative of a square without its 2",
        "test_normalised_cross_entropy.py -k cpp",
        (
            "ops/linear_cross_entropy/weights.h",
            "T derivative(T reference) const { return 2 / reference; }",
            "T derivative(T reference) const { return 1 / reference; }",
        ),
    ),
    _fault(
        "spherical softmax in C++: squares without epsilon",
        "test_normalised_cross_entropy.py -k cpp",
        ("ops/linear_cross_entropy/weights.h", "kept * kept + to.epsilon", "kept * kept"),
    ),
    _fault(
        "spherical softmax in C++: the target's epsilon left in the sum",
        "test_normalised_cross_entropy.py -k cpp",
        ("ops/linear_cross_entropy/weights.h", "return ratio * ratio;", "return 0 * ratio;"),
    ),
    _fault(
        "spherical softmax in C++: what is kept moved to another reference as sums are",
        "test_normalised_cross_entropy.py -k cpp",
        (
            "ops/linear_cross_entropy/weights.h",
            "T change_of_kept(T before, T after) const { return before / after; }",
            "T change_of_kept(T before, T after) const { return before / after * (before / after); }",
        ),
    ),
    _fault(
        "sigsoftmax in C++: the derivative without the sigmoid's own",
        "test_normalised_cross_entropy.py -k cpp",
        ("ops/linear_cross_entropy/weights.h", "weight * (T(2) - to.above * q)", "weight"),
    ),
    _fault(
        "sigsoftmax in C++: sums moved to another reference as exponentials are",
        "test_normalised_cross_entropy.py -k cpp",
        (
            "ops/linear_cross_entropy/weights.h",
            "(before - after) + (negative(before) - negative(after))",
            "before - after",
        ),
    ),
    _fault(
        "calibration: the temperature's inverse",
        "test_calibration.py",
        ("calibration.py", "return 1 / inverse", "return inverse"),
    ),
    _fault(
        "calibration: bins open at the other end",
        "test_calibration.py",
        (
            "calibration.py",
            "np.ceil(confidence * bins).astype(np.int64) - 1",
            "np.floor(confidence * bins).astype(np.int64)",
        ),
    ),
    _fault(
        "evaluation: the mean of the first half of the tokens only",
        "test_evaluate.py",
        ("evaluate.py", 'nll = _mean(text["nll"])', 'nll = _mean(text["nll"][: len(text["nll"]) // 2])'),
    ),
    _fault(
        "evaluation: of equal words the rarer comes first",
        "test_evaluate.py",
        ("evaluate.py", "< target[rows, None]", "> target[rows, None]"),
    ),
]


def changed(fault: Fault, root: Path) -> dict[Path, str]:
    """Return the new text of the files that a fault changes.

    Raises:
        ValueError: what it changes does not stand in its file exactly once.
    """
    texts: dict[Path, str] = {}
    for name, old, new in fault.edits:
        path = root / "lvsoftmax" / name
        text = texts.get(path) or path.read_text()
        if text.count(old) != 1:
            raise ValueError(f"{fault.title}: {name} has {text.count(old)} times: {old}")
        texts[path] = text.replace(old, new)
    return texts


def noticed_by(fault: Fault) -> str | None:
    """Return the first test that fails under a fault, None if all pass."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignore = shutil.ignore_patterns(".*", "outputs", "results", "*.egg-info", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=ignore)
        for path, text in changed(fault, copy).items():
            path.write_text(text)
        options = ("-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--no-header", "--tb=no")
        names = [f"tests/{name}" if name.endswith(".py") else name for name in fault.tests]
        command = [sys.executable, "-m", "pytest", *options, *names]
        output = subprocess.run(command, cwd=copy, capture_output=True, text=True).stdout
    failed = [
        line.split(" - ")[0].split("::")[-1] for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))
    ]
    return failed[0] if failed else None


def main(words: list[str]) -> int:
    """Print the table; return the number of faults that went unnoticed, at most 1."""
    print("| fault | noticed by |\n| --- | --- |")
    unnoticed = 0
    for fault in FAULTS:
        if all(word in fault.title for word in words):
            test = noticed_by(fault)
            unnoticed += test is None
            print(f"| {fault.title} | {f'`{test}`' if test else '**nothing**'} |", flush=True)
    return min(unnoticed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
