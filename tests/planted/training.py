"""Faults in what trains and evaluates: optimisers, checks, calibration, evaluation, runs, other libraries' models."""

from planted.fault import fault

FAULTS = [
    fault(
        "clipping: duplicate rows counted one by one",
        "test_optim_gradients.py",
        ("optim.py", "parameter.grad = _coalesced(parameter.grad)\n", "pass\n"),
    ),
    fault(
        "row-sparse updates: duplicate rows taken for unique ones",
        "test_optim_gradients.py",
        ("optim.py", "(row[1:] > row[:-1]).all()", "(row[1:] >= row[:-1]).all()"),
    ),
    fault(
        "Adagrad by row: the sum of the squares in place of their mean",
        "test_row_update.py test_optim_state.py",
        (
            "ops/row_update/kernel.cpp",
            "sum[place] += squares / float(D);",
            "sum[place] += squares;",
        ),
    ),
    fault(
        "Adam: the second moment not corrected for its start",
        "test_row_update.py test_optim.py",
        ("ops/row_update/kernel.cpp", "(std::sqrt(v[d] / whole2) + eps)", "(std::sqrt(v[d]) + eps)"),
    ),
    fault(
        "momentum: of the gradient without the weight decay",
        "test_row_update.py test_optim.py",
        ("ops/row_update/kernel.cpp", "m[d] = keep * m[d] + (g[d] + pull * p[d]);", "m[d] = keep * m[d] + g[d];"),
    ),
    fault(
        "optimisers: the first change comes before what needs memory",
        "test_optim_state.py",
        (
            "optim.py",
            "started = {p: self._start(group, p) for p, group in parameters if not self._is_started(group, p)}\n",
            "started = {}\n        for p, group in parameters:\n"
            "            self.state[p] = self.state.get(p) or self._start(group, p)\n",
        ),
    ),
    fault(
        "checks: once for a call, but of any layer",
        "test_bad_input.py",
        ("checked.py", "if outer is self:", "if outer is not None:"),
    ),
    fault(
        "calibration: the temperature's inverse",
        "test_calibration.py",
        ("calibration.py", "return 1 / inverse", "return inverse"),
    ),
    fault(
        "calibration: bins open at the other end",
        "test_calibration.py",
        (
            "calibration.py",
            "np.ceil(confidence * bins).astype(np.int64) - 1",
            "np.floor(confidence * bins).astype(np.int64)",
        ),
    ),
    fault(
        "evaluation: the mean of the first half of the tokens only",
        "test_evaluate.py",
        ("evaluate.py", 'nll = _mean(text["nll"])', 'nll = _mean(text["nll"][: len(text["nll"]) // 2])'),
    ),
    fault(
        "evaluation: of equal words the rarer comes first",
        "test_evaluate.py",
        ("evaluate.py", "< target[rows, None]", "> target[rows, None]"),
    ),
    fault(
        "runs: one that goes on keeps the result of its smaller budget",
        "test_resume.py -k while_a_larger",
        ("runs.py", '(self.path / "result.json").unlink(missing_ok=True)', "pass"),
    ),
    fault(
        "runs: two processes may write into one folder",
        "test_runs.py",
        ("runs.py", "        self._lock()\n", ""),
    ),
    fault(
        "Transformer: a position sees all of its stretch, and the memory",
        "test_models.py -k transformer",
        ("models/transformer.py", "if self.memory:", "if False:"),
    ),
    fault(
        "random streams: a checkpoint from before the first draw leaves them where they are",
        "test_layers.py -k checkpoint_from",
        ("layer.py", "self._generators.clear()", "pass"),
    ),
    fault(
        "random streams: an objective that a checkpoint computes again draws anew",
        "test_layers.py -k computes_again",
        ("layer.py", "if torch._C._current_graph_task_id() != -1:", "if False:"),
    ),
    fault(
        "gradients: a second derivative lacks what goes through them, as under PyTorch's once_differentiable",
        "test_layers_gradients.py -k differentiated_again",
        (
            "ops/once_differentiable.py",
            "if torch.is_grad_enabled() and not torch.compiler.is_compiling():",
            "if False:",
        ),
    ),
    fault(
        "sharded parameters: taken for those that fused kernels know",
        "test_distributed.py",
        ("optim.py", "fused=_are_plain(parameters) or None", "fused=True"),
    ),
    fault(
        "sharded parameters: updated by row, in a copy",
        "test_distributed.py",
        ("optim.py", "            _are_plain(by_row),\n", "            True,\n"),
    ),
    fault(
        "C++ backends: a tensor without memory is read",
        "test_backends.py -k without_memory",
        ("ops/backends.py", "if not pointer and argument.numel():", "if False:"),
    ),
    fault(
        "diagnostics: hidden vectors of an autocast that has ended",
        "test_layers_extremes.py -k diagnosed",
        ("layers/negative_sampling.py", "hidden = hidden.to(self.weight.dtype)", "pass"),
    ),
    fault(
        "Hugging Face: a token is predicted by what has read it",
        "test_hf.py",
        ("hf.py", "hidden, target = hidden[:, :-1][counted],", "hidden, target = hidden[:, 1:][counted],"),
    ),
    fault(
        "Hugging Face: every batch of a step has a mean of its own",
        "test_hf.py",
        ("hf.py", "len(target) if num_items_in_batch is None else num_items_in_batch", "len(target)"),
    ),
    fault(
        "Hugging Face: the layer's table in the order of the head's",
        "test_hf.py",
        ("hf.py", "layer.weight[order] = weight.to(layer.weight)", "layer.weight.copy_(weight)"),
    ),
]
