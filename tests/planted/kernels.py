"""Faults in the kernels and what calls them."""

from planted.fault import fault

FAULTS = [
    fault(
        "exact softmax in C++: half the gradient of the squared log-sum-exp",
        "test_linear_cross_entropy.py",
        ("ops/linear_cross_entropy/kernel.cpp", "slope = 2 * args.z_loss", "slope = 1 * args.z_loss"),
    ),
    fault(
        "exact softmax in C++: rows that fill a block up have weights out of range",
        "test_linear_cross_entropy_digits.py -k cpp",
        ("ops/linear_cross_entropy/kernel.cpp", "std::numeric_limits<Sum>::max() / 2;", "0;"),
    ),
    fault(
        "exact softmax in C++: as many threads taken for granted as were asked for",
        "test_linear_cross_entropy_work.py -k fewer_threads",
        ("ops/linear_cross_entropy/kernel.cpp", "            threads = omp_get_num_threads();", "            ;"),
    ),
    fault(
        "bands: a target in none of them has the score zero",
        "test_differentiated_softmax.py -k no_band",
        ("ops/linear_cross_entropy/banded.py", "torch.full_like(others_N, torch.nan)", "torch.zeros_like(others_N)"),
    ),
    fault(
        "spherical softmax in C++: the derivative of a square without its 2",
        "test_normalised_cross_entropy.py -k cpp",
        (
            "ops/linear_cross_entropy/weights.h",
            "T derivative(T reference) const { return 2 / reference; }",
            "T derivative(T reference) const { return 1 / reference; }",
        ),
    ),
    fault(
        "spherical softmax in C++: squares without epsilon",
        "test_normalised_cross_entropy.py -k cpp",
        ("ops/linear_cross_entropy/weights.h", "kept * kept + to.epsilon", "kept * kept"),
    ),
    fault(
        "spherical softmax in C++: the target's epsilon left in the sum",
        "test_normalised_cross_entropy.py -k cpp",
        ("ops/linear_cross_entropy/weights.h", "return ratio * ratio;", "return 0 * ratio;"),
    ),
    fault(
        "spherical softmax in C++: what is kept moved to another reference as sums are",
        "test_normalised_cross_entropy.py -k cpp",
        (
            "ops/linear_cross_entropy/weights.h",
            "T change_of_kept(T before, T after) const { return before / after; }",
            "T change_of_kept(T before, T after) const { return before / after * (before / after); }",
        ),
    ),
    fault(
        "sigsoftmax in C++: the derivative without the sigmoid's own",
        "test_normalised_cross_entropy.py -k cpp",
        ("ops/linear_cross_entropy/weights.h", "weight * (T(2) - to.above * q)", "weight"),
    ),
    fault(
        "sigsoftmax in C++: sums moved to another reference as exponentials are",
        "test_normalised_cross_entropy.py -k cpp",
        (
            "ops/linear_cross_entropy/weights.h",
            "(before - after) + (negative(before) - negative(after))",
            "before - after",
        ),
    ),
    fault(
        "trees in C++: the branches of a node swapped",
        "test_path_nll.py",
        ("ops/path_nll/kernel.cpp", "i < p->left ? pace[node] : -pace[node]", "i < p->left ? -pace[node] : pace[node]"),
    ),
    fault(
        "trees in C++: gradients of the nodes without their pace",
        "test_path_nll.py",
        (
            "ops/path_nll/kernel.cpp",
            "to_slope[i] *= -factor[i]",
            "to_slope[i] *= factor[i] > 0 ? -1 : 1",
        ),
    ),
    fault(
        "trees in C++: a node that several threads meet keeps the last one's part",
        "test_path_nll.py",
        ("ops/path_nll/kernel.cpp", "shared[p->met] |= !p->opens", "shared[p->met] |= 0"),
    ),
    fault(
        "trees in C++: a node's gradient starts anew at every piece",
        "test_path_nll.py",
        ("ops/path_nll/kernel.cpp", "p.opens && i == 0, to_weight", "i == 0, to_weight"),
    ),
    fault(
        "trees in C++: a weighted sum scores a block after its gradients",
        "test_path_nll.py -k weighted",
        (
            "ops/path_nll/kernel.cpp",
            "        prepare(thread, block);",
            "        if (block) prepare(thread, block - 1);",
        ),
    ),
    fault(
        "trees in C++: gradients of hidden vectors added to what the memory held",
        "test_path_nll.py",
        ("ops/path_nll/kernel.cpp", "add(*p, p == first, to_hidden", "add(*p, false, to_hidden"),
    ),
    fault(
        "trees in C++: every token of those that climb together has the first one's length of way",
        "test_path_nll.py",
        ("ops/path_nll/kernel.cpp", "length = climbed_length[i % CLIMB];", "length = climbed_length[0];"),
    ),
    fault(
        "trees in C++: the last tokens of many go down the tree with the others' probabilities",
        "test_path_nll.py -k words",
        ("ops/path_nll/kernel.cpp", "*log_p = here + n * lanes", "*log_p = here + n * LANES"),
    ),
    fault(
        "trees in C++: of all words, the less probable branch without its digits",
        "test_path_nll.py -k words",
        (
            "ops/path_nll/kernel.cpp",
            "(shared + (x[i] > 0 ? x[i] : T(0)))",
            "((shared + (x[i] > 0 ? T(0) : -x[i])) + x[i])",
        ),
    ),
    fault(
        "gathered products in C++: a row's gradient of its last four tokens only",
        "test_gather_dot.py",
        ("ops/gather_dot/kernel.cpp", "gather<count()>(g, vector, D, j == 0,", "gather<count()>(g, vector, D, true,"),
    ),
    fault(
        "gathered products in C++: the row before in place of a token's own",
        "test_gather_dot.py",
        ("ops/gather_dot/kernel.cpp", "hidden + own[j + i] / K * D", "hidden + own[j] / K * D"),
    ),
    fault(
        "pairs: gradients of the table in the order of the tokens",
        "test_gather_dot.py test_path_nll.py test_class_softmax.py",
        ("ops/pairs.py", "token_P[order_P], gradient_P[order_P]", "token_P[order_P], gradient_P"),
    ),
    fault(
        "groups: a word at a boundary belongs to the group before",
        "test_class_softmax.py test_layers.py -k class_softmax",
        ("ops/grouped_nll/reference.py", "bound_G[1:-1], right=True", "bound_G[1:-1], right=False"),
    ),
    fault(
        "bands: a band without the target gives up one of its own words",
        "test_differentiated_softmax.py",
        (
            "ops/linear_cross_entropy/banded.py",
            "sum_N = torch.where(inside_N, sum_N, torch.logaddexp(sum_N, logit_N))",
            "pass",
        ),
    ),
    fault(
        "losses with gradients made on the way: what comes from above is ignored",
        "test_linear_cross_entropy.py",
        ("ops/gradients_in_forward.py", "if not _is_one(upstream):", "if False:"),
    ),
    fault(
        "recycled memory: given to the next while somebody sees it",
        "test_buffers.py",
        ("ops/buffers.py", "weakref.finalize(view, _give, memory).atexit = False", "_give(memory)"),
    ),
    fault(
        "the cost of a cross-entropy: absolute errors fitted, so that only large shapes count",
        "test_cost_model.py",
        (
            "ops/linear_cross_entropy/cost_model.py",
            "products = _products(*sizes.T) / taken[:, None]",
            "products = _products(*sizes.T)",
        ),
        (
            "ops/linear_cross_entropy/cost_model.py",
            "np.linalg.lstsq(columns, np.ones(len(taken)))",
            "np.linalg.lstsq(columns, taken)",
        ),
        (
            "ops/linear_cross_entropy/cost_model.py",
            "np.square(columns @ found - 1)",
            "np.square(columns @ found - taken)",
        ),
    ),
]
