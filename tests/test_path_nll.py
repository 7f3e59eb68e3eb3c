"""The kernels of the path likelihood against the reference, and the reference's arithmetic against float64."""

import math

import numpy as np
import pytest
import torch

from lvsoftmax.ops import buffers, partition
from lvsoftmax.ops.backends import interprets_triton
from lvsoftmax.ops.path_nll import BACKENDS, native, path_nll, path_nll_loss, tree_log_prob

DEVICES = {"cpp": "cpu", "triton": "cpu" if interprets_triton() else "cuda", "eager": "cpu"}


def backends(*names):
    """A parameter that takes these backends, but for those that cannot run here."""
    reasons = {name: BACKENDS.obstacles[name](torch.device(DEVICES[name])) for name in names}
    return pytest.mark.parametrize(
        "backend",
        [pytest.param(n, marks=pytest.mark.skipif(r is not None, reason=f"{n}: {r}")) for n, r in reasons.items()],
    )


for_every_kernel = backends("cpp", "triton")
for_every_backend = backends("cpp", "triton", "eager")
compiled = pytest.mark.skipif(
    native.LIBRARY.obstacle(torch.device("cpu")) is not None, reason="the kernel cannot run here"
)

GENERATOR = np.random.default_rng(0)
VOCAB = 150
TREES = {
    "two": partition.huffman_tree(np.array([3, 1])),
    "three": partition.huffman_tree(np.array([3, 1, 1])),
    "zipf": partition.huffman_tree(1000 // np.arange(1, VOCAB + 1)),
    "balanced": partition.balanced_tree(GENERATOR.permutation(VOCAB)),
    "deep": partition.huffman_tree(2.0 ** np.arange(70, 0, -1)),
    "arranged": partition.arranged_huffman_tree(GENERATOR.normal(size=(VOCAB, 3)), 1000 // np.arange(1, VOCAB + 1)),
}
for_every_tree = pytest.mark.parametrize("tree", TREES.values(), ids=TREES)


def problem(tree, tokens: int, width: int, dtype=torch.float32) -> dict:
    generator = torch.Generator().manual_seed(tokens + width)
    nodes = len(tree.node_branch)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype)

    target = torch.randint(nodes + 1, (tokens,), generator=generator)
    target[tokens // 2 :] = target[tokens // 2 :] // 8  # many of few words
    return {
        "hidden_ND": normal(tokens, width),
        "weight_MD": normal(nodes, width) / math.sqrt(width),
        "bias_M": normal(nodes),
        "pace_M": normal(nodes).abs() + 0.1,
        "node_branch_M": torch.from_numpy(tree.node_branch),
        "word_branch_V": torch.from_numpy(tree.word_branch),
        "word_rank_V": torch.from_numpy(partition.leaf_ranks(tree)),
        "depth": int(partition.depths(tree).max()),
        "target_N": target,
    }


def step(given: dict, backend: str, *, sparse: bool = True, upstream=None, wanted=(True, True, True)) -> list:
    """Values, and the gradients of hidden, weight and bias; computed where the backend runs."""
    given = {name: x.to(DEVICES.get(backend, "cpu")) if torch.is_tensor(x) else x for name, x in given.items()}
    variables = [given[name].clone().requires_grad_(want) for name, want in zip(list(given)[:3], wanted, strict=True)]
    nll = path_nll(*variables, **dict(list(given.items())[3:]), sparse=sparse, backend=backend)
    if upstream is None:
        upstream = weights_of(nll)
    asked = [variable for variable, want in zip(variables, wanted, strict=True) if want]
    return [x.cpu() for x in (nll.detach(), *torch.autograd.grad(nll, asked, upstream.to(nll.device)))]


def weights_of(tokens) -> torch.Tensor:
    return torch.linspace(-1, 2, len(tokens), dtype=tokens.dtype)


def weighted_step(given: dict, *, sparse: bool = True, wanted=(True, True, True), scale: float = 1.0) -> list:
    """As ``step``, of the weighted sum and the compiled kernel: its value, and the same gradients."""
    variables = [given[name].clone().requires_grad_(want) for name, want in zip(list(given)[:3], wanted, strict=True)]
    rest = dict(list(given.items())[3:])
    loss = path_nll_loss(
        *variables, **rest, token_weight_N=weights_of(given["hidden_ND"]), sparse=sparse, backend="cpp"
    )
    asked = [variable for variable, want in zip(variables, wanted, strict=True) if want]
    return [loss.detach(), *torch.autograd.grad(scale * loss, asked)]


def in_double(given: dict) -> dict:
    return {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in given.items()}


def error(found, truth) -> float:
    return (found.to_dense().double() - truth.to_dense().double()).abs().max().item() if truth.numel() else 0.0


# -- against the reference --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize(("tokens", "width"), [(0, 5), (1, 1), (2, 3), (24, 16), (32, 17), (33, 64), (130, 65)])
@for_every_tree
@for_every_kernel
def test_kernel_errs_no_more_than_the_reference(backend, tree, tokens, width, sparse):
    if backend == "triton" and interprets_triton() and tokens not in (0, 2, 33):
        pytest.skip("three sizes are enough for Triton's interpreter, to which all programs are alike")
    given = problem(tree, tokens, width)
    truth = step(in_double(given), "eager", sparse=False)
    kernel, reference = (step(given, name, sparse=sparse) for name in (backend, "eager"))
    for name, one, other, exact in zip(("nll", "hidden", "weight", "bias"), kernel, reference, truth, strict=True):
        assert one.is_sparse == other.is_sparse and one.dtype == other.dtype and one.shape == other.shape, name
        assert error(one, exact) <= 2 * error(other, exact) + 1e-6, name
        if one.is_sparse:
            assert one.is_coalesced()
            assert torch.equal(one.indices(), other.indices()), name


@pytest.mark.parametrize("sparse", [True, False])
@for_every_tree
@for_every_kernel
def test_kernel_equals_the_reference_in_float64(backend, tree, sparse):
    given = problem(tree, 77, 19, torch.float64)
    for one, other in zip(*(step(given, name, sparse=sparse) for name in (backend, "eager")), strict=True):
        torch.testing.assert_close(one.to_dense(), other.to_dense(), rtol=1e-12, atol=1e-12)


@for_every_kernel
def test_equal_targets_share_their_whole_path(backend):
    given = problem(TREES["zipf"], 100, 8) | {"target_N": torch.full((100,), VOCAB - 1)}
    for one, other in zip(*(step(given, name) for name in (backend, "eager")), strict=True):
        torch.testing.assert_close(one.to_dense(), other.to_dense(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("sparse", [True, False])
@for_every_kernel
def test_one_gradient_alone(backend, sparse, wanted):
    given = problem(TREES["zipf"], 50, 12)
    results = (step(given, name, sparse=sparse, wanted=wanted) for name in (backend, "eager"))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one.to_dense(), other.to_dense(), rtol=1e-5, atol=1e-5)


@for_every_kernel
def test_strided_inputs(backend):
    given = problem(TREES["zipf"], 80, 24)
    strided = given | {
        "hidden_ND": given["hidden_ND"].T.contiguous().T,
        "weight_MD": given["weight_MD"].T.contiguous().T,
        "bias_M": given["bias_M"].repeat_interleave(2)[::2],
        "target_N": given["target_N"].repeat_interleave(2)[::2],
    }
    upstream = torch.tensor(0.3).expand(80)
    for one, other in zip(*(step(form, backend, upstream=upstream) for form in (given, strided)), strict=True):
        assert torch.equal(one.to_dense(), other.to_dense())


@for_every_kernel
def test_a_bfloat16_hidden_vector_is_that_number_in_float32(backend):
    given = problem(TREES["zipf"], 60, 24)
    rounded = given["hidden_ND"].bfloat16()
    low = step(given | {"hidden_ND": rounded}, backend)
    high = step(given | {"hidden_ND": rounded.float()}, backend)
    assert low[0].dtype == torch.float32 and low[1].dtype == torch.bfloat16
    assert torch.equal(low[1], high[1].bfloat16())
    assert torch.equal(low[0], high[0])
    assert torch.equal(low[2].to_dense(), high[2].to_dense())


# -- the weighted sum -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize(("tokens", "width"), [(0, 5), (1, 1), (33, 64), (130, 65)])
@for_every_tree
@compiled
def test_the_weighted_sum_has_the_gradients_of_its_tokens(tree, tokens, width, sparse, threads):
    torch.set_num_threads(threads)
    given = problem(tree, tokens, width)
    loss, *found = weighted_step(given, sparse=sparse)
    nll, *expected = step(given, "cpp", sparse=sparse)
    torch.testing.assert_close(loss, (weights_of(nll) * nll).sum())
    for one, other in zip(found, expected, strict=True):
        assert one.is_sparse == other.is_sparse and torch.equal(one.to_dense(), other.to_dense())
        assert not one.is_sparse or one.is_coalesced()


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("sparse", [True, False])
@compiled
def test_one_gradient_alone_of_the_weighted_sum_scaled(sparse, wanted):
    given = problem(TREES["zipf"], 50, 12, torch.float64)
    _, found = weighted_step(given, sparse=sparse, wanted=wanted, scale=-0.3)
    _, expected = step(given, "eager", sparse=sparse, wanted=wanted)
    torch.testing.assert_close(found.to_dense(), -0.3 * expected.to_dense(), rtol=1e-12, atol=1e-12)


@compiled
def test_the_weighted_sum_is_differentiated_once_and_by_its_weights_too():
    given = problem(TREES["zipf"], 50, 12, torch.float64)
    weight = weights_of(given["hidden_ND"]).requires_grad_()
    given["hidden_ND"].requires_grad_()
    loss = path_nll_loss(**given, token_weight_N=weight, sparse=True, backend="cpp")
    (slope,) = torch.autograd.grad(loss, weight, retain_graph=True)
    torch.testing.assert_close(slope, path_nll(**given, sparse=True).detach())
    with pytest.raises(RuntimeError, match="differentiated once"):
        loss.backward()


@pytest.mark.parametrize("backend", ["cpp", "eager"])
def test_the_weighted_sum_without_gradients(backend):
    if backend == "cpp" and native.LIBRARY.obstacle(torch.device("cpu")):
        pytest.skip("the kernel cannot run here")
    given = problem(TREES["zipf"], 50, 12, torch.float64)
    loss = path_nll_loss(**given, token_weight_N=weights_of(given["hidden_ND"]), sparse=True, backend=backend)
    nll = path_nll(**given, sparse=True, backend="eager")
    torch.testing.assert_close(loss, (weights_of(nll) * nll).sum())
    with pytest.raises(ValueError, match="^token_weight"):
        path_nll_loss(**given, token_weight_N=torch.ones(3), sparse=True, backend=backend)


# -- every word --------------------------------------------------------------------------------------------------------


def all_words(score, tree, backend: str):
    """``tree_log_prob`` of a tree from ``partition``."""
    laid_out = partition.levels(tree)
    branches = map(torch.from_numpy, (tree.node_branch, tree.word_branch))
    positions = map(torch.from_numpy, (laid_out.node_position, laid_out.leaf_position, laid_out.word_leaf))
    return tree_log_prob(score, *branches, laid_out.sizes, *positions, backend=backend)


@compiled
def test_all_words_take_room_for_the_threads_that_have_work(monkeypatch):
    score = torch.randn(len(TREES["zipf"].node_branch), 130)
    sizes, take = [], native.recycled
    monkeypatch.setattr(native, "recycled", lambda shape, dtype: sizes.append(tuple(shape)) or take(shape, dtype))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    all_words(score, TREES["zipf"], "cpp")
    assert (2, len(score), 128) in sizes  # 130 tokens are two pieces of work


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("tokens", [0, 1, 7, 128, 300])
@for_every_tree
@compiled
def test_the_pass_over_all_words_errs_no_more_than_the_reference(tree, tokens, threads):
    torch.set_num_threads(threads)
    score = 3 * torch.randn(len(tree.node_branch), tokens, generator=torch.Generator().manual_seed(tokens))
    truth = all_words(score.double(), tree, "eager")
    one, other = (all_words(score, tree, backend) for backend in ("cpp", "eager"))
    assert one.shape == other.shape and one.dtype == other.dtype
    assert error(one, truth) <= 2 * error(other, truth) + 1e-6
    torch.testing.assert_close(all_words(score.double(), tree, "cpp"), truth, rtol=1e-13, atol=1e-13)
    torch.set_num_threads(1)
    assert torch.equal(one, all_words(score, tree, "cpp"))


@compiled
def test_all_words_keep_the_digits_of_sure_decisions():
    score = torch.cat([torch.linspace(-200, 200, 4001), torch.linspace(-3, 3, 3001)])[None]
    found = all_words(score, TREES["two"], "cpp").double()
    even = int(TREES["two"].word_branch.argmin())
    for word, sign in ((even, -1), (1 - even, 1)):
        expected = -torch.logaddexp(torch.zeros(()).double(), sign * score[0].double())
        torch.testing.assert_close(found[:, word], expected, rtol=6e-7, atol=torch.finfo(torch.float32).tiny)


@compiled
def test_all_words_of_what_is_not_finite():
    score = torch.zeros(VOCAB - 1, 3)
    score[5, 0], score[5, 1], score[5, 2] = math.nan, math.inf, -math.inf
    one, other = (all_words(score, TREES["zipf"], backend) for backend in ("cpp", "eager"))
    torch.testing.assert_close(one, other, equal_nan=True)


@compiled
def test_all_words_need_no_more_than_their_workspace(monkeypatch):
    taken = []

    def guarded(shape, dtype):
        whole = torch.full((math.prod(shape) + 64,), -77, dtype=dtype)
        taken.append(whole)
        return whole[:-64].view(*shape)

    score = torch.randn(VOCAB - 1, 150)
    expected = all_words(score, TREES["zipf"], "cpp")
    monkeypatch.setattr(native, "recycled", guarded)
    assert torch.equal(all_words(score, TREES["zipf"], "cpp"), expected)
    assert len(taken) == 3 and all((whole[-64:] == -77).all() for whole in taken)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.jit")  # PyTorch's own, on the way forward
def test_all_words_can_be_differentiated_either_way_and_mapped():
    score = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    tree = partition.balanced_tree(np.arange(5))
    assert torch.autograd.gradcheck(lambda x: all_words(x, tree, "auto"), score, check_forward_ad=True)
    scores, tangent = torch.randn(2, 4, 3), torch.randn(4, 3)
    mapped = torch.func.vmap(lambda x: all_words(x, tree, "auto"))(scores)
    torch.testing.assert_close(mapped, torch.stack([all_words(x, tree, "auto") for x in scores]))
    _, found = torch.func.jvp(lambda x: all_words(x, tree, "auto"), (scores[0],), (tangent,))
    _, expected = torch.func.jvp(lambda x: all_words(x, tree, "eager"), (scores[0],), (tangent,))
    torch.testing.assert_close(found, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = all_words(torch.autograd.forward_ad.make_dual(scores[0], tangent), tree, "auto")
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, expected)


# -- threads and memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 40, 1000])
@pytest.mark.parametrize("sparse", [True, False])
@compiled
def test_the_number_of_threads_changes_no_bit(sparse, tokens):
    given = problem(TREES["zipf"], tokens, 20)
    alone = step(given, "cpp", sparse=sparse)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        for one, other in zip(alone, step(given, "cpp", sparse=sparse), strict=True):
            assert torch.equal(one.to_dense(), other.to_dense())


@pytest.mark.parametrize("sparse", [True, False])
@for_every_kernel
def test_every_number_is_written(backend, sparse, monkeypatch):
    """On memory full of what is not a number."""
    given = problem(TREES["zipf"], 100, 20)
    clean = step(given, backend, sparse=sparse)
    monkeypatch.setattr(native, "recycled", lambda shape, dtype: torch.empty(shape, dtype=dtype))
    torch.use_deterministic_algorithms(True)  # fills fresh memory so
    try:
        assert torch.empty(3).isnan().all() and torch.ones(1).new_empty(3).isnan().all()
        poisoned = step(given, backend, sparse=sparse)
    finally:
        torch.use_deterministic_algorithms(False)
    for one, other in zip(clean, poisoned, strict=True):
        assert torch.equal(one.to_dense(), other.to_dense())


@compiled
def test_gradients_live_on_after_the_next_step():
    """Recycled memory must not serve again while somebody holds it."""
    given = problem(TREES["balanced"], 4000, 128)
    first = step(given, "cpp")
    kept = [x.to_dense().clone() for x in first]
    step(given | {"hidden_ND": -given["hidden_ND"]}, "cpp")
    for one, other in zip(first, kept, strict=True):
        assert torch.equal(one.to_dense(), other)


# -- arithmetic -------------------------------------------------------------------------------------------------------


@for_every_backend
def test_decisions_keep_their_digits_however_sure(backend):
    """``log(1 + exp(-s))`` and its slope for scores from sure to surely wrong, to the last digits of float32."""
    smallest = torch.finfo(torch.float32).tiny
    score = torch.cat([torch.linspace(-200, 200, 4001), torch.linspace(-3, 3, 3001)]).double()
    given = problem(TREES["two"], len(score), 1)
    given |= {"hidden_ND": score.float()[:, None], "weight_MD": torch.ones(1, 1), "bias_M": torch.zeros(1)}
    given |= {"pace_M": torch.ones(1), "target_N": torch.full((len(score),), int(given["word_branch_V"].argmin()))}
    nll, slope, *_ = step(given, backend, upstream=torch.ones(len(score)))
    score = score.float().double()
    torch.testing.assert_close(
        nll.double(), torch.logaddexp(torch.zeros(()).double(), -score), rtol=6e-7, atol=smallest
    )
    torch.testing.assert_close(slope[:, 0].double(), -torch.sigmoid(-score), rtol=6e-7, atol=smallest)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@for_every_kernel
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, in Triton's interpreter
def test_what_is_not_finite_is_not_hidden(backend, wrong):
    given = problem(TREES["zipf"], 40, 8)
    given["hidden_ND"][7, 3] = wrong
    found = step(given, backend)
    assert not found[0][7].isfinite() or wrong == math.inf
    assert found[0][torch.arange(40) != 7].isfinite().all()
    assert not found[2].to_dense().isfinite().all()


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", [-1, VOCAB, 2**40])
@for_every_kernel
def test_a_target_outside_the_vocabulary_is_named(backend, word):
    given = problem(TREES["zipf"], 5, 8)
    given["target_N"][3] = word
    if DEVICES[backend] != "cpu":  # nothing waits for the device
        assert step(given, backend)[0].isnan().tolist() == [False, False, False, True, False]
        return
    with pytest.raises(ValueError, match=rf"^target has ids from .*: they must be in \[0, {VOCAB}\); leave out"):
        step(given, backend)


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match="^backend='gpu': choose one of auto, triton, cpp, eager$"):
        step(problem(TREES["two"], 1, 1), "gpu")
    assert BACKENDS.choose("auto", "cpu") == (
        "cpp" if native.LIBRARY.obstacle(torch.device("cpu")) is None else "eager"
    )


# -- memory -----------------------------------------------------------------------------------------------------------


@compiled
@for_every_tree
@pytest.mark.parametrize("threads", [1, 3])
def test_the_workspace_is_enough_and_only_it_is_written(tree, threads, monkeypatch):
    """What lies behind it in memory stays as it was, and nothing depends on what it held."""
    torch.set_num_threads(threads)
    taken, take = [], buffers.recycled

    def guarded(shape, dtype):
        whole = take((math.prod(shape) + 64,), dtype).fill_(-77 if dtype.is_signed else 77)
        taken.append(whole)
        return whole[:-64].view(*shape)

    for tokens in (1, 40, 500):
        given = problem(tree, tokens, 8)
        for made in (lambda given=given: step(given, "cpp"), lambda given=given: weighted_step(given)):
            expected = made()
            with monkeypatch.context() as patched:
                patched.setattr(native, "recycled", guarded)
                found = made()
            assert all(
                torch.equal(one.to_dense(), other.to_dense()) for one, other in zip(found, expected, strict=True)
            )
    assert len(taken) == 30 and all((whole[-64:].int().abs() == 77).all() for whole in taken)


@compiled
def test_any_request_for_memory_that_fails_is_an_error_and_the_next_step_goes_on(monkeypatch):
    given = problem(TREES["zipf"], 40, 8)
    expected, take, count = step(given, "cpp"), native.recycled, 0

    def limited(shape, dtype):
        nonlocal count
        count += 1
        if count == fail_at:
            raise MemoryError("out of memory")
        return take(shape, dtype)

    monkeypatch.setattr(native, "recycled", limited)
    for fail_at in range(1, 6):
        count = 0
        with pytest.raises(MemoryError):
            step(given, "cpp")
        again = step(given, "cpp")
        assert count == fail_at + 5
        assert all(torch.equal(one.to_dense(), other.to_dense()) for one, other in zip(again, expected, strict=True))
