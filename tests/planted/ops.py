"""Faults in the softmax family and in the noise."""

from planted.fault import fault

FAULTS = [
    fault(
        "spherical softmax: the weight without epsilon's root",
        "test_normalisers.py test_spherical_softmax.py",
        (
            "ops/normalisers.py",
            "torch.hypot(score, score.new_tensor(math.sqrt(self.epsilon)))",
            "torch.hypot(score, score.new_tensor(self.epsilon))",
        ),
    ),
    fault(
        "Taylor softmax: the polynomial of first order",
        "test_normalisers.py test_taylor_softmax.py",
        (
            "ops/normalisers.py",
            "return _UNIT.log_weight(upcast(score) + 1) - math.log(2)",
            "return (upcast(score) + 1).abs().log()",
        ),
    ),
    fault(
        "sigsoftmax: the sigmoid of the opposite score",
        "test_normalisers.py test_sig_softmax.py",
        ("ops/normalisers.py", "return score + F.logsigmoid(score)", "return score + F.logsigmoid(-score)"),
    ),
    fault(
        "other normalisers: the transpose of the Jacobian",
        "test_normalisers.py",
        ("ops/normalisers.py", "p.unsqueeze(-2)) * slope.unsqueeze(-2)", "p.unsqueeze(-2)) * slope.unsqueeze(-1)"),
    ),
    fault(
        "division by the sum takes negative scores",
        "test_normalisers.py test_softmax.py",
        ("ops/normalisers.py", "score[(score < 0) | ~score.isfinite()]", "score[~score.isfinite()]"),
    ),
    fault(
        "entmax: the Jacobian with the exponent of another alpha",
        "test_sparse.py",
        ("ops/sparse.py", "g = _powers(probability, 2 - alpha)", "g = _powers(probability, 1 - alpha)"),
    ),
    fault(
        "entmax: the loss without the target's entropy",
        "test_sparse.py",
        ("ops/sparse.py", "log_theta, alpha) - entropy).clamp_(min=0)", "log_theta, alpha)).clamp_(min=0)"),
    ),
    fault(
        "entmax: the slope in alpha without its centre",
        "test_sparse.py",
        ("ops/sparse.py", "share_NV = g_NV / g_NV.sum(1, keepdim=True)", "share_NV = 0 * g_NV"),
    ),
    fault(
        "entmax: half the bound on what is in the support",
        "test_sparse.py test_linear_entmax.py",
        ("ops/sparse.py", "SLACK = 1.001", "SLACK = 0.5"),
    ),
    fault(
        "Gumbel: noise added with its sign reversed",
        "test_gumbel.py",
        ("ops/gumbel.py", "return log_weight - noise", "return log_weight + noise"),
    ),
    fault(
        "Gumbel-softmax: straight-through without the soft sample's gradient",
        "test_gumbel.py",
        ("ops/gumbel.py", "return soft + (one_hot - soft).detach()", "return one_hot"),
    ),
    fault(
        "online: the first of two merged sums not rescaled",
        "test_online.py",
        ("ops/online.py", "a.total * (a.maximum - base).exp() + b.total", "a.total + b.total"),
    ),
    fault(
        "online attention: the causal mask one key late",
        "test_online.py",
        ("ops/online.py", ".triu(1)", ".triu(2)"),
    ),
    fault(
        "online attention: backward without the path through the sum",
        "test_online.py",
        ("ops/online.py", ".sub_(through_total[..., rows, :])", ".sub_(0 * through_total[..., rows, :])"),
    ),
    fault(
        "midx: the correction lacks log K",
        "test_noise_of_contexts.py test_sampled_softmax.py",
        ("noise/midx.py", "shift = math.log(self.count)", "shift = 0.0"),
    ),
]
