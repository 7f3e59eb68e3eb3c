"""Large-vocabulary softmax output layers, interchangeable and exact at evaluation."""

__version__ = "0.1.0"
