"""What layers and operations do with inputs that are strided, in half precision, elsewhere, too large or wrong.

The right answer, or a ``ValueError`` that names the argument; after running out of memory, everything as it was. None
of the tests of layers knows a layer's name.
"""

import copy
import threading

import pytest
import torch
from cases import CASES, Batch, assert_close, dense, gradients, randomise, zipf_counts
from torch.utils._python_dispatch import TorchDispatchMode

from lvsoftmax import checked as module
from lvsoftmax import optim
from lvsoftmax.layer import DenseOutputLayer
from lvsoftmax.ops import buffers
from lvsoftmax.ops.gather_dot import gather_dot
from lvsoftmax.ops.path_nll import path_nll

YAMLS = [case for case in CASES if not case.option]
for_every_yaml = pytest.mark.parametrize("case", YAMLS, ids=str)
without_type_checks = pytest.mark.usefixtures("without_type_checks")

ARGUMENTS = {
    "loss": ("hidden", "target", "weight", "previous"),
    "forward": ("hidden", "target", "previous"),
    "nll": ("hidden", "target"),
    "draw": ("hidden", "target", "previous"),
    "log_prob": ("hidden",),
    "log_prob_and_partition": ("hidden",),
    "log_partition": ("hidden",),
    "sample": ("hidden",),
}
"""Of a layer's methods."""


def inputs(layer, dtype=torch.float32, tokens=7):
    batch = Batch.of(layer, tokens, dtype=dtype)
    return {"hidden": batch.hidden, "target": batch.target, "weight": batch.upstream, "previous": batch.previous}


def call(layer, method, given):
    return getattr(layer, method)(**{name: given[name] for name in ARGUMENTS[method]})


def strided(x):
    """The same numbers, every other one in memory, the last dimension far apart."""
    wide = torch.full([2 * size for size in reversed(x.shape)], 7, dtype=x.dtype)
    view = wide[tuple(slice(None, None, 2) for _ in x.shape)]
    view = view if x.ndim == 1 else view.T
    return view.copy_(x.detach()).requires_grad_(x.requires_grad)


# -- layers -----------------------------------------------------------------------------------------------------------


