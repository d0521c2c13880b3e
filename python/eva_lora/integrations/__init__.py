"""Reports beside training runs: ``transformers`` and ``lightning`` callbacks, TensorBoard and Weights & Biases.

Import the module you need; none is imported by the package itself.
"""
