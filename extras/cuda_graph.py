"""Record a function for a GPU once, and replay it."""

import torch


class CUDAGraph:
    """A function of tensors, recorded once and replayed, so that a GPU launches its hundreds of kernels as one.

    Calls the function a few times to warm up, so it must have no side effects that matter. Each call overwrites the
    output of the one before.
    """

    def __init__(self, function, *inputs):
        self.inputs, self.graph = [tensor.clone() for tensor in inputs], torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()  # first-use initialization must happen on another stream before recording
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # other threads load data meanwhile
            self.output = function(*self.inputs)

    def __call__(self, *inputs):
        for tensor, new in zip(self.inputs, inputs):
            tensor.copy_(new)
        self.graph.replay()
        return self.output
