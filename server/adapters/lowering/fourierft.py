"""FourierFT: the inverse Fourier transform of a sparse spectrum, served as the closest change of low rank.

The places of the frequencies are not saved: they are drawn again from the seed exactly as PEFT draws them.

N frequencies, O out, I in.
Source: Gao et al. 2024 (arXiv:2405.03003); peft 0.21.2, tuners/fourierft/layer.py and model.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from server.adapters.lowering.approximate import closest
from server.adapters.lowering.linears import Change, Found, dotted_pattern_value, lower_linears
from server.adapters.lowering.target import Lowered, Target
from server.errors import AdapterIncompatible


def lower_fourierft(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    """y += scaling * Re(F^-1 spectrum) x."""
    seed, scaling = int(config["random_loc_seed"]), float(config["scaling"])

    def change(found: Found) -> Change:
        count = int(dotted_pattern_value(config.get("n_frequency_pattern"), found.module, config["n_frequency"]))
        weights = found.outputs * found.inputs
        if count > weights:
            raise AdapterIncompatible(f"n_frequency {count} is above the {weights} weights of {found.module}")
        spectrum_N = found.take("fourierft_spectrum", count)
        places_N = torch.randperm(weights, generator=torch.Generator().manual_seed(seed))[:count]
        spectrum_OI = torch.zeros(weights)
        spectrum_OI[places_N] = spectrum_N
        delta_OI = torch.fft.ifft2(spectrum_OI.view(found.outputs, found.inputs)).real * scaling
        A_RI, B_OR, error = closest(delta_OI, found.module, target)
        return Change(A_RI, B_OR, error=error)

    return lower_linears(config, tensors, target, change=change)