@for_every_yaml
def test_strided_inputs_and_parameters_are_the_numbers_they_hold(case):
    layer = randomise(case.build(counts=zipf_counts(300), **dense(case)).double())
    given = inputs(layer, torch.float64)
    sample = layer.draw(given["hidden"], given["target"], given["previous"])
    apart = copy.deepcopy(layer)
    for parameter in apart.parameters():
        parameter.data = strided(parameter.data)
    spread = {name: strided(x) for name, x in given.items()}
    assert not any(x.is_contiguous() for x in (*apart.parameters(), *spread.values()))
    for method in ("loss", "forward", "nll"):
        own = {} if method == "nll" else {"sample": sample}
        results = []
        for each, arguments in ((layer, given), (apart, spread)):
            value = getattr(each, method)(**{name: arguments[name] for name in ARGUMENTS[method]}, **own)
            upstream = given["weight"] if value.ndim else None
            results.append((value, gradients(value, upstream, each, arguments["hidden"])))
        assert_close(*results, 1e-10)
    assert_close(layer.log_prob(given["hidden"]), apart.log_prob(spread["hidden"]), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@for_every_yaml
def test_a_layer_in_half_precision_sums_in_single(case, dtype):
    """Values are float32, finite, and off by about what rounding the operands makes of them."""
    low = randomise(case.build(counts=zipf_counts(300), **dense(case)), scale=0.1).to(dtype)
    exact = copy.deepcopy(low).float()
    given = inputs(low, dtype, tokens=40) | {"weight": torch.linspace(0, 1, 40)}
    rounded = given | {"hidden": given["hidden"].detach().float().requires_grad_()}
    sample = exact.draw(rounded["hidden"], given["target"], given["previous"])
    for method in ("loss", "forward", "nll"):
        own = {} if method == "nll" else {"sample": sample}
        values = [
            getattr(layer, method)(**{name: each[name] for name in ARGUMENTS[method]}, **own)
            for layer, each in ((low, given), (exact, rounded))
        ]
        assert values[0].dtype == torch.float32
        finite = values[1].isfinite()
        assert torch.equal(values[0].isfinite(), finite)
        assert_close(values[0][finite], values[1][finite], 40 * torch.finfo(dtype).eps)
    values[0][finite].sum().backward()
    assert given["hidden"].grad.dtype == dtype
    for parameter in low.parameters():
        assert parameter.grad is None or (parameter.grad.dtype == dtype and parameter.grad.isfinite().all())


@for_every_yaml
@pytest.mark.usefixtures("in_double")
def test_a_layer_is_of_the_default_type(case):
    layer = case.build()
    assert {parameter.dtype for parameter in layer.parameters()} <= {torch.float64}
    given = inputs(layer, torch.float64)
    for method in ("loss", "nll", "log_prob"):
        assert call(layer, method, given).dtype == torch.float64


@for_every_yaml
@without_type_checks
def test_what_is_on_another_device_is_named(case):
    layer = case.build()
    given = inputs(layer)
    for method, names in ARGUMENTS.items():
        for name in names:
            with pytest.raises(ValueError, match=f"^{name} is on meta and the layer on cpu; move one of them$"):
                call(layer, method, given | {name: given[name].to("meta")})


@for_every_yaml
@without_type_checks
def test_what_has_the_wrong_shape_is_named(case):
    layer = case.build()
    given = inputs(layer)
    for method, names in ARGUMENTS.items():
        for name in names:
            wrong = given[name][:, 1:] if name == "hidden" else given[name][1:]
            with pytest.raises(ValueError, match=f"^{name} has shape "):
                call(layer, method, given | {name: wrong})


@for_every_yaml
@without_type_checks
def test_what_has_the_wrong_type_is_named(case):
    layer = case.build()
    given = inputs(layer)
    for method, names in ARGUMENTS.items():
        for name in set(names) & {"target", "previous"}:
            for dtype in (torch.int32, torch.float32):
                with pytest.raises(ValueError, match=f"^{name} has type {dtype}: word ids must be torch.int64"):
                    call(layer, method, given | {name: given[name].to(dtype)})
        with pytest.raises(ValueError, match=r"^hidden has type torch.int64: it must be of floating-point numbers"):
            call(layer, method, given | {"hidden": given["hidden"].long()})
        with pytest.raises(ValueError, match=r"^hidden has type torch.float16 and the layer torch.float32; cast one"):
            call(layer, method, given | {"hidden": given["hidden"].half()})
        double = given | {"hidden": given["hidden"].double()}
        with pytest.raises(ValueError, match=r"^hidden has type torch.float64 and the layer torch.float32; cast one"):
            with torch.autocast("cpu", torch.bfloat16):
                call(layer, method, double)


@for_every_yaml
@without_type_checks
def test_what_is_no_tensor_is_named(case):
    layer = case.build()
    given = inputs(layer)
    for method, names in ARGUMENTS.items():
        for name in names:
            for value, kind in ((given[name].tolist(), "list"), (given[name].detach().numpy(), "ndarray")):
                with pytest.raises(ValueError, match=f"^{name} is a {kind}: it must be a torch.Tensor$"):
                    call(layer, method, given | {name: value})


@for_every_yaml
@without_type_checks
def test_hidden_vectors_that_are_no_rows_are_named(case):
    layer = case.build()
    given = inputs(layer)
    for method in ARGUMENTS:
        for hidden in (torch.tensor(1.0), torch.ones(16), torch.ones(7, 1, 16)):
            with pytest.raises(ValueError, match=r"^hidden has shape .*: it must be \[tokens, 16\]"):
                call(layer, method, given | {"hidden": hidden})


@for_every_yaml
def test_more_words_than_there_are_are_named(case):
    layer = case.build()
    for k in (-1, 98):
        with pytest.raises(ValueError, match=f"^k={k}: must be from 0 to 97"):
            layer.topk(torch.ones(2, 16), k)
    assert layer.topk(torch.ones(2, 16), 97)[1].shape == (2, 97)


@pytest.mark.parametrize("word", [-100, -1, 97])
@for_every_yaml
def test_words_outside_the_vocabulary_are_named(case, word):
    layer = case.build()
    given = inputs(layer)
    for method, names in ARGUMENTS.items():
        for name in set(names) & {"target", "previous"}:
            wrong = given[name].clone()
            wrong[2] = word
            with pytest.raises(ValueError, match=rf"^{name} has ids from .*: they must be in \[0, 97\)"):
                call(layer, method, given | {name: wrong})


class Failing(TorchDispatchMode):
    """Counts operations; the one whose number is given fails."""

    def __init__(self, fail_at=0):
        super().__init__()
        self.count, self.fail_at = 0, fail_at

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.fail_at:
            raise InterruptedError
        return func(*args, **kwargs or {})


@for_every_yaml
def test_words_are_checked_after_any_method_has_failed(case):
    """In its last operation, far behind the checks."""
    layer = case.build()
    given = inputs(layer)
    refused = given | {name: torch.full_like(given[name], 97) for name in ("target", "previous")}
    for method in ARGUMENTS:
        with Failing() as counted:
            call(layer, method, given)
        if counted.count:
            state = layer.generator_state()
            with pytest.raises(InterruptedError), Failing(counted.count):
                layer.load_generator_state(state)
                call(layer, method, given)
        for other, names in ARGUMENTS.items():
            if "target" in names:
                with pytest.raises(ValueError, match=r"^target has ids from 97 to 97"):
                    call(layer, other, refused)


@for_every_yaml
def test_what_methods_hand_on_to_each_other_is_checked_once(case, monkeypatch):
    layer = case.build()
    given, checked = inputs(layer), []
    monkeypatch.setattr(module, "_check_inputs", lambda self, *_, **__: checked.append(self))
    for method in ARGUMENTS:
        checked.clear()
        call(layer, method, given)
        assert checked == [layer]


def test_a_layer_inside_another_and_another_thread_are_checked_each_for_itself():
    """While one of its methods runs, the layer is called in a thread, and another layer here and there."""
    refused, given = [], {"hidden": torch.randn(3, 4), "target": torch.tensor([0, 1, 97])}

    class Asking(DenseOutputLayer):
        def normalise(self, logits):
            for layer in (other, self):
                asks = threading.Thread(target=ask, args=(layer,))
                asks.start()
                asks.join()
            ask(other)
            return super().normalise(logits)

    def ask(layer):
        with pytest.raises(ValueError, match=r"^target has ids from 0 to 97"):
            layer.draw(**given)
        refused.append(layer)

    layer, other = Asking(4, zipf_counts(97)), DenseOutputLayer(4, zipf_counts(97))
    layer.log_prob(given["hidden"])
    assert refused == [other, layer, other]
    ask(layer)


@pytest.mark.parametrize("optimiser", [optim.SGD, optim.Adagrad, optim.Adam])
@for_every_yaml
def test_running_out_of_memory_changes_nothing(case, optimiser, monkeypatch):
    """At any of the requests for memory of a step: state, parameters and random streams go on as if it had not been."""
    monkeypatch.setattr(buffers, "SMALLEST", 0)  # every request is seen
    take = buffers._take

    def run(fail_at):
        layer = randomise(case.build())
        given, made = inputs(layer), optimiser(layer.parameters(), lr=0.1)
        requests = 0

        def limited(size):
            nonlocal requests
            requests += 1
            if requests == fail_at:
                raise MemoryError("out of memory")
            return take(size)

        monkeypatch.setattr(buffers, "_take", limited)
        sample = call(layer, "draw", given)
        for attempt in range(2):
            before = copy.deepcopy((list(layer.parameters()), made.state_dict()["state"]))
            try:
                layer.zero_grad()
                layer.loss(**given, sample=sample).backward()
                made.step()
                break
            except MemoryError:
                assert attempt == 0
                assert_close((list(layer.parameters()), made.state_dict()["state"]), before, 0.0)
        return requests, list(layer.parameters())

    total, expected = run(fail_at=0)
    for fail_at in {1, total // 2, total} - {0}:
        assert_close(run(fail_at)[1], expected, 1e-6)


# -- operations -------------------------------------------------------------------------------------------------------


def test_more_pairs_than_a_kernel_can_number_are_refused():
    """Nothing of this size is there: the tensors have strides of zero."""
    one, word = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64)
    tokens, words = 2**16, 2**15
    with pytest.raises(ValueError, match=r"^ids makes 2,147,483,648 pairs, more than 2,147,483,647; take fewer tokens"):
        gather_dot(one.expand(tokens, 1), one.expand(5, 1), None, word.expand(tokens, words), sparse=False)
    tree = [torch.zeros(size, dtype=torch.int32) for size in (4, 5, 5)]
    with pytest.raises(ValueError, match=r"^target makes 2,147,483,648 pairs"):
        path_nll(
            one.expand(2**29, 1), torch.ones(4, 1), torch.ones(4), torch.ones(4), *tree, 4, word[0].expand(2**29),
            sparse=False,
        )  # fmt: skip


@without_type_checks
def test_operations_name_what_does_not_fit():
    hidden, weight, bias = torch.randn(3, 4), torch.randn(9, 4), torch.randn(9)
    ids = torch.zeros(3, 2, dtype=torch.int64)
    for name, arguments in {
        "hidden has shape": (hidden[:, 1:], weight, bias, ids),
        "bias has shape": (hidden, weight, bias[1:], ids),
        "ids has shape": (hidden, weight, bias, ids[1:]),
        "ids has type torch.int32": (hidden, weight, bias, ids.int()),
        "ids is on meta and weight on cpu": (hidden, weight, bias, ids.to("meta")),
        "bias is on meta and weight on cpu": (hidden, weight, bias.to("meta"), ids),
        "hidden has type torch.int64": (hidden.long(), weight, bias, ids),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}"):
            gather_dot(*arguments, sparse=False)
