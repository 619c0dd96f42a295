"""Sessions as a user would open them, and running them over data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from autocompress.errors import UsageError

Batch = np.ndarray | tuple[np.ndarray, ...] | Mapping[str, np.ndarray]


def version() -> str:
    """The runtime's version: part of what a measured latency holds for."""
    return str(ort.__version__)


def make_session(model: Path | str | bytes, threads: int = 1) -> ort.InferenceSession:
    """A plain CPU session; only the number of threads is set.

    Whatever an artifact needs to be fast must be in the file, so no other option is ever passed.  With more than one
    thread the runtime's workers spin for a while after each run, so sessions on one machine disturb each other;
    :func:`~autocompress.runtime.timing.measure_latency` says what it does about that.
    """
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise UsageError(f"no model file at {str(model)!r}")
    if threads < 1:
        raise UsageError(f"threads={threads}: a session needs at least one thread")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    source = model if isinstance(model, bytes) else str(model)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run_batches(session: ort.InferenceSession, inputs: Iterable[Batch]) -> np.ndarray:
    """Runs every batch and concatenates the model's first output along the batch axis.

    A batch is an array (a model with one input), a tuple in the order of the model's inputs, or a dict by name.
    """
    names = [i.name for i in session.get_inputs()]
    output = session.get_outputs()[0].name
    parts = []
    for batch in inputs:
        if isinstance(batch, Mapping):
            feed = dict(batch)
        else:
            arrays = batch if isinstance(batch, tuple) else (batch,)
            if len(arrays) != len(names):
                raise UsageError(f"a batch of {len(arrays)} arrays was given, but the model's inputs are {names}")
            feed = dict(zip(names, arrays, strict=True))
        parts.append(session.run([output], feed)[0])
    if not parts:
        raise UsageError("no batches were given to run")
    return np.concatenate(parts)
