"""FourierFT: the inverse Fourier transform of a sparse spectrum, served as the closest change of low rank.

The places of the frequencies are not saved: they are drawn again from the seed exactly as PEFT draws them. So this
kind's change needs torch's own generator and transform, and is not told in the hub.

N frequencies, O out, I in.
Source: Gao et al. 2024 (arXiv:2405.03003); peft 0.21.2, tuners/fourierft/layer.py and model.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hub.families.change import Change, Found
from hub.families.fourierft import part
from hub.families.method import AtLinear, Config
from server.adapters.lowering.linears import lower_linears
from server.adapters.lowering.target import Lowered, Target


def lower_fourierft(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target) -> Lowered:
    return lower_linears(config, tensors, target, at=AtLinear(part, _change))


def _change(config: Config, found: Found) -> Change:
    """y += scaling * Re(F^-1 spectrum) x."""
    values_N = found.tensors["fourierft_spectrum"]
    weights = found.outputs * found.inputs
    generator = torch.Generator().manual_seed(config["random_loc_seed"])
    places_N = torch.randperm(weights, generator=generator)[: len(values_N)]
    spectrum = torch.zeros(weights)
    spectrum[places_N] = values_N
    delta_OI = torch.fft.ifft2(spectrum.view(found.outputs, found.inputs)).real
    return Change(full_OI=delta_OI * config["scaling"])
