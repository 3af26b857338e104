"""What rlboard costs beside its peers: `python -m benchmarks.<name>`; how to add one stands in `harness`."""
