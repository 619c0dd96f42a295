"""What calibration chose and what it brought."""

from __future__ import annotations

from pydantic import Field

from autocompress.plan import Value


class CalibrationReport(Value):
    """Carried by a compressed model, and part of ``--json``.

    Attributes:
        ranges: name of the range method.
        equalization: what was balanced across layers: ``none``, ``weights`` or ``activations``.
        rounding: of 8-bit weights, ``nearest`` or ``compensated``.
        bias_correction: whether biases were corrected.
        samples: calibration samples used.
        held_out: of these, how many choices were made by and no range was taken from (all of them, where fewer
            than four were given).
        uncorrected_snr_db: signal-to-noise ratio before equalization and corrections, with the best range method.
        snr_db: signal-to-noise ratio of the outputs on the samples held out, against the float model.
        tried: the same for everything that was tried.
    """

    ranges: str
    equalization: str
    rounding: str
    bias_correction: bool
    samples: int
    held_out: int
    uncorrected_snr_db: float
    snr_db: float
    tried: dict[str, float] = Field(default_factory=dict)
