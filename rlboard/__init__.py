"""rlboard: complete, fast, readable training examples that fill TensorBoard properly."""

__version__ = "0.1.0"
