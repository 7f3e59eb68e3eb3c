"""TensorFlow's sampled softmax: a log-uniform sample shared by the batch, row-sparse gradients, one graph."""

from typing import final

import torch

from experiments.bench.cell import Batch, Cell, Unavailable

VARIANTS = {
    "tf.nn.sampled_softmax_loss, K 1024": {"samples": 1024},
    "tf.nn.sampled_softmax_loss, K 8192": {"samples": 8192},
}
PACKAGE = "tensorflow"
INSTALL = "pip install tensorflow-cpu"
EXACT = False


def build(cell: Cell, *, samples: int) -> "TensorFlowInstance":
    """Build it."""
    if cell.precision != "fp32":
        raise Unavailable("runs in fp32 only here")
    if samples > cell.vocab:
        raise Unavailable(f"draws {samples} of {cell.vocab} words without replacement")
    import tensorflow

    if torch.device(cell.device).type == "cuda" and not tensorflow.config.list_physical_devices("GPU"):
        raise Unavailable("its installation sees no GPU")
    return TensorFlowInstance(tensorflow, cell, samples)


@final
class TensorFlowInstance:
    """See the module; ``train`` is the loss and its gradients, there is no ``step``."""

    counted = False
    scale = 1.0

    def __init__(self, tf, cell: Cell, samples: int) -> None:
        try:
            tf.config.threading.set_intra_op_parallelism_threads(cell.threads)
            tf.config.threading.set_inter_op_parallelism_threads(1)
        except RuntimeError as error:
            if tf.config.threading.get_intra_op_parallelism_threads() != cell.threads:
                raise Unavailable("cannot change its number of threads once it has started") from error
        self.tf = tf
        self.parameters = cell.vocab * (cell.hidden + 1)
        bound = cell.hidden**-0.5
        weight = tf.Variable(tf.random.uniform((cell.vocab, cell.hidden), -bound, bound))
        bias = tf.Variable(tf.zeros(cell.vocab))
        self.batches: dict[int, tuple] = {}

        @tf.function
        def run(hidden, target):
            with tf.GradientTape() as tape:
                tape.watch(hidden)
                values = tf.nn.sampled_softmax_loss(weight, bias, target, hidden, samples, cell.vocab)
                loss = tf.reduce_mean(values)
            return loss, *tape.gradient(loss, [hidden, weight, bias])

        self.run = run
        self.modes = {"train": self._train}

    def _train(self, batch: Batch) -> float:
        key = id(batch)
        if key not in self.batches:
            target = batch.target[:, None].cpu().numpy()
            self.batches[key] = (self.tf.constant(batch.hidden.detach().cpu().numpy()), self.tf.constant(target))
        loss, *gradients = self.run(*self.batches[key])
        return float(loss)

    def forget(self, batch: Batch) -> None:
        """Its gradients are gone already."""

    def gradient_bytes(self, batch: Batch) -> int:
        """They are gone by then."""
        return 0
