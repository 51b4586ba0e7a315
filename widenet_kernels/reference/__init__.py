"""The specification: every stage in plain torch, on any device, differentiable, without a host sync.

The ops fall back to it where no kernel serves, and the tests hold every kernel against it. Each ``*_backward``
is the hand-written gradient that the kernels implement too; the tests hold it against torch's autograd.
"""
