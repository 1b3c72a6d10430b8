"""Outcomes made up for the tests of what is written from them."""

from recipes.forecast import Prediction
from recipes.measurement import Measurement, Versions
from recipes.modes import Mode
from recipes.outcome import Finished
from recipes.timeline import Timeline

MIB = 2**20


def finished(mode: Mode, *, wall_s: float = 0.1, peak_mib: float = 100.0, bits: str = "same") -> Finished:
    peak_bytes = int(peak_mib * MIB)
    measurement = Measurement(
        losses=(2.0, 1.0) if bits == "same" else (2.0, 1.25),
        wall_s=wall_s,
        step_walls_s=(wall_s,),
        first_step_s=1.0,
        peak_bytes=peak_bytes + MIB,
        activation_peak_bytes=peak_bytes,
        residue_bytes=0,
        reserved_peak_bytes=None,
        timeline=Timeline((0.0, wall_s / 2, wall_s), (0, peak_bytes, 0)),
        gradients_sha256=bits,
        parameters_sha256=bits,
        buffers_sha256="same",
        device="CPU (test)",
        versions=Versions("3", "2", "", "", ""),
    )
    is_ours = mode in (Mode.hcb_eager, Mode.hcb_inductor)
    forecast = Prediction(peak_bytes - MIB, Timeline((0.0, 2.0, 4.0), (0, peak_bytes - MIB, 0)), "plan")
    return Finished(mode, measurement, forecast if is_ours else None, "library.Model", "data", 0.5)
