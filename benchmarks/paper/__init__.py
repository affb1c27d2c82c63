"""The FlashAttention paper's results, on this package's kernels: a script and a command each."""
