"""Passes captured as CUDA graphs: all of their kernels are launched at once."""

import torch

from app.worker.execution.base import ExecutorUnavailableError
from app.worker.execution.graphs.graph_executor import Pass

WARM_UP_PASSES = 2
"""Passes before one is captured: whatever is allocated, tuned or compiled at first use must not be in a graph."""


class CudaGraphs:
    """Captures passes whose graphs share their memory, so that they must be replayed one after the other."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def record(self, compute: Pass) -> Pass:
        """Capture a pass.

        Raises:
            ExecutorUnavailableError: it does something that a graph cannot hold.
            torch.OutOfMemoryError: there is no memory for it.
            torch.AcceleratorError: the device is in an unknown state.
        """
        try:
            graph = self._capture(compute)
        except RuntimeError as error:
            # What a graph cannot hold is an error of the device, too; one that is lost for good fails here again.
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = next(iter(str(error).strip().splitlines()), "")
            raise ExecutorUnavailableError(f"a pass cannot be captured: {type(error).__name__}: {reason}") from error
        return graph.replay

    def _capture(self, compute: Pass) -> torch.cuda.CUDAGraph:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP_PASSES):
                compute()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # The outer one restores the stream where the end of a failed capture raises.
        with (
            torch.cuda.stream(current),
            torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
        ):
            compute()
        return graph
