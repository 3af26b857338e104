"""The tab Profile of TensorBoard: traces of torch.profiler as an overview, operators, a timeline and a memory curve."""
